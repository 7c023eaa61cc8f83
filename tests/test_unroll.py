"""Unrolling against a plain Python loop over ``apply``, one sequence at a time, differentiated by autodiff."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnjax
from rnnjax import testing
from rnnjax.unroll import unroll

T, B, D, H = 4, 2, 2, 3


def normalized_step(params, carry, inputs):
    """A step that is not affine: layer normalisation inside, a nested carry, an output of its own."""
    a = params["kernel"] @ carry["hidden"] + params["inputs"] @ inputs
    hidden = jnp.tanh((a - a.mean()) / jnp.sqrt(a.var() + 0.1))
    return {"hidden": hidden, "trace": 0.5 * carry["trace"] + hidden.sum()}, hidden * carry["trace"]


@dataclasses.dataclass(frozen=True)
class LiveCell(rnnjax.LSTMCell):
    """A cell that starts, also after a reset, from a carry that is not zero."""

    def initialize_carry(self, batch_shape=(), dtype=jnp.float32):
        shape = (*batch_shape, self.hidden_size)
        return jnp.full(shape, 0.4, dtype), jnp.full(shape, -0.7, dtype)


CELLS = {
    "vanilla": rnnjax.VanillaCell(H),
    "leaky": rnnjax.LeakyCell(H, leak=0.4),
    "gru": rnnjax.GRUCell(H),
    "lstm": rnnjax.LSTMCell(H),
    "live": LiveCell(H),
    "step": rnnjax.StepCell(normalized_step, {"hidden": jnp.full(H, 0.1), "trace": jnp.ones(())}),
}
LENGTHS = np.array([0, 3])
RESETS = np.array([[0, 1], [1, 0], [0, 1], [1, 1]], bool)
OPTIONS = [
    {"lengths": lengths, "resets": resets, "truncation": truncation, "reverse": reverse}
    for lengths in (None, LENGTHS)
    for resets in (None, RESETS)
    for truncation in (None, 2)
    for reverse in (False, True)
]


def random_like(tree, seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.7, dtype), tree)


def arrays(name, batch_shape, dtype=np.float64):
    """A cell, its random weights, inputs and initial carry."""
    cell = CELLS[name]
    if name == "step":
        params = {"kernel": jnp.zeros((H, H)), "inputs": jnp.zeros((H, D))}
        example = jax.tree.map(lambda leaf: leaf.astype(dtype), cell.example_carry)
        cell = rnnjax.StepCell(normalized_step, example)
    else:
        params = jax.eval_shape(lambda: cell.init(jax.random.key(0), D))
    inputs = random_like(np.empty((T, *batch_shape, D)), 1, dtype)
    carry = random_like(cell.initialize_carry(batch_shape), 2, dtype)
    return cell, random_like(params, 3, dtype), inputs, carry


def plain_loop(cell, params, inputs, carry, resets=None, truncation=None, reverse=False):
    """One sequence, ``inputs`` ``[T, D]``. Returns the final carry and a list of T outputs."""
    outputs = [None] * len(inputs)
    for position, t in enumerate(reversed(range(len(inputs))) if reverse else range(len(inputs))):
        if resets is not None and resets[t]:
            carry = cell.initialize_carry((), inputs.dtype)
        if truncation is not None and position % truncation == 0:
            carry = jax.lax.stop_gradient(carry)
        carry, outputs[t] = cell.apply(params, carry, inputs[t])
    return carry, outputs


def looped(cell, params, inputs, carry, lengths=None, resets=None, **options):
    """``plain_loop`` over each sequence of a batch as if its padding did not exist."""
    carries, outputs = [], []
    for b in range(B):
        steps = slice(None if lengths is None else lengths[b])
        own = jax.tree.map(lambda leaf, b=b: leaf[b], carry)
        own_resets = None if resets is None else resets[steps, b]
        final, output = plain_loop(cell, params, inputs[steps, b], own, own_resets, **options)
        carries.append(final)
        outputs.append(jnp.stack(output + [jnp.zeros(H)] * (T - len(output))))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *carries), jnp.stack(outputs, axis=1)


def weighted_sum(tree):
    """A scalar that depends on every entry differently."""
    weights = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), tree)
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, weights, tree)))


def value_and_gradients(run, cell, *differentiated, **options):
    def scalar(*arguments):
        result = run(cell, *arguments, **options)
        return weighted_sum(result), result

    (_, result), gradients = jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True)(*differentiated)
    return result, gradients


def assert_trees_close(actual, expected, tolerance=1e-12):
    chex.assert_trees_all_equal_structs(actual, expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def label(value):
    if isinstance(value, str):
        return value
    return "-".join(name for name, setting in value.items() if setting is not None and setting is not False) or "plain"


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in ("lstm", "live") for options in OPTIONS]
    + [(name, options) for name in CELLS if name not in ("lstm", "live") for options in (OPTIONS[0], OPTIONS[-1])],
    ids=label,
)
def test_values_and_gradients_are_those_of_a_plain_loop(name, options):
    with jax.enable_x64(True):
        cell, *differentiated = arrays(name, (B,))
        result, gradients = value_and_gradients(unroll, cell, *differentiated, **options)
        expected, expected_gradients = value_and_gradients(looped, cell, *differentiated, **options)
        assert_trees_close(result, expected)
        assert_trees_close(gradients, expected_gradients)


@pytest.mark.parametrize(("name", "dtype"), [("lstm", "float32"), ("step", "float64")], indirect=["dtype"])
def test_batch_axes_are_independent_sequences(name, dtype):
    cell, params, inputs, carry = arrays(name, (2, 3), dtype)
    lengths, resets = np.array([[0, 1, 2], [3, 4, 4]]), np.arange(T * 6).reshape(T, 2, 3) % 4 == 1
    options = {"truncation": 2, "reverse": True}
    final, outputs = unroll(cell, params, inputs, carry, lengths=lengths, resets=resets, **options)

    def one(inputs, carry, lengths, resets):
        return unroll(cell, params, inputs, carry, lengths=lengths, resets=resets, **options)

    axes = {"in_axes": (1, 0, 0, 1), "out_axes": (0, 1)}
    expected = jax.vmap(jax.vmap(one, **axes), **axes)(inputs, carry, jnp.asarray(lengths), jnp.asarray(resets))
    assert_trees_close((final, outputs), expected, testing.rounding_tolerance(dtype, 40))
    alone = one(inputs[:, 1, 0], jax.tree.map(lambda leaf: leaf[1, 0], carry), 3, resets[:, 1, 0])
    expected = jax.tree.map(lambda leaf: leaf[1, 0], final), outputs[:, 1, 0]
    assert_trees_close(alone, expected, testing.rounding_tolerance(dtype, 40))


def test_gradients_are_exactly_zero_past_the_length_whatever_the_padding_holds():
    cell, params, inputs, carry = arrays("lstm", (B,), np.float32)
    padding = np.arange(T)[:, None] >= LENGTHS

    def loss(params, inputs):
        return weighted_sum(unroll(cell, params, inputs, carry, lengths=LENGTHS))

    clean = jax.grad(loss, argnums=(0, 1))(params, inputs)
    for filler in (np.nan, np.inf, 1e30):
        spoilt = jnp.where(padding[..., None], filler, inputs)
        gradients = jax.grad(loss, argnums=(0, 1))(params, spoilt)
        assert not np.asarray(gradients[1])[padding].any()
        np.testing.assert_array_equal(loss(params, spoilt), loss(params, inputs))
        assert_trees_close(gradients, clean, 1e-6)
    assert np.asarray(clean[1])[~padding].all()
    none_at_all = jax.grad(lambda p: weighted_sum(unroll(cell, p, inputs, carry, lengths=np.zeros(B, int))))(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(none_at_all))


@pytest.mark.parametrize("reverse", [False, True])
def test_truncation_cuts_gradients_at_window_starts_alone(reverse):
    cell, params, inputs, carry = arrays("gru", (), np.float32)

    def input_jacobian(truncation):  # [t, k] = ‖d output_t / d input_k‖
        run = lambda x: unroll(cell, params, x, carry, truncation=truncation, reverse=reverse)[1]  # noqa: E731
        return np.linalg.norm(jax.jacrev(run)(inputs), axis=(1, 3)), run(inputs)

    full, states = input_jacobian(None)
    cut, same_states = input_jacobian(2)
    position = np.arange(T)[::-1] if reverse else np.arange(T)
    same_window = position[:, None] // 2 == position[None, :] // 2
    causal = position[:, None] >= position[None, :]
    np.testing.assert_array_equal(states, same_states)
    assert not cut[~same_window].any()
    assert not full[~causal].any()
    assert full[causal].all()
    np.testing.assert_allclose(cut[same_window], full[same_window], rtol=1e-6)


def test_perturbations_have_the_hidden_gradients():
    with jax.enable_x64(True):
        cell, params, inputs, carry = arrays("lstm", (B,))
        zeros = jnp.zeros((T, B, H))

        def loss(perturbations=None):
            _, outputs = unroll(cell, params, inputs, carry, lengths=LENGTHS, perturbations=perturbations)
            return jnp.sum(jnp.sin(outputs))

        def rerun(step, nudge):
            """The loss of sequence 1 when h is moved by ``nudge`` after ``step``, by a loop in Python."""
            state, total = jax.tree.map(lambda leaf: leaf[1], carry), 0.0
            for t in range(LENGTHS[1]):
                state, output = cell.apply(params, state, inputs[t, 1])
                if t == step:
                    output = output + nudge
                    state = (output, state[1])
                total += np.sin(np.asarray(output, np.float64)).sum()
            return total

        gradients = jax.grad(loss)(zeros)
        assert not gradients[:, 0].any()
        assert not gradients[LENGTHS[1] :].any()
        assert loss(zeros) == loss()
        for step in range(LENGTHS[1]):
            for unit in range(H):
                nudge = 1e-6 * jnp.eye(H)[unit]
                slope = (rerun(step, nudge) - rerun(step, -nudge)) / 2e-6
                assert gradients[step, 1, unit] == pytest.approx(slope, rel=1e-7, abs=1e-9)


def test_gradients_agree_with_finite_differences_and_forward_mode():
    with jax.enable_x64(True):
        cell, params, inputs, carry = arrays("gru", (B,))

        def loss(arguments):
            return weighted_sum(unroll(cell, *arguments, resets=RESETS))

        at = (params, inputs, carry)
        direction = random_like(at, 9)
        by_reverse = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(loss)(at), direction)))
        by_forward = jax.jvp(loss, (at,), (direction,))[1]
        moved = [jax.tree.map(lambda a, d, s=s: a + s * 1e-6 * d, at, direction) for s in (1, -1)]
        assert by_reverse == pytest.approx(float(by_forward), rel=1e-12)
        assert by_reverse == pytest.approx(float(loss(moved[0]) - loss(moved[1])) / 2e-6, rel=1e-7)


@dataclasses.dataclass(frozen=True)
class ScatteredCell(rnnjax.VanillaCell):
    """Each unit of each sequence starts elsewhere."""

    def initialize_carry(self, batch_shape=(), dtype=jnp.float32):
        return jax.random.normal(jax.random.key(3), (*batch_shape, self.hidden_size), dtype)


def test_steps_after_a_reset_start_from_the_carry_that_the_scan_starts_them_from():
    cell = ScatteredCell(H)
    params = cell.init(jax.random.key(0), D)
    path = rnnjax.trajectory(cell, params, jnp.ones((T, B, D)), resets=RESETS)
    expected = np.where(RESETS[..., None], cell.initialize_carry((B,)), path.carries[:-1])
    np.testing.assert_array_equal(path.starts(cell), expected)


def test_each_part_of_a_carry_keeps_its_dtype_where_it_is_reset():
    example = (jnp.array(0, jnp.int32), jnp.array([0.5, 0.25], jnp.bfloat16))
    cell = rnnjax.StepCell(lambda params, c, x: ((c[0] + 1, (params * c[1]).astype(jnp.bfloat16)), c[1]), example)
    path = rnnjax.trajectory(cell, jnp.ones((), jnp.bfloat16), jnp.ones((3, 1)), resets=np.arange(3) == 2)
    count, values = path.starts(cell)
    assert (count.dtype, values.dtype) == (jnp.int32, jnp.bfloat16)
    np.testing.assert_array_equal(count, [0, 1, 0])
    np.testing.assert_array_equal(values[2].astype(np.float32), [0.5, 0.25])


@pytest.mark.parametrize("name", ["vanilla", "gru", "lstm"])
def test_a_batch_of_no_sequence_has_no_gradient(name):
    cell, params, inputs, _ = arrays(name, (0,), np.float32)

    def loss(params, inputs):
        return unroll(cell, params, inputs)[1].sum()

    assert jax.tree.all(jax.tree.map(lambda g: not g.any(), jax.grad(loss, argnums=(0, 1))(params, inputs)))


def test_unroll_does_not_retrace_and_works_under_jit(monkeypatch):
    chex.clear_trace_counter()
    _, params, inputs, carry = arrays("leaky", (B,), np.float32)
    once = chex.assert_max_traces(lambda cell, *rest: unroll(cell, *rest, lengths=LENGTHS)[1], 1)
    run = jax.jit(once, static_argnums=0)
    first = run(rnnjax.LeakyCell(H, leak=0.4), params, inputs, carry)
    second = run(rnnjax.LeakyCell(H, leak=0.4), params, inputs, carry)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, unroll(CELLS["leaky"], params, inputs, carry, lengths=LENGTHS)[1])
    traced, original = [], rnnjax.LeakyCell.pointwise
    monkeypatch.setattr(rnnjax.LeakyCell, "pointwise", lambda *rest: traced.append(1) or original(*rest))
    for _ in range(3):  # Equal cells made anew share one compiled program.
        unroll(rnnjax.LeakyCell(H, leak=0.123), params, inputs, carry)
    assert len(traced) == 1


@pytest.mark.parametrize("name", ["gru", "lstm", "step"])
def test_trajectory_is_every_carry_that_unroll_passes(name, dtype):
    cell, params, inputs, carry = arrays(name, (B,), dtype)
    path = rnnjax.trajectory(cell, params, inputs, carry)
    final, outputs = unroll(cell, params, inputs, carry)
    tolerance = testing.rounding_tolerance(dtype, 40)
    assert_trees_close(jax.tree.map(lambda leaf: leaf[0], path.carries), carry, 1e-30)
    assert_trees_close(jax.tree.map(lambda leaf: leaf[-1], path.carries), final, tolerance)
    for step in range(T):
        before, after = (jax.tree.map(lambda leaf, s=s: leaf[s], path.carries) for s in (step, step + 1))
        if name == "step":
            expected = jax.vmap(cell.apply, in_axes=(None, 0, 0))(params, before, inputs[step])
        else:
            expected = cell.apply(params, before, inputs[step])
        assert_trees_close((after, outputs[step]), expected, tolerance)
    assert path.inputs is inputs
    default = rnnjax.trajectory(cell, params, inputs).carries
    assert_trees_close(jax.tree.map(lambda leaf: leaf[0], default), cell.initialize_carry((B,), dtype), 1e-30)


def spoil(array, index, value=np.nan):
    return jnp.asarray(array).at[index].set(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, x, c: ((p, x[:0], c), {}), r"inputs must have at least one time step, got shape \(0, 2, 2\)"),
        (lambda p, x, c: ((p, x[..., :1], c), {}), r"inputs must be time-major with shape \[T, ..., 2\], got shape"),
        (lambda p, x, c: ((p, [[1.0, 2.0]], c), {}), "inputs must be an array, got list"),
        (lambda p, x, c: ((p, spoil(x, (2, 1, 0)), c), {}), r"inputs must be finite, got inputs\[2, 1, 0\] = nan"),
        (lambda p, x, c: ((p.replace(bias=spoil(p.bias, (1, 2), np.inf)), x, c), {}), r"params.bias\[1, 2\] = inf"),
        (lambda p, x, c: ((p, x, spoil(c, (0, 0))), {}), r"carry must be finite, got carry\[0, 0\] = nan"),
        (lambda p, x, c: ((p, x, c[:1]), {}), r"carry must have shape \(2, 3\), got \(1, 3\)"),
        (lambda p, x, c: ((p.replace(recurrent_kernel=p.bias), x, c), {}), r"params.recurrent_kernel must have shape"),
        (lambda p, x, c: (({"w": p.bias}, x, c), {}), "params must be CellParams as GRUCell.init makes them"),
        (lambda p, x, c: ((p, x, c), {"lengths": np.array([2, 5])}), r"lengths must lie in \[0, 4\].*got 5"),
        (lambda p, x, c: ((p, x, c), {"lengths": [-1, 0]}), r"lengths must lie in \[0, 4\].*got -1"),
        (lambda p, x, c: ((p, x, c), {"lengths": np.array([2])}), r"lengths must have shape \(2\), got \(1,\)"),
        (lambda p, x, c: ((p, x, c), {"resets": RESETS[0]}), r"resets must have shape \(4, 2\), got \(2,\)"),
        (lambda p, x, c: ((p, x, c), {"truncation": 0}), "truncation must be a positive integer, got 0"),
        (lambda p, x, c: ((p, x, c), {"perturbations": x[..., :1]}), r"perturbations must have shape \(4, 2, 3\)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    _, *rest = arrays("gru", (B,), np.float32)
    arguments, options = change(*rest)
    with pytest.raises(ValueError, match=message):
        unroll(CELLS["gru"], *arguments, **options)


def test_a_state_that_overflows_is_an_error_with_its_step():
    cell = rnnjax.VanillaCell(1, activation="identity")
    params = cell.init(jax.random.key(0), 1).replace(recurrent_kernel=jnp.full((1, 1, 1), 1e20))
    # h = 1, 1e20, 1e40: the second state is beyond float32.
    with pytest.raises(ValueError, match="state must be finite, got a NaN or an overflow at time step 1"):
        rnnjax.trajectory(cell, params, jnp.ones((5, 1)), jnp.ones(1))
