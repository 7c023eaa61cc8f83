"""Penalties against loops in NumPy, closed forms and finite differences; through networks, under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import rnnjax
from rnnjax.backpropagation import BackpropagationSettings, loss_and_gradient
from rnnjax.models import RecurrentNetwork
from rnnjax.tasks import AddingTask

T, B, D, H = 9, 3, 2, 3
LENGTHS = np.array([9, 5, 0])
RESETS = np.zeros((T, B), bool)
RESETS[4, 0] = RESETS[2, 1] = True
OPTIONS = {"plain": {}, "controlled": {"lengths": LENGTHS, "resets": RESETS}}


def step(params, carry, inputs):
    hidden = jnp.tanh(params["recurrent"] @ carry + params["input"] @ inputs)
    return hidden, hidden


CELLS = {
    "tanh": rnnjax.VanillaCell(H),
    "relu": rnnjax.VanillaCell(H, activation="relu"),
    "leaky": rnnjax.LeakyCell(H),
    "skip": rnnjax.SkipCell(H, span=2),
    "gru": rnnjax.GRUCell(H),
    "lstm": rnnjax.LSTMCell(H),
    "step": rnnjax.StepCell(step, jnp.full(H, 0.1)),
}
PENALTIES = {
    "vanishing": rnnjax.VanishingGradientPenalty(),
    "flossing": rnnjax.GradientFlossing(num_exponents=2, num_sequences=3),
}


def random_like(tree, seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.7, dtype), tree)


def arrays(name):
    """A cell, its weights, inputs and hidden gradients, in float64."""
    cell = CELLS[name]
    params = {"recurrent": np.empty((H, H)), "input": np.empty((H, D))}
    if name == "step":
        cell = rnnjax.StepCell(step, jnp.full(H, 0.1, jnp.float64))
    else:
        params = jax.eval_shape(lambda: cell.init(jax.random.key(0), D))
    errors = random_like(cell.initialize_carry((T, B)), 4)
    return cell, random_like(params, 1), random_like(np.empty((T, B, D)), 2), errors


@pytest.mark.parametrize(("name", "kind"), [("tanh", "plain"), *((name, "controlled") for name in CELLS)])
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_gradients_equal_finite_differences(penalty, name, kind):
    with jax.enable_x64(True):
        cell, params, inputs, errors = arrays(name)
        flat, unravel = ravel_pytree(params)
        direction = jnp.asarray(np.random.default_rng(3).normal(size=flat.shape))

        @jax.jit
        def along(size):
            return penalty(cell, unravel(flat + size * direction), inputs, hidden_gradients=errors, **OPTIONS[kind])

        value, derivative = jax.value_and_grad(along)(0.0)
        value, derivative, above, below = (float(x) for x in (value, derivative, along(1e-6), along(-1e-6)))
    assert value > 0 and abs(derivative) > 1e-5
    np.testing.assert_allclose(derivative, (above - below) / 2e-6, rtol=1e-6, atol=1e-8)


def counted(kind, sequence):
    """The steps that count, after the first, of one sequence."""
    length = LENGTHS[sequence] if kind == "controlled" else T
    return [t for t in range(1, length) if kind == "plain" or not RESETS[t, sequence]]


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("name", ["tanh", "lstm"])
def test_vanishing_gradient_penalty_is_the_mean_over_the_steps_that_count(name, kind):
    with jax.enable_x64(True):
        cell, params, inputs, errors = arrays(name)
        found = rnnjax.VanishingGradientPenalty(weight=3.0)(
            cell, params, inputs, hidden_gradients=errors, **OPTIONS[kind]
        )
        path = rnnjax.trajectory(cell, params, inputs, **OPTIONS[kind])
        jacobians = np.asarray(rnnjax.autodiff_step_jacobians(cell, params, path))
        errors = np.concatenate(jax.tree.leaves(errors), axis=-1)
    terms = []
    for sequence in range(B):
        for t in counted(kind, sequence):
            back = jacobians[t, sequence].T @ errors[t, sequence]
            terms.append((back @ back / (errors[t, sequence] @ errors[t, sequence]) - 1) ** 2)
    np.testing.assert_allclose(found, 3 * np.mean(terms), rtol=1e-12)


def test_tiny_gradients_do_not_count_and_their_length_does_not_matter():
    cell, penalty = rnnjax.VanillaCell(H), rnnjax.VanishingGradientPenalty(weight=1.0, smallest=1e-10)
    params, inputs = cell.init(jax.random.key(0), D), jax.random.normal(jax.random.key(1), (T, D))
    errors = jax.random.normal(jax.random.key(2), (T, H))
    whole = penalty(cell, params, inputs, hidden_gradients=errors)
    unbounded = rnnjax.VanishingGradientPenalty(weight=1.0, smallest=0)
    scaled = unbounded(cell, params, inputs, hidden_gradients=errors * 1e-36)
    np.testing.assert_allclose(scaled, whole, rtol=1e-5)
    assert penalty(cell, params, inputs, hidden_gradients=errors * 1e-12) == 0
    later = penalty(cell, params, inputs, hidden_gradients=errors.at[:5].multiply(1e-12))
    carry = rnnjax.trajectory(cell, params, inputs).carries[4]
    np.testing.assert_allclose(later, penalty(cell, params, inputs[4:], carry, hidden_gradients=errors[4:]), rtol=1e-4)


@pytest.mark.parametrize("kind", OPTIONS)
def test_flossing_takes_the_exponents_of_a_qr_at_every_step(kind):
    """The same directions carried along by NumPy's QR; a reset starts them anew and does not count."""
    with jax.enable_x64(True):
        cell, params, inputs, _ = arrays("gru")
        penalty = rnnjax.GradientFlossing(weight=2.0, num_exponents=2, target=-0.3, num_sequences=3, seed=5)
        found = penalty(cell, params, inputs, **OPTIONS[kind])
        path = rnnjax.trajectory(cell, params, inputs, **OPTIONS[kind])
        jacobians = np.asarray(rnnjax.autodiff_step_jacobians(cell, params, path))
        start = np.asarray(jnp.linalg.qr(jax.random.normal(jax.random.key(5), (H, 2), jnp.float64))[0])
    terms = []
    for sequence in range(B):
        frame, total, number = start, np.zeros(2), 0
        for t in range(LENGTHS[sequence] if kind == "controlled" else T):
            if kind == "controlled" and RESETS[t, sequence]:
                frame = start
                continue
            frame, triangle = np.linalg.qr(jacobians[t, sequence] @ frame)
            total, number = total + np.log(abs(np.diag(triangle))), number + 1
        terms += [(x / number + 0.3) ** 2 for x in total] if number else []
    np.testing.assert_allclose(found, 2 * np.mean(terms), rtol=1e-9)


@pytest.mark.parametrize(("bias", "dtype"), [(23.0, "float32"), (40.0, "float32"), (190.0, "float64")])
def test_flossing_of_saturated_units_counts_directions_whose_squares_underflow(bias, dtype):
    with jax.enable_x64(dtype == "float64"):
        cell, inputs = rnnjax.VanillaCell(4), jnp.zeros((20, 1), dtype)
        params = cell.init(jax.random.key(0), 1, dtype)
        params = params.replace(bias=bias + jnp.arange(4, dtype=dtype)[None] / 10)
        penalty = rnnjax.GradientFlossing(num_exponents=2)
        found, gradient = jax.value_and_grad(lambda params: penalty(cell, params, inputs))(params)
        jacobians = rnnjax.step_jacobians(cell, params, rnnjax.trajectory(cell, params, inputs))
        frame = np.linalg.qr(np.asarray(jax.random.normal(jax.random.key(0), (4, 2), dtype), float))[0]
    logs = []
    for jacobian in np.asarray(jacobians, float):
        frame, triangle = np.linalg.qr(jacobian / abs(jacobian).max() @ frame)
        logs.append(np.log(abs(np.diag(triangle))) + np.log(abs(jacobian).max()))
    np.testing.assert_allclose(found, np.mean(np.mean(logs, axis=0) ** 2), rtol=1e-5)
    # log R falls by 2 for each unit of a bias at most: −2 · λ · 2 is the sum over the units at most.
    assert 0 < np.asarray(gradient.bias).sum() <= -4 * np.mean(logs) * 1.1


def test_lost_directions_do_not_count_and_leave_gradients_finite():
    """ReLUs that are dead: of three directions one survives, at the exponent ln ½."""
    cell = rnnjax.VanillaCell(3, activation="relu", recurrent_initializer=rnnjax.initializers.Identity(0.5))
    params = cell.init(jax.random.key(0), 1).replace(bias=jnp.array([[1.0, -9.0, -9.0]]))
    penalty = rnnjax.GradientFlossing(weight=1.0, num_exponents=3)
    value, gradient = jax.value_and_grad(lambda params: penalty(cell, params, jnp.zeros((40, 1))))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    # After the first step, in which three directions become one, each step multiplies it by ½.
    np.testing.assert_allclose(np.sqrt(value), np.log(2), rtol=0.1)


@pytest.mark.parametrize("kind", PENALTIES)
def test_penalties_of_all_layers_join_the_gradient_of_a_network(kind):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        task = AddingTask(sequence_length=6)
        network = RecurrentNetwork(
            rnnjax.LSTMCell(H), 1, num_layers=2, input_size=2, dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        graph, params = nnx.split(network)
        batch = task.batch(0, 0, B)
        settings = BackpropagationSettings(penalty=PENALTIES[kind])
        scores, gradient, hidden = jax.jit(lambda p: loss_and_gradient(graph, task, settings, p, batch))(params)
        plain = BackpropagationSettings()
        _, task_gradient, _ = jax.jit(lambda p: loss_and_gradient(graph, task, plain, p, batch))(params)
        flat, unravel = ravel_pytree(params)
        direction = jnp.asarray(np.random.default_rng(3).normal(size=flat.shape))

        @jax.jit
        def along(size):
            views = nnx.merge(graph, unravel(flat + size * direction)).layer_views(batch.inputs)
            pairs = zip(views, hidden or [None, None], strict=True)
            return sum(PENALTIES[kind](v.cell, v.params, v.inputs, hidden_gradients=d) for v, d in pairs)

        at, above, below = (float(along(size)) for size in (0.0, 1e-5, -1e-5))
        own = float((ravel_pytree(gradient)[0] - ravel_pytree(task_gradient)[0]) @ direction)
    np.testing.assert_allclose(scores["penalty"], at, rtol=1e-5)
    np.testing.assert_allclose(own, (above - below) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rnnjax.VanishingGradientPenalty(weight=0), "weight must be a positive finite number, got 0"),
        (lambda: rnnjax.VanishingGradientPenalty(smallest=-1), r"smallest must be a number in \[0, inf\], got -1"),
        (lambda: rnnjax.GradientFlossing(num_exponents=0), "num_exponents must be a positive integer, got 0"),
        (lambda: rnnjax.GradientFlossing(target=np.nan), "target must be a number in .*, got nan"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_arguments_are_named():
    cell = rnnjax.VanillaCell(H)
    params = cell.init(jax.random.key(0), D)
    with pytest.raises(ValueError, match=r"hidden_gradients must have shape \(9, 3\), got \(8, 3\)"):
        rnnjax.VanishingGradientPenalty()(cell, params, jnp.ones((T, D)), hidden_gradients=jnp.ones((T - 1, H)))
    with pytest.raises(ValueError, match=r"num_exponents must be a whole number in \[1, 3\], got 4"):
        rnnjax.GradientFlossing(num_exponents=4)(cell, params, jnp.ones((T, D)))
    bad = jnp.ones((T, 5, D))
    for options, message in (
        ({"lengths": [1, 2, 3, 1, T + 1]}, "lengths"),  # of a sequence that would not be taken
        ({"lengths": [1, 2, 3, 1, 2, 2]}, "lengths"),
        ({"resets": [[True] * 4] * T}, r"resets must have shape \(9, 5\), got \(9, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            rnnjax.GradientFlossing(num_exponents=2)(cell, params, bad, **options)
    listed = rnnjax.GradientFlossing(num_exponents=2)(cell, params, bad, resets=[[False] * 5] * T)
    assert listed == rnnjax.GradientFlossing(num_exponents=2)(cell, params, bad, resets=jnp.zeros((T, 5), bool))
