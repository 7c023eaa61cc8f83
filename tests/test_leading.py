"""Leading singular values by products with vectors: the dense route's values, honest residuals, exact gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnjax
from rnnjax import leading_log_singular_values

pytestmark = pytest.mark.slow

CELLS = {
    "vanilla": lambda dtype: rnnjax.VanillaCell(20),
    "lstm": lambda dtype: rnnjax.LSTMCell(10),
    "gru": lambda dtype: rnnjax.GRUCell(20),
    "step": lambda dtype: rnnjax.StepCell(
        lambda p, c, x: (jnp.sin(p.recurrent_kernel[:, 0].T @ c) + 0.5 * c, c), jnp.ones(20, dtype)
    ),
}


def network(name, dtype, num_steps=30, batch_shape=()):
    cell = CELLS[name](dtype)
    maker = cell if name != "step" else rnnjax.VanillaCell(20)
    params = jax.tree.map(lambda a: 1.2 * a, maker.init(jax.random.key(0), 3, dtype))
    inputs = jax.random.normal(jax.random.key(1), (num_steps, *batch_shape, 3), dtype)
    return cell, params, inputs


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in ("vanilla", "lstm", "step")],
    indirect=["dtype"],
)
def test_values_are_those_of_the_dense_route(name, dtype):
    cell, params, inputs = network(name, dtype, batch_shape=(2,))
    path = rnnjax.trajectory(cell, params, inputs)
    leading = leading_log_singular_values(cell, params, path, 4)
    exact = rnnjax.log_singular_values(rnnjax.factor_product(rnnjax.step_jacobians(cell, params, path)))
    assert leading.log_singular_values.shape == leading.residuals.shape == (2, 4)
    assert np.asarray(leading.converged).all()
    assert np.asarray(leading.residuals).max() <= 1e-2
    assert np.abs(np.asarray(leading.log_singular_values - exact[:, :4])).max() < 1e-4


@pytest.mark.parametrize("num_steps", [4, 30])
def test_residuals_are_those_of_the_vectors(num_steps):
    """‖Pᵀu − σv‖/σ bounds how far v is from a singular vector: PᵀP v = σ² v within twice that share."""
    cell, params, inputs = network("vanilla", np.dtype("float32"), num_steps)
    path = rnnjax.trajectory(cell, params, inputs)
    product = np.eye(20)
    for jacobian in np.asarray(rnnjax.step_jacobians(cell, params, path), np.float64):
        product = jacobian @ product
    leading = leading_log_singular_values(cell, params, path, 3, tolerance=0.5)
    vectors = np.asarray(leading.right_vectors, np.float64)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-5)
    squares = np.exp(2 * np.asarray(leading.log_singular_values, np.float64))
    shares = np.linalg.norm(product.T @ product @ vectors - squares * vectors, axis=0) / squares
    assert np.all(shares <= 2 * np.asarray(leading.residuals) + 1e-4)
    np.testing.assert_allclose(leading.residuals, shares, rtol=1e-2, atol=1e-5)  # equal, as P v = σ u exactly
    assert num_steps > 4 or shares.max() > 1e-2


def test_stopping():
    """A cluster of equal singular values around place k converges slowly; the result says that it has not."""
    cell = rnnjax.VanillaCell(40, activation="identity")
    params = cell.init(jax.random.key(0), 1)
    spectrum = np.linspace(1.0, 0.97, 40)
    left, right = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 40, 40)))[0]
    params = params.replace(recurrent_kernel=jnp.asarray((left * spectrum @ right).T[:, None], jnp.float32))
    path = rnnjax.trajectory(cell, params, jnp.zeros((1, 1)))
    few = leading_log_singular_values(cell, params, path, 2, tolerance=1e-3, max_passes=5)
    assert few.num_passes == 5 and not few.converged and few.residuals.max() > 1e-3
    many = leading_log_singular_values(cell, params, path, 2, tolerance=1e-3, max_passes=4001)
    assert many.converged and 5 < many.num_passes < 4001
    np.testing.assert_allclose(many.log_singular_values, np.log(spectrum[:2]), atol=1e-4)
    assert np.all(few.log_singular_values <= many.log_singular_values + 1e-5)  # Ritz values come from below


def test_lost_directions_and_all_of_them():
    cell = rnnjax.VanillaCell(6, activation="identity")
    params = cell.init(jax.random.key(0), 1)
    kernel = jnp.diag(jnp.array([2.0, 0.5, 0.0, 0.0, 0.0, 0.0]))[:, None]
    path = rnnjax.trajectory(cell, params.replace(recurrent_kernel=kernel), jnp.zeros((9, 1)))
    leading = leading_log_singular_values(cell, params.replace(recurrent_kernel=kernel), path, 6)
    np.testing.assert_allclose(leading.log_singular_values[:2], [9 * math.log(2), -9 * math.log(2)], atol=1e-4)
    assert np.isneginf(np.asarray(leading.log_singular_values[2:])).all()
    assert leading.converged


@pytest.mark.parametrize("name", ["lstm", "step"])
def test_gradients_are_finite_differences_of_the_dense_route(name):
    with jax.enable_x64(True):
        cell, params, inputs = network(name, np.dtype("float64"), 12)
        tangent = jax.tree.map(lambda a: jnp.asarray(np.random.default_rng(a.size).normal(size=a.shape)), params)

        def leading(own):
            path = rnnjax.trajectory(cell, own, inputs)
            return leading_log_singular_values(cell, own, path, 3, tolerance=1e-5).log_singular_values

        def dense(step):
            own = jax.tree.map(lambda a, b: a + step * b, params, tangent)
            chain = rnnjax.step_jacobians(cell, own, rnnjax.trajectory(cell, own, inputs))
            return rnnjax.log_singular_values(rnnjax.factor_product(chain))[:3]

        differences = (dense(1e-5) - dense(-1e-5)) / 2e-5
        _, forward = jax.jit(lambda: jax.jvp(leading, (params,), (tangent,)))()
        reverse = jax.jit(jax.jacrev(leading))(params)
        reverse = sum(
            jnp.tensordot(a, b, b.ndim) for a, b in zip(*map(jax.tree.leaves, (reverse, tangent)), strict=True)
        )
        np.testing.assert_allclose(forward, differences, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(reverse, differences, rtol=1e-5, atol=1e-6)


def test_a_multiple_singular_value_has_no_derivative_to_trust():
    """At W = I, log σ_i of W + s E has one-sided derivatives ±1; what comes back is that of some basis of the space."""
    cell = rnnjax.VanillaCell(2, activation="identity")
    params = cell.init(jax.random.key(0), 1)

    def largest(share):
        own = params.replace(recurrent_kernel=(jnp.eye(2) + share * jnp.diag(jnp.array([1.0, -1.0])))[:, None])
        return leading_log_singular_values(cell, own, rnnjax.trajectory(cell, own, jnp.zeros((1, 1))), 1)

    def value(share):
        return largest(share).log_singular_values[0]

    assert abs((value(1e-3) - value(0.0)) / 1e-3 - 1) < 0.1 and abs((value(0.0) - value(-1e-3)) / 1e-3 + 1) < 0.1
    assert -1.001 <= jax.grad(value)(0.0) <= 1.001
    assert jax.grad(value)(0.01) == pytest.approx(1 / 1.01, rel=1e-3)
    assert jax.grad(value)(-0.01) == pytest.approx(-1 / 1.01, rel=1e-3)


def test_gradients_explode_with_the_length_in_chaos():
    """log σ_1 / T converges, yet its derivative with respect to the gain grows like e^(λ₁ T): it is no use there."""
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(40, 40)) / math.sqrt(40), jnp.float32)
    cell = rnnjax.VanillaCell(40)
    template = cell.init(jax.random.key(0), 1)
    start = jnp.asarray(np.random.default_rng(1).normal(size=40), jnp.float32)

    def growth(gain, num_steps):
        own = template.replace(recurrent_kernel=(gain * weights)[:, None])
        path = rnnjax.trajectory(cell, own, jnp.zeros((num_steps, 1)), start)
        return leading_log_singular_values(cell, own, path, 1).log_singular_values[0] / num_steps

    slope = jax.grad(growth)(3.0, 80)
    assert abs(slope) > 1e3  # of a quantity of 0.3, over a range of gains of 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k must be a whole number in \[1, 20\]"),
        ({"k": 21}, r"k must be a whole number in \[1, 20\]"),
        ({"k": 2, "tolerance": 0.0}, "tolerance must be"),
        ({"k": 2, "max_passes": 2}, "max_passes must be"),
    ],
)
def test_impossible_requests(options, message):
    cell, params, inputs = network("vanilla", np.dtype("float32"), 3)
    with pytest.raises(ValueError, match=message):
        leading_log_singular_values(cell, params, rnnjax.trajectory(cell, params, inputs), **options)
