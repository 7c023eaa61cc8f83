"""The scan of affine cells and its derivative, against a plain ``lax.scan`` of single steps under autodiff."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnjax
from rnnjax import affine_scan, linearisation, weight_gradients
from rnnjax.cells import AffineCell
from rnnjax.chunks import scan_chunks
from rnnjax.pointwise import PointwiseProgram

T, B, D, H = 11, 2, 2, 3


@dataclasses.dataclass(frozen=True)
class TangledCell(AffineCell):
    """All that a pointwise function can do: gates summed, unused, used twice and raw, results from results."""

    num_gates = 4
    has_recurrent_bias = True

    @property
    def num_carries(self):
        return 3

    def pointwise(self, carry, input_preactivation, recurrent_preactivation):
        h, c, d = carry
        u, r = input_preactivation, recurrent_preactivation
        keep = jax.nn.sigmoid(u[0] + r[0])
        raw = u[1] + r[1]
        memory = keep * c + jnp.sin(raw) * jnp.where(raw > 0, raw, 0.3 * raw)
        hidden = jnp.tanh(memory + 0.5 * d) * keep + jnp.tanh(u[2] * r[2]) + 0.1 * raw
        return hidden, memory, 0.7 * d + hidden * h


@jax.custom_jvp
def surrogate(a):
    return jnp.tanh(a)


@surrogate.defjvp
def _surrogate_jvp(primals, tangents):
    """Not the derivative of tanh."""
    return surrogate(primals[0]), tangents[0] / (1 + primals[0] ** 2)


@dataclasses.dataclass(frozen=True)
class TwinCell(AffineCell):
    """Carries the same number twice, and one that never changes."""

    num_gates = 1

    @property
    def num_carries(self):
        return 3

    def pointwise(self, carry, input_preactivation, recurrent_preactivation):
        hidden = jnp.tanh(input_preactivation[0] + recurrent_preactivation[0]) + 0.5 * carry[1] * carry[2]
        return hidden, hidden, jnp.ones_like(carry[2])


@dataclasses.dataclass(frozen=True)
class ForkedCell(AffineCell):
    """One gate that reaches two carries, its u apart from its r, and one carry that is kept in two."""

    num_gates = 1
    has_recurrent_bias = True

    @property
    def num_carries(self):
        return 4

    def pointwise(self, carry, input_preactivation, recurrent_preactivation):
        _, c, d, e = carry
        u, r = input_preactivation[0], recurrent_preactivation[0]
        return jnp.tanh(u * r) + 0.2 * d * e, jnp.sin(u + 0.5 * r**2), c, c


@dataclasses.dataclass(frozen=True)
class DeafCell(AffineCell):
    """One gate does not hear the inputs, and functions that are compiled apart pass on other than what they take."""

    num_gates = 2
    has_recurrent_bias = True

    def pointwise(self, carry, input_preactivation, recurrent_preactivation):
        heard = input_preactivation[0] + recurrent_preactivation[0]
        second = jax.jit(lambda gate, memory: jnp.tanh(memory))(heard, carry)
        both = jax.jit(lambda gate: (gate, jnp.tanh(gate)))(heard)
        return both[1] * jax.nn.sigmoid(recurrent_preactivation[1]) + 0.3 * second + 0.1 * both[0]


CELLS = {
    "deaf": DeafCell(H),
    "forked": ForkedCell(H),
    "surrogate": rnnjax.VanillaCell(H, activation=surrogate),
    "twin": TwinCell(H),
    "tanh": rnnjax.VanillaCell(H),
    "relu": rnnjax.VanillaCell(H, activation="relu"),
    "sigmoid": rnnjax.VanillaCell(H, activation="sigmoid"),
    "identity": rnnjax.VanillaCell(H, activation="identity"),
    "own": rnnjax.VanillaCell(H, activation=lambda a: a / (1 + jnp.abs(a))),
    "leaky": rnnjax.LeakyCell(H, leak=0.4),
    "gru": rnnjax.GRUCell(H),
    "lstm": rnnjax.LSTMCell(H),
    "skip": rnnjax.SkipCell(H, span=3),
    "tangled": TangledCell(H),
}
EVERY_CELL = pytest.mark.parametrize("name", CELLS)


def random_like(tree, seed, dtype):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.7, dtype), tree)


def problem(name, dtype=np.float64, batch=(B,), num_steps=T):
    cell = CELLS[name]
    params = random_like(jax.eval_shape(lambda: cell.init(jax.random.key(0), D)), 3, dtype)
    inputs = random_like(np.empty((num_steps, *batch, D)), 1, dtype)
    return cell, params, inputs, random_like(cell.initialize_carry(batch), 2, dtype)


def plain(cell, params, inputs, carry):
    """The same by autodiff of one step after the other."""
    last, outputs = jax.lax.scan(lambda c, x: cell.step(params, c, x), carry, cell.prepare_inputs(params, inputs))
    return last, outputs


def by_loop(cell, params, inputs, carry):
    """The same without a scan, through which JAX drops the second derivatives of a rule of one's own."""
    outputs = []
    for prepared in cell.prepare_inputs(params, inputs):
        carry, output = cell.step(params, carry, prepared)
        outputs.append(output)
    return carry, jnp.stack(outputs)


def loss(run, cell, params, inputs, carry):
    last, outputs = run(cell, params, inputs, carry)
    weights = jnp.cos(jnp.arange(outputs.size, dtype=outputs.dtype)).reshape(outputs.shape)
    return jnp.sum(weights * outputs) + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(last))


def losses(name, dtype=np.float64, reference=plain, **settings):
    cell, *arguments = problem(name, dtype, **settings)
    return [functools.partial(loss, run, cell) for run in (rnnjax.unroll, reference)], arguments


def agree(ours, theirs, tolerance):
    """The largest difference, relative to the largest entry of each array."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1e-30, np.abs(b).max()))


@EVERY_CELL
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_value_and_gradient(name, dtype):
    with jax.enable_x64(dtype == np.float64):
        (ours, theirs), arguments = losses(name, dtype)
        tolerance = 1e-12 if dtype == np.float64 else 1e-6
        agree(ours(*arguments), theirs(*arguments), tolerance)
        agree(*(jax.grad(f, argnums=(0, 1, 2))(*arguments) for f in (ours, theirs)), tolerance)


@pytest.mark.parametrize("name", ["tanh", "gru", "lstm", "tangled"])
def test_the_way_that_other_devices_go_leads_to_the_same(name, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.clear_caches()
    with jax.enable_x64():
        (ours, theirs), arguments = losses(name)
        agree(*(jax.value_and_grad(f, argnums=(0, 1, 2))(*arguments) for f in (ours, theirs)), 1e-12)
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize("narrow", [0, D])
@pytest.mark.parametrize("name", ["lstm", "gru", "tangled", "forked", "deaf"])
def test_gradients_of_the_weights_alone(name, narrow, monkeypatch):
    """Both ways to take gates whose u and r are not just added up."""
    monkeypatch.setattr(weight_gradients, "_NARROW", narrow)
    jax.clear_caches()
    with jax.enable_x64():
        (ours, theirs), arguments = losses(name)
        agree(*(jax.grad(f)(*arguments) for f in (ours, theirs)), 1e-12)


@pytest.mark.parametrize("varied", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_weights_and_perturbations_may_each_be_constant(varied):
    """Weights are argument 0, what is added to h and c 1 and 2."""
    with jax.enable_x64():
        cell, params, inputs, _ = problem("lstm")
        added = [0.1 * random_like(np.empty((T, B, H)), seed, np.float64) for seed in (5, 6)]

        def ours(params, *added):
            return (rnnjax.unroll(cell, params, inputs, perturbations=added)[1] ** 2).sum()

        def by_loop(params, *added):
            carry, total = cell.initialize_carry((B,), jnp.float64), 0.0
            for t in range(T):
                carry, _ = cell.apply(params, carry, inputs[t])
                carry = tuple(leaf + new[t] for leaf, new in zip(carry, added, strict=True))
                total += (carry[0] ** 2).sum()
            return total

        agree(*(jax.grad(f, varied)(params, *added) for f in (ours, by_loop)), 1e-12)


@pytest.mark.parametrize(
    ("pointwise", "message"),
    [
        (lambda c, u, r: jnp.ones((B, B, H)) * jnp.tanh(u[0] + r[0]), r"got float32\[2, 2, 3\] for carry 0"),
        (lambda c, u, r: (u[0] + r[0]).astype(jnp.float16), r"got float16\[2, 1, 3\] for carry 0"),
        (lambda c, u, r: (c, u[0] + r[0]), "must return 1 new carries, got 2"),
    ],
)
def test_what_is_not_pointwise_is_refused(pointwise, message):
    """A mask of its own for each sequence, say: only what a function does to each unit is known to all that follows."""

    @dataclasses.dataclass(frozen=True)
    class Odd(AffineCell):
        num_gates = 1

        def pointwise(self, *args):
            return pointwise(*args)

    params = CELLS["tanh"].init(jax.random.key(0), D)
    with pytest.raises(ValueError, match=message):
        rnnjax.unroll(Odd(H), params, jnp.ones((T, B, D)))


def standardised(a):
    return jnp.tanh(a - a.mean(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    "mixing",
    [standardised, jax.nn.softmax, lambda a: jnp.tanh(jnp.roll(a, 1, axis=-1)), lambda a: jnp.cumsum(a, axis=-1)],
)
@pytest.mark.parametrize("jit", [False, True])
def test_units_that_depend_on_one_another_within_a_step_are_refused(mixing, jit):
    @dataclasses.dataclass(frozen=True)
    class Mixing(rnnjax.AffineCell):
        num_gates = 1

        def pointwise(self, carry, input_preactivation, recurrent_preactivation):
            return mixing(input_preactivation[0] + recurrent_preactivation[0])

    cell, inputs = Mixing(H), jnp.ones((T, B, D))
    params = cell.init(jax.random.key(0), D)
    gradient = jax.grad(lambda params: rnnjax.unroll(cell, params, inputs)[1].sum())
    path = rnnjax.trajectory(cell, params, inputs)
    for function in (gradient, lambda params: rnnjax.step_jacobians(cell, params, path)):
        with pytest.raises(ValueError, match=r"^pointwise of Mixing must treat each unit on its own"):
            (jax.jit(function) if jit else function)(params)


@pytest.mark.parametrize("name", ["apply", "hidden", "prepare_inputs", "recurrent_preactivation", "step"])
def test_what_follows_from_the_pointwise_function_cannot_be_replaced(name):
    with pytest.raises(TypeError, match=f"Own must not define {name}"):
        type("Own", (rnnjax.VanillaCell,), {name: lambda self, *args: None})


@EVERY_CELL
def test_forward_mode_and_second_derivatives(name):
    with jax.enable_x64():
        (ours, theirs), arguments = losses(name, reference=by_loop)
        moved = [random_like(a, 7 + i, np.float64) for i, a in enumerate(arguments)]
        agree(*(jax.jvp(f, arguments, moved) for f in (ours, theirs)), 1e-12)
        forward_over_reverse = [jax.jvp(jax.grad(f, argnums=(0, 1, 2)), arguments, moved)[1] for f in (ours, theirs)]
        agree(*forward_over_reverse, 1e-11)

        def slope(f, *at):
            return jax.jvp(f, list(at), moved)[1]

        agree(*(jax.grad(functools.partial(slope, f))(*arguments) for f in (ours, theirs)), 1e-11)


@pytest.mark.parametrize("name", ["gru", "lstm", "tangled"])
def test_hessian(name):
    with jax.enable_x64():
        (ours, theirs), (params, inputs, carry) = losses(name)
        agree(*(jax.hessian(lambda x, f=f: f(params, x, carry))(inputs) for f in (ours, theirs)), 1e-11)


@pytest.mark.parametrize("name", ["tanh", "gru", "lstm", "skip", "tangled"])
def test_batching_rematerialisation_and_jit(name):
    with jax.enable_x64():
        (ours, theirs), (params, inputs, carry) = losses(name)
        expected = jax.grad(theirs)(params, inputs, carry)
        agree(jax.jit(jax.grad(jax.checkpoint(ours)))(params, inputs, carry), expected, 1e-12)
        several = jnp.stack([inputs, 2 * inputs, -inputs])
        each = jax.vmap(jax.grad(ours), in_axes=(None, 0, None))(params, several, carry)
        one_by_one = [jax.grad(theirs)(params, x, carry) for x in several]
        agree(each, jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one), 1e-12)
        ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), params)
        agree(
            jax.tree.map(
                lambda leaf: leaf[0], jax.vmap(jax.grad(ours), in_axes=(0, None, None))(ensemble, inputs, carry)
            ),
            expected,
            1e-12,
        )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("num_steps", [1, 4, 5, 8, 11, 13])
def test_chunks_of_every_kind(num_steps, reverse, monkeypatch):
    monkeypatch.setattr(linearisation, "_CHUNK_BYTES", 1)  # four steps a chunk, or a near divisor of T
    with jax.enable_x64():
        cell, params, inputs, carry = problem("gru", num_steps=num_steps)

        def flipped(cell, params, inputs, carry):
            last, outputs = plain(cell, params, inputs[::-1], carry)
            return last, outputs[::-1]

        def ours(params):
            return loss(functools.partial(rnnjax.unroll, reverse=reverse), cell, params, inputs, carry)

        def theirs(params):
            return loss(flipped if reverse else plain, cell, params, inputs, carry)

        agree(*(jax.value_and_grad(f)(params) for f in (ours, theirs)), 1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 9])
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_of_chunks_is_a_scan(size, reverse):
    xs = jnp.arange(7.0)

    def step(carry, x):
        return 0.5 * carry + x, carry * x

    expected = jax.lax.scan(step, 1.0, xs, reverse=reverse)
    lengths = []

    def chunk(carry, x):
        lengths.append(len(x))
        return jax.lax.scan(step, carry, x, reverse=reverse)

    agree(scan_chunks(chunk, jnp.asarray(1.0), xs, size, reverse=reverse), expected, 1e-6)
    assert set(lengths) <= {size, 7 % size, 7}


def test_only_what_is_asked_for_is_differentiated():
    cell, params, inputs, carry = problem("lstm", np.float32)

    def products(argnums):
        def of(params, inputs, carry):
            return loss(rnnjax.unroll, cell, params, inputs, carry)

        program = jax.jit(jax.grad(of, argnums=argnums)).lower(params, inputs, carry).as_text()
        return program.count("stablehlo.dot_general")

    # Two products of a step and its cotangent and one of all inputs; two gradients of the weights; one of the inputs.
    assert products(2) == 3 and products(1) == 4 and products(0) == 5 and products((0, 1)) == 6


def test_the_backward_scan_accumulates_no_gradient_of_a_weight():
    """No scan over single steps carries an array like a weight: rows are written over, the rest is the state."""
    cell, params, inputs, carry = problem("lstm", np.float32)
    program = jax.make_jaxpr(jax.grad(lambda p: loss(rnnjax.unroll, cell, p, inputs, carry)))(params)
    carried = [shapes for length, shapes in _scans(program.jaxpr) if length == T]
    assert len(carried) == 2
    for shapes in carried:
        assert {shape for shape in shapes if shape[:1] != (T,)} == {(B, H)}, shapes


def copied_at_each_step(cell, shape, steps=97):
    """Returns the lines of a gradient's program, within its loops, that copy the rows of all steps."""
    params = cell.init(jax.random.key(0), D)
    gradient = jax.grad(lambda p, x: jnp.mean(rnnjax.unroll(cell, p, x, side_by_side=True)[1] ** 2), argnums=(0, 1))
    program = jax.jit(gradient).lower(params, jnp.ones((steps, *shape, D))).compile().as_text()
    computations = re.split(r"\n(?=%|ENTRY)", program)
    bodies = set(re.findall(r"body=(%[\w.\-]+)", program))
    inside = [c for c in computations if c.split(" ")[0] in bodies]
    assert len(inside) >= 2
    return [line for c in inside for line in c.splitlines() if re.search(rf"\[{steps},\S* copy\(", line)]


@pytest.mark.slow  # compiled as for users: with `XLA_FLAGS=`
@pytest.mark.parametrize("shape", [(), (1,), (2,), (2, 3), (1, 3)])
@pytest.mark.parametrize("name", ["tanh", "relu", "gru", "lstm", "one unit"])
def test_no_step_copies_the_rows_of_all_steps(name, shape):
    """A loop that copied them would take a time that grows with the square of the length."""
    cell = rnnjax.GRUCell(1) if name == "one unit" else dataclasses.replace(CELLS[name], hidden_size=16)
    assert not copied_at_each_step(cell, shape)


@pytest.mark.slow  # compiled as for users
@pytest.mark.parametrize("loops", [1, 2])
@EVERY_CELL
def test_no_step_of_any_cell_copies_the_rows_of_all_steps(name, loops, monkeypatch):
    monkeypatch.setattr(affine_scan, "number_of_loops", lambda *_: loops)
    jax.clear_caches()
    assert not copied_at_each_step(dataclasses.replace(CELLS[name], hidden_size=16), (4,))


@pytest.mark.slow  # compiled as for users
@pytest.mark.parametrize("name", ["tanh", "gru", "lstm"])
def test_the_rows_of_all_steps_are_not_copied_before_a_loop(name):
    """But for memory to be written to, which is filled once."""
    steps, cell = 97, dataclasses.replace(CELLS[name], hidden_size=16)
    params = cell.init(jax.random.key(0), D)
    gradient = jax.grad(lambda p, x: jnp.mean(rnnjax.unroll(cell, p, x)[1] ** 2))
    program = jax.jit(gradient).lower(params, jnp.ones((steps, 2, D))).compile().as_text()
    assert f"[{steps},2," in program
    copied = re.findall(rf"copy[\w.]* = \S*\[{steps},2,\S* copy\((%[\w.\-]+)\)", program)
    assert len(copied) == len(re.findall(rf"copy[\w.]* = \S*\[{steps},2,", program))
    assert all("broadcast" in source for source in copied)


@pytest.mark.slow  # compiled as for users
@pytest.mark.parametrize("loops", [1, 2])
@pytest.mark.parametrize(("name", "arrays"), [("tanh", 3), ("gru", 7), ("lstm", 8)])
def test_the_backward_scan_holds_the_states_once(name, arrays, loops, monkeypatch):
    """Beside the local derivatives and the cotangents; the states before, for dU, are made when it has ended.

    Two loops, over half of the batch each, leave their halves behind beside the whole.
    """
    monkeypatch.setattr(affine_scan, "number_of_loops", lambda *_: loops)
    steps, batch, units = 64, 32, 64
    cell = dataclasses.replace(CELLS[name], hidden_size=units)
    params = cell.init(jax.random.key(0), D)
    gradient = jax.grad(lambda p, x: jnp.mean(rnnjax.unroll(cell, p, x, side_by_side=True)[1] ** 2))
    memory = jax.jit(gradient).lower(params, jnp.ones((steps, batch, D))).compile().memory_analysis()
    whole = 1 if loops == 2 else 0
    assert memory.temp_size_in_bytes < (arrays + whole + 0.7) * 4 * steps * batch * units


def _scans(jaxpr):
    """Yields the length of each scan, with the shapes of what it carries."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn.params["length"], [v.aval.shape for v in eqn.outvars]
        if eqn.primitive.name == "scan_in_place":
            yield eqn.params["loop"].length, [v.aval.shape for v in eqn.outvars]
        if eqn.primitive.name == "linear_map":
            pair = eqn.params["pair"]
            args = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
            yield from _scans(jax.make_jaxpr(lambda *args, pair=pair: pair.function(*pair.split(args)))(*args).jaxpr)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _scans(inner)


def test_how_a_pointwise_function_is_taken_apart():
    lstm = PointwiseProgram(rnnjax.LSTMCell(H), (B, H), jnp.float32, exact=False)
    assert [scale for _, scale in lstm.activated.values()] == [0.5, 0.5, 1, 0.5]
    zeros, gates = jnp.zeros((B, H)), jnp.zeros((B, 4, H))
    _, local = lstm.value_and_derivatives([zeros, zeros], gates, gates)
    assert local.receivers == ((1, 1, 1, 0),) and local.order == (1, 0) and all(local.summed)
    assert set(local.by_carry) == {(1, 1)} and set(local.by_result) == {(0, 1)} and not local.by_input
    gru = PointwiseProgram(rnnjax.GRUCell(H), (B, H), jnp.float32, exact=False)
    assert list(gru.activated) == [0, 1]
    assert PointwiseProgram(CELLS["tanh"], (B, H), jnp.float32, exact=False).activated
    assert not PointwiseProgram(CELLS["surrogate"], (B, H), jnp.float32, exact=False).activated
    _, local = gru.value_and_derivatives([zeros], gates[:, :3], gates[:, :3])
    assert local.summed == (True, True, False) and set(local.by_input) == {(0, 2)}
    assert len(local.by_gate) == 1 and local.receivers == ((0, 0, 0),)
    skip = PointwiseProgram(rnnjax.SkipCell(H, span=3), (B, H), jnp.float32, exact=False)
    _, local = skip.value_and_derivatives([zeros] * 3, gates[:, :1], gates[:, :1])
    assert local.copies == ((1, 0), (2, 1)) and set(local.by_carry) <= {(0, 0), (0, 2)}


@EVERY_CELL
def test_local_derivatives_are_those_of_autodiff(name):
    with jax.enable_x64():
        cell, *_ = problem(name)
        shape = (5, H)
        carry = [random_like(jnp.zeros(shape), 30 + i, np.float64) for i in range(cell.num_carries)]
        u, r = (random_like(jnp.zeros((5, cell.num_gates, H)), seed, np.float64) for seed in (40, 41))

        def pointwise(carry, r):
            gates = [tuple(x[:, g] for g in range(cell.num_gates)) for x in (u, r)]
            new = jax.tree.leaves(cell.pointwise(carry[0] if len(carry) == 1 else tuple(carry), *gates))
            return jnp.stack(new, axis=1)

        by_carry, by_gate = jax.jacrev(pointwise, argnums=(0, 1))(carry, r)
        index = np.arange(5)[:, None], np.arange(H)
        expected_carry = np.stack([np.asarray(d)[index[0], :, index[1], index[0], index[1]] for d in by_carry], axis=-1)
        expected_gate = np.asarray(by_gate)[index[0], :, index[1], index[0], :, index[1]]
        for exact in (True, False):
            program = PointwiseProgram(cell, shape, jnp.float64, exact=exact)
            values, local = program.value_and_derivatives(carry, u, r)
            np.testing.assert_allclose(jnp.stack(values, axis=1), pointwise(carry, r), rtol=1e-13, atol=1e-15)
            tolerance = {"rtol": 1e-11, "atol": 1e-14}
            np.testing.assert_allclose(np.moveaxis(local.by_old_carry(), -1, 1), expected_carry, **tolerance)
            np.testing.assert_allclose(np.moveaxis(local.by_recurrent(), -1, 1), expected_gate, **tolerance)


CONTROLS = {"lengths": np.array([4, 11]), "resets": np.arange(T)[:, None] % np.array([3, 5]) == 2, "truncation": 3}


@pytest.mark.parametrize(("name", "every"), [("tanh", 1), ("lstm", 4), ("gru", 3), ("lstm", 20)])
def test_checkpoints_change_nothing(name, every):
    for option in ({}, CONTROLS | {"reverse": True}, {"max_carry_gradient": 0.5}):
        with jax.enable_x64():
            cell, params, inputs, carry = problem(name)

            def run(params, kept, option=option, cell=cell, inputs=inputs, carry=carry):
                unroll = functools.partial(rnnjax.unroll, checkpoint_every=kept, **option)
                return loss(unroll, cell, params, inputs, carry)

            agree(*(jax.value_and_grad(run)(params, kept) for kept in (every, None)), 1e-12)


def test_checkpoints_bound_the_memory():
    cell, params = rnnjax.LSTMCell(32), None
    params = cell.init(jax.random.key(0), 1)

    def memory(num_steps, every):
        inputs = jnp.ones((num_steps, 1, 1))
        step = jax.grad(lambda p: rnnjax.unroll(cell, p, inputs, checkpoint_every=every)[1][-1].sum())
        return jax.jit(step).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert memory(6400, 80) < memory(6400, None) / 3


@pytest.mark.parametrize("name", ["tanh", "gru", "lstm", "leaky"])
def test_bfloat16_factors_with_float32_sums(name):
    cell, params, inputs, carry = problem(name, np.float32)

    def ours(params, dtype):
        return loss(functools.partial(rnnjax.unroll, compute_dtype=dtype), cell, params, inputs, carry)

    value, gradient = jax.value_and_grad(ours)(params, jnp.bfloat16)
    exact = jax.value_and_grad(ours)(params, None)
    assert value.dtype == jnp.float32 and all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
    agree((value, gradient), exact, 0.05)
    assert abs(value - exact[0]) > 1e-6  # the factors are rounded
    bias = np.asarray(gradient.bias)
    assert not np.array_equal(bias, bias.astype(jnp.bfloat16).astype(np.float32))  # the sums are not


@pytest.mark.parametrize("name", ["tanh", "gru", "lstm", "leaky"])
def test_only_the_factors_are_rounded(name):
    """In float64, against the plain scan of rounded factors whose rounding has the derivative 1."""

    def rounded(x):
        return x + jax.lax.stop_gradient(x.astype(jnp.bfloat16).astype(x.dtype) - x)

    def plain_rounded(cell, params, inputs, carry):
        kernels = {kernel: rounded(getattr(params, kernel)) for kernel in ("input_kernel", "recurrent_kernel")}
        params = dataclasses.replace(params, **kernels)

        def step(carry, from_inputs):
            recurrent = cell.recurrent_preactivation(params, rounded(cell.hidden(carry)))
            gates = [tuple(x[..., g, :] for g in range(cell.num_gates)) for x in (from_inputs, recurrent)]
            carry = cell.pointwise(carry, *gates)
            return carry, cell.hidden(carry)

        return jax.lax.scan(step, carry, cell.prepare_inputs(params, rounded(inputs)))

    with jax.enable_x64():
        cell, params, inputs, carry = problem(name)
        ours = functools.partial(loss, functools.partial(rnnjax.unroll, compute_dtype=jnp.bfloat16), cell)
        theirs = functools.partial(loss, plain_rounded, cell)
        agree(*(jax.value_and_grad(f, argnums=(0, 1, 2))(params, inputs, carry) for f in (ours, theirs)), 1e-10)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"checkpoint_every": 2.5}, "checkpoint_every"),
        ({"compute_dtype": "int32"}, "compute_dtype"),
    ],
)
def test_impossible_settings(setting, message):
    cell, params, inputs, carry = problem("tanh", np.float32)
    with pytest.raises(ValueError, match=message):
        rnnjax.unroll(cell, params, inputs, carry, **setting)
    step = rnnjax.StepCell(lambda params, h, x: (h, h), jnp.zeros(2))
    with pytest.raises(ValueError, match="compute_dtype must be None"):
        rnnjax.unroll(step, None, inputs, compute_dtype=jnp.bfloat16)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", ["tanh", "gru", "lstm", "skip"])
def test_training_lowers_for_accelerators(name, platform):
    cell, params, inputs, carry = problem(name, np.float32)
    for setting in ({}, {"compute_dtype": jnp.bfloat16}, {"checkpoint_every": 4}, {"max_carry_gradient": 1.0}):
        run = jax.jit(
            jax.value_and_grad(lambda p, s=setting: loss(functools.partial(rnnjax.unroll, **s), cell, p, inputs, carry))
        )
        lowered = run.trace(params).lower(lowering_platforms=(platform,))
        assert "while" in lowered.as_text()
