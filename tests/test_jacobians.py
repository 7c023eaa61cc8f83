"""Step Jacobians: structured against full autodiff, finite differences and closed forms."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import rnnjax
from rnnjax import testing
from rnnjax.activations import ACTIVATIONS
from rnnjax.jacobians import jacobian_operator
from rnnjax.operators import DenseJacobians

T, D, H = 4, 2, 5

GATED = {
    "leaky": rnnjax.LeakyCell(H, leak=0.3),
    "skip": rnnjax.SkipCell(H, span=3, skip=0.6),
    "gru": rnnjax.GRUCell(H),
    "lstm": rnnjax.LSTMCell(H),
}
CELLS = {f"vanilla {name}": rnnjax.VanillaCell(H, activation=name) for name in ACTIVATIONS} | GATED
CASES = [(name, (2, 3)) for name in CELLS] + [("gru", ()), ("lstm", ()), ("lstm", (3,))]


def random_like(tree, seed, dtype, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * scale, dtype), tree)


@functools.cache
def path(name, batch_shape, dtype, scale=0.7):
    """A cell, its random weights (biases too) and a trajectory from a random state."""
    cell = CELLS[name]
    params = random_like(jax.eval_shape(lambda: cell.init(jax.random.key(0), D)), 1, dtype, scale)
    inputs = random_like(np.empty((T, *batch_shape, D)), 2, dtype)
    carry = random_like(cell.initialize_carry(batch_shape), 3, dtype)
    return cell, params, rnnjax.trajectory(cell, params, inputs, carry)


def flat(carry):
    return jnp.concatenate(jax.tree.leaves(carry), axis=-1)


def from_flat(cell, state):
    parts = tuple(jnp.split(state, cell.num_carries, axis=-1))
    return parts if cell.num_carries > 1 else parts[0]


def differences(function, state, step=1e-5):
    """Jacobian of ``function`` ``[..., S] -> [..., S]`` by central differences of fourth order, at one state."""
    steps = step * jnp.eye(state.shape[-1])
    near = function(state[None] + steps) - function(state[None] - steps)
    far = function(state[None] + 2 * steps) - function(state[None] - 2 * steps)
    return np.asarray((8 * near - far) / (12 * step)).T


def relative_error(actual, expected):
    return np.max(np.abs(np.asarray(actual) - np.asarray(expected))) / np.max(np.abs(np.asarray(expected)))


@pytest.mark.parametrize(("name", "batch_shape"), CASES)
def test_structured_equals_full_autodiff(name, batch_shape, dtype):
    cell, params, trajectory = path(name, batch_shape, dtype)
    jacobians = rnnjax.step_jacobians(cell, params, trajectory)
    expected = rnnjax.autodiff_step_jacobians(cell, params, trajectory)
    size = H * cell.num_carries
    assert jacobians.shape == (T, *batch_shape, size, size)
    assert jacobians.dtype == dtype
    assert np.abs(expected).max() > 0.01
    assert relative_error(jacobians, expected) < {"float32": 1e-6, "float64": 1e-12}[dtype.name]


@pytest.mark.parametrize("name", CELLS)
def test_jacobians_equal_finite_differences_of_apply(name):
    with jax.enable_x64(True):
        cell, params, trajectory = path(name, (2, 3), jnp.dtype("float64"))
        jacobians = rnnjax.step_jacobians(cell, params, trajectory)
        for index in [(0, 0, 0), (T - 1, 1, 2)]:
            state = flat(jax.tree.map(lambda leaf, i=index: leaf[i], trajectory.carries))

            def advance(states, x=trajectory.inputs[index]):
                x = jnp.broadcast_to(x, (len(states), D))
                return flat(cell.apply(params, from_flat(cell, states), x)[0])

            np.testing.assert_allclose(jacobians[index], differences(advance, state), atol=1e-9)


@pytest.mark.parametrize(("name", "batch_shape"), [("leaky", (2, 3)), ("gru", ()), ("lstm", (2, 3))])
def test_products_with_vectors_equal_those_of_the_dense_matrix(name, batch_shape, dtype):
    cell, params, trajectory = path(name, batch_shape, dtype)
    operator = jax.jit(jacobian_operator)(cell, params, trajectory)
    dense = np.asarray(rnnjax.autodiff_step_jacobians(cell, params, trajectory))
    columns = random_like(np.empty((T, *batch_shape, dense.shape[-1], 2)), 5, dtype)
    close = functools.partial(np.testing.assert_allclose, atol=testing.rounding_tolerance(dtype, 60))
    assert isinstance(operator, rnnjax.StructuredJacobians)
    assert (operator.shape, operator.dtype) == (dense.shape, dtype)
    tall = np.asarray(columns)

    @jax.jit
    def applied(operator, columns):
        one = operator.at_step(2)
        return operator.times(columns), operator.transpose_times(columns), one.times(columns[2]), one.dense()

    for form in (operator, DenseJacobians(jnp.asarray(dense))):
        times, transpose_times, one_times, one = applied(form, columns)
        close(times, dense @ tall)
        close(transpose_times, np.swapaxes(dense, -1, -2) @ tall)
        close(one_times, dense[2] @ tall[2])
        close(one, dense[2])


@pytest.mark.parametrize(("name", "batch_shape"), [("vanilla tanh", (2, 3)), ("leaky", ()), ("leaky", (2, 3))])
def test_columns_may_be_multiplied_as_rows(name, batch_shape, dtype):
    cell, params, trajectory = path(name, batch_shape, dtype)
    operator = jacobian_operator(cell, params, trajectory)
    dense = np.asarray(rnnjax.autodiff_step_jacobians(cell, params, trajectory))
    rows = random_like(np.empty((T, *batch_shape, 2, dense.shape[-1])), 5, dtype)
    close = functools.partial(np.testing.assert_allclose, atol=testing.rounding_tolerance(dtype, 60))
    close(operator.times_rows(rows), np.asarray(rows) @ np.swapaxes(dense, -1, -2))
    close(operator.times_rows(rows, transposed=True), np.asarray(rows) @ dense)


@pytest.mark.parametrize(
    ("name", "possible"), [("vanilla tanh", True), ("leaky", True), ("gru", False), ("lstm", False)]
)
def test_only_cells_of_one_gate_take_rows_and_only_few(name, possible, dtype):
    operator = jacobian_operator(*path(name, (), dtype))
    assert operator.takes_rows(3) == possible and not operator.takes_rows(200)


def coupled_step(params, carry, inputs):
    """Not affine: each new part depends on the whole of the other, and the parts differ in size."""
    a = jnp.tanh(params["a"] @ carry["b"] + inputs)
    return {"a": a, "b": carry["b"] * jnp.sin(params["b"] @ carry["a"])}, a


@pytest.mark.parametrize("batch_shape", [(), (2, 3)])
def test_any_step_function_has_the_jacobian_of_its_flattened_carry(batch_shape, dtype):
    params = random_like({"a": np.empty((2, 3)), "b": np.empty((3, 2))}, 0, dtype)
    cell = rnnjax.StepCell(coupled_step, {"a": jnp.full(2, 0.2, dtype), "b": jnp.full(3, 0.4, dtype)})
    trajectory = rnnjax.trajectory(cell, params, random_like(np.empty((T, *batch_shape, 2)), 1, dtype))
    jacobians = np.asarray(rnnjax.step_jacobians(cell, params, trajectory))
    assert jacobians.shape == (T, *batch_shape, 5, 5)
    before = jax.tree.map(lambda leaf: np.asarray(leaf[:-1], np.float64), trajectory.carries)
    w, v = np.asarray(params["a"], np.float64), np.asarray(params["b"], np.float64)
    slope = 1 / np.cosh(before["b"] @ w.T + np.asarray(trajectory.inputs)) ** 2
    angle = before["a"] @ v.T
    expected = np.zeros(jacobians.shape)
    expected[..., :2, 2:] = slope[..., None] * w
    expected[..., 2:, :2] = (before["b"] * np.cos(angle))[..., None] * v
    expected[..., 2:, 2:] = np.sin(angle)[..., None] * np.eye(3)
    np.testing.assert_allclose(jacobians, expected, atol=testing.rounding_tolerance(dtype, 60))
    operator = jacobian_operator(cell, params, trajectory)
    limit = testing.rounding_tolerance(dtype, 60)
    np.testing.assert_allclose(operator.dense(), expected, atol=limit)
    vectors = random_like(np.empty((T, *batch_shape, 5, 2)), 3, dtype)
    for product, matrices in ((operator.times, expected), (operator.transpose_times, np.swapaxes(expected, -1, -2))):
        np.testing.assert_allclose(product(vectors), matrices @ np.asarray(vectors, np.float64), atol=limit)


def test_rows_are_states_after_and_products_run_backwards_in_time():
    """J_2 J_1, and no other order or transpose, is the derivative of two steps."""
    with jax.enable_x64(True):
        cell, params, trajectory = path("vanilla tanh", (), jnp.dtype("float64"))
        first, second = np.asarray(rnnjax.step_jacobians(cell, params, trajectory))[:2]

        def two_steps(states):
            for x in trajectory.inputs[:2]:
                states = cell.apply(params, states, jnp.broadcast_to(x, (len(states), D)))[1]
            return states

        exact = differences(two_steps, trajectory.carries[0])
        np.testing.assert_allclose(second @ first, exact, atol=1e-9)
        for wrong in (first @ second, first.T @ second.T, second.T @ first.T):
            assert np.abs(wrong - exact).max() > 0.05


def test_saturated_rows_keep_their_relative_accuracy():
    cell = rnnjax.VanillaCell(3)
    params = random_like(cell.init(jax.random.key(0), 1), 4, np.float32)
    params = params.replace(bias=jnp.array([[12.0, -25.0, 38.0]]))
    carry, inputs = jnp.array([0.3, -0.2, 0.1]), jnp.zeros((1, 1))
    jacobian = rnnjax.step_jacobians(cell, params, rnnjax.trajectory(cell, params, inputs, carry))[0]
    kernel = np.asarray(params.recurrent_kernel[:, 0], np.float64)
    preactivation = np.asarray(carry, np.float64) @ kernel + np.asarray(params.bias[0], np.float64)
    slopes = np.array([float(mpmath.sech(a) ** 2) for a in preactivation])
    # a itself is rounded to 4e-6 at 38, and the slope moves by twice that.
    np.testing.assert_allclose(jacobian, slopes[:, None] * kernel.T, rtol=2e-5)


def test_lstm_without_recurrence_has_rank_h_and_its_closed_form(dtype):
    cell, params, _ = path("lstm", (), dtype)
    params = params.replace(recurrent_kernel=jnp.zeros_like(params.recurrent_kernel))
    inputs = random_like(np.empty((6, D)), 8, dtype)
    trajectory = rnnjax.trajectory(cell, params, inputs)
    sigma = rnnjax.log_singular_values(rnnjax.factor_product(rnnjax.step_jacobians(cell, params, trajectory)))
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, inputs, trajectory.carries[1]))
    gate = [wide[1] @ wide[0].input_kernel[:, g] + wide[0].bias[g] for g in range(4)]
    forget, output = 1 / (1 + np.exp(-gate[1])), 1 / (1 + np.exp(-gate[3][-1]))
    through_output = output / np.cosh(wide[2][-1]) ** 2
    exact = np.sort(np.log(forget).sum(0) + np.log1p(through_output**2) / 2)[::-1]
    np.testing.assert_allclose(sigma[:H], exact, rtol=testing.rounding_tolerance(dtype, 40))
    np.testing.assert_array_equal(sigma[H:], -np.inf)


def test_gru_without_recurrence_is_the_diagonal_of_its_update_gate(dtype):
    """The gates then depend on the inputs alone, recurrent biases included, so that J_t = diag(z_t) exactly."""
    cell, params, _ = path("gru", (), dtype)
    params = params.replace(recurrent_kernel=jnp.zeros_like(params.recurrent_kernel))
    inputs = random_like(np.empty((T, D)), 8, dtype)
    jacobians = np.asarray(rnnjax.step_jacobians(cell, params, rnnjax.trajectory(cell, params, inputs)))
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, inputs))
    a = wide[1] @ wide[0].input_kernel[:, 1] + wide[0].bias[1] + wide[0].recurrent_bias[1]
    for jacobian, update in zip(jacobians, 1 / (1 + np.exp(-a)), strict=True):
        np.testing.assert_allclose(np.diag(jacobian), update, rtol=testing.rounding_tolerance(dtype, 20))
        np.testing.assert_array_equal(jacobian[~np.eye(H, dtype=bool)], 0)


def test_scalar_tanh_at_its_fixed_point():
    """h = tanh(1.5 h) at h* = .85855964, where ln J = ln(1.5 (1 − h*²)) = −.93061020."""
    with jax.enable_x64(True):
        cell = rnnjax.VanillaCell(1)
        params = cell.init(jax.random.key(0), 1, jnp.float64).replace(recurrent_kernel=jnp.full((1, 1, 1), 1.5))
        fixed = float(mpmath.findroot(lambda h: mpmath.tanh(1.5 * h) - h, 0.86))
        trajectory = rnnjax.trajectory(cell, params, jnp.zeros((50, 1)), jnp.array([fixed]))
        jacobians = rnnjax.step_jacobians(cell, params, trajectory)
        assert fixed == pytest.approx(0.85855964, abs=5e-9)
        np.testing.assert_allclose(np.log(jacobians), -0.93061020, atol=5e-9)


@pytest.mark.parametrize("kernel", ["orthogonal", "diagonal"])
def test_linear_networks_have_the_jacobian_of_their_kernel(kernel, dtype):
    cell = rnnjax.VanillaCell(4, activation="identity")
    params = cell.init(jax.random.key(0), D, dtype)
    if kernel == "diagonal":
        params = params.replace(recurrent_kernel=jnp.diag(jnp.array([2.0, -0.5, 0.25, 1.5], dtype))[:, None])
    trajectory = rnnjax.trajectory(cell, params, jnp.ones((3, D), dtype))
    expected = np.broadcast_to(np.asarray(params.recurrent_kernel[:, 0]).T, (3, 4, 4))
    np.testing.assert_array_equal(rnnjax.step_jacobians(cell, params, trajectory), expected)


def test_narrow_states_are_differentiated_in_float32():
    cell, params, trajectory = path("lstm", (3,), jnp.dtype("bfloat16"))
    jacobians = rnnjax.step_jacobians(cell, params, trajectory)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, trajectory))
    assert jacobians.dtype == jnp.float32
    np.testing.assert_array_equal(jacobians, rnnjax.step_jacobians(cell, *wide))


def test_a_jacobian_that_is_not_finite_is_an_error_with_its_step():
    cell = rnnjax.VanillaCell(1, activation=jnp.sqrt)  # its slope is infinite at 0, where its value is not
    params = cell.init(jax.random.key(0), 1).replace(recurrent_kernel=jnp.ones((1, 1, 1)))
    trajectory = rnnjax.Trajectory(jnp.array([[16.0], [4.0], [2.0], [0.0], [0.0]]), jnp.zeros((4, 1)))
    with pytest.raises(ValueError, match="step Jacobian must be finite, got a NaN or an overflow at time step 3"):
        rnnjax.step_jacobians(cell, params, trajectory)


@pytest.mark.parametrize("name", ["lstm", "vanilla tanh", "step"])
def test_lengths_and_resets_are_in_the_jacobians(name):
    """Against differences of the whole unroll: where a carry stands still J = I, where it is reset J = 0."""
    if name != "step":
        cell, params, made = path(name, (2,), jnp.dtype("float32"))
    else:
        weights = random_like(np.empty((H, H)), 1, jnp.float32)
        cell, params = rnnjax.StepCell(lambda w, h, x: (jnp.tanh(w @ h + x.sum()), h), jnp.full(H, 0.1)), weights
        made = rnnjax.trajectory(cell, params, random_like(np.empty((T, 2, D)), 2, jnp.float32))
    options = {"lengths": np.array([T, 2]), "resets": np.array([[0, 0], [0, 0], [1, 0], [0, 0]], bool)}
    controlled = rnnjax.trajectory(cell, params, made.inputs, **options)
    jacobians = rnnjax.step_jacobians(cell, params, controlled)
    plain = rnnjax.step_jacobians(cell, params, made)
    size = cell.state_size
    np.testing.assert_array_equal(jacobians[2:, 1], np.broadcast_to(np.eye(size), (2, size, size)))
    np.testing.assert_array_equal(jacobians[2, 0], np.zeros((size, size)))
    if name == "step":
        np.testing.assert_array_equal(jacobians[:2], plain[:2])
    # After the reset the sequence goes on from the initial carry.
    after = rnnjax.trajectory(cell, params, made.inputs[2:, 0])
    for one, other in zip(jax.tree.leaves(controlled.carries), jax.tree.leaves(after.carries), strict=True):
        np.testing.assert_allclose(one[3:, 0], other[1:], atol=1e-6)
    np.testing.assert_allclose(jacobians[3, 0], rnnjax.step_jacobians(cell, params, after)[1], atol=1e-6)
    if name != "step":
        expected = rnnjax.autodiff_step_jacobians(cell, params, controlled)
        np.testing.assert_allclose(jacobians, expected, atol=1e-6)
    operator, columns = jacobian_operator(cell, params, controlled), random_like(jacobians, 3, jnp.float32)
    np.testing.assert_allclose(operator.times(columns), jacobians @ columns, atol=1e-5)
    np.testing.assert_allclose(operator.transpose_times(columns), jacobians.swapaxes(-1, -2) @ columns, atol=1e-5)


def test_a_carry_of_several_dtypes_has_jacobians():
    """Those of its numbers; a count has no derivative."""
    example = (jnp.array(0, jnp.int32), jnp.array([0.5, 0.25], jnp.bfloat16))
    cell = rnnjax.StepCell(lambda params, c, x: ((c[0] + 1, (params * c[1]).astype(jnp.bfloat16)), c[1]), example)
    params, inputs = jnp.asarray(2, jnp.bfloat16), jnp.ones((3, 1))
    with jax.numpy_dtype_promotion("standard"):  # the state is one vector
        jacobians = rnnjax.step_jacobians(cell, params, rnnjax.trajectory(cell, params, inputs))
    np.testing.assert_array_equal(np.asarray(jacobians, np.float32), np.broadcast_to(np.diag([0, 2, 2]), (3, 3, 3)))


def test_whole_numbers_in_a_carry_stay_as_they_are():
    """A random key and a count of more than 24 bits; float32 would hold neither."""

    def step(weights, carry, inputs):
        hidden, key, count = carry
        key, own = jax.random.split(key)
        drive = weights @ hidden + inputs + jax.random.normal(own, hidden.shape, hidden.dtype)
        after = jnp.tanh(drive) * jnp.where(count % 2 == 0, 1.0, 0.1).astype(hidden.dtype)
        return (after, key, count + 1), hidden

    example = (jnp.zeros(2), jax.random.PRNGKey(0), jnp.array(2**24, jnp.int32))
    cell, weights, inputs = rnnjax.StepCell(step, example), jnp.array([[1.2, 0.3], [-0.4, 0.8]]), jnp.ones((5, 2))
    path = rnnjax.trajectory(cell, weights, inputs)
    with jax.numpy_dtype_promotion("standard"):  # the state is one vector
        jacobians = rnnjax.step_jacobians(cell, weights, path)
        products = jacobian_operator(cell, weights, path).times(jnp.broadcast_to(jnp.eye(5), (5, 5, 5)))
    for t in range(5):
        hidden, key, count = (leaf[t] for leaf in path.carries)
        exact = jax.jacrev(lambda h, k=key, n=count, x=inputs[t]: step(weights, (h, k, n), x)[0][0])(hidden)
        for found in (jacobians[t], products[t]):
            np.testing.assert_allclose(found[:2, :2], exact, rtol=1e-5)
            assert not found[2:].any() and not found[:, 2:].any()


def test_complex_carries_are_refused():
    cell = rnnjax.StepCell(lambda params, c, x: ({"z": -c["z"]}, c), {"z": jnp.zeros(1, jnp.complex64)})
    path = rnnjax.trajectory(cell, jnp.ones(()), jnp.zeros((3, 1)))
    message = r"^carry\['z'\] must hold real numbers \(a complex one as two\), got complex64"
    for take in (rnnjax.step_jacobians, rnnjax.autodiff_step_jacobians, jacobian_operator):
        with pytest.raises(ValueError, match=message):
            take(cell, jnp.ones(()), path)
