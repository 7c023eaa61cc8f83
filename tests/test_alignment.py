"""Realised, largest and typical decay of a gradient, against products formed in many digits and closed forms."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import rnnjax

T, B, D, H = 12, 2, 2, 4
CELLS = {"tanh": rnnjax.VanillaCell(H), "relu": rnnjax.VanillaCell(H, activation="relu"), "lstm": rnnjax.LSTMCell(2)}


def network(name, num_steps=T, dtype=jnp.float32):
    cell = CELLS[name]
    params = cell.init(jax.random.key(1), D, dtype)
    inputs = jax.random.normal(jax.random.key(2), (num_steps, B, D), dtype)
    gradient = jax.random.normal(jax.random.key(3), (B, cell.state_size), dtype)
    return cell, params, rnnjax.trajectory(cell, params, inputs), gradient


def product_of(jacobians, lag):
    product = mpmath.eye(jacobians.shape[-1])
    for jacobian in np.asarray(jacobians, np.float64)[len(jacobians) - lag :]:
        product = mpmath.matrix(jacobian.tolist()) * product
    return product


def log(value):
    return float(mpmath.log(value)) if value > 0 else -np.inf


@pytest.mark.parametrize("name", CELLS)
def test_decays_are_those_of_products_in_many_digits(name):
    cell, params, path, gradient = network(name)
    found = rnnjax.gradient_alignment(cell, params, path, gradient * 1e-25)  # its length does not matter
    assert found.lags.tolist() == [1, 2, 4, 8, 12]
    jacobians = rnnjax.step_jacobians(cell, params, path)
    with mpmath.workdps(60):
        for index, lag in enumerate(found.lags.tolist()):
            for sequence in range(B):
                product = product_of(jacobians[:, sequence], lag)
                error = mpmath.matrix(np.asarray(gradient[sequence], np.float64).tolist())
                back = product.T * (error / mpmath.norm(error))
                np.testing.assert_allclose(found.log_realised[index, sequence], log(mpmath.norm(back)), atol=2e-5)
                square = sum(x**2 for x in product) / cell.state_size
                np.testing.assert_allclose(found.log_typical[index, sequence], log(square) / 2, atol=2e-5)
                largest = mpmath.svd_r(product, compute_uv=False)[0]
                np.testing.assert_allclose(found.log_bound[index, sequence], log(largest), atol=2e-5)


def test_alignment_is_with_the_left_singular_vectors():
    cell, params, path, gradient = network("tanh", dtype=jnp.float32)
    found = rnnjax.gradient_alignment(cell, params, path, gradient, lags=[3])
    jacobians = np.asarray(rnnjax.step_jacobians(cell, params, path), np.float64)[-3:]
    for sequence in range(B):
        left, values, _ = np.linalg.svd(jacobians[2, sequence] @ jacobians[1, sequence] @ jacobians[0, sequence])
        unit = np.asarray(gradient[sequence], np.float64) / np.linalg.norm(gradient[sequence])
        np.testing.assert_allclose(found.alignment[0, sequence], (left.T @ unit) ** 2, atol=1e-5)
        np.testing.assert_allclose(found.log_singular_values[0, sequence], np.log(values), atol=1e-5)
    np.testing.assert_allclose(found.alignment.sum(axis=-1), 1, atol=1e-6)


def test_gradient_along_a_singular_direction_decays_as_its_singular_value():
    kernel = jnp.diag(jnp.array([2.0, 0.5, 0.1]))
    cell = rnnjax.StepCell(lambda w, h, x: (w @ h + x, h), jnp.zeros(3))
    path = rnnjax.trajectory(cell, kernel, jnp.zeros((400, 3)))
    for unit, factor in enumerate((2.0, 0.5, 0.1)):
        found = rnnjax.gradient_alignment(cell, kernel, path, jnp.eye(3)[unit], lags=[400])
        np.testing.assert_allclose(found.log_realised, [400 * np.log(factor)], rtol=1e-6)
        np.testing.assert_allclose(found.alignment[0], np.eye(3)[unit], atol=1e-6)
        np.testing.assert_allclose(found.log_bound, [400 * np.log(2.0)], rtol=1e-6)
        np.testing.assert_allclose(found.log_typical, [400 * np.log(2.0) - np.log(3) / 2], rtol=1e-6)


def test_jit_and_a_lost_product():
    cell, params, path, gradient = network("tanh")
    jitted = jax.jit(lambda params: rnnjax.gradient_alignment(cell, params, path, gradient, lags=[2, 12]))(params)
    plain = rnnjax.gradient_alignment(cell, params, path, gradient, lags=[2, 12])
    np.testing.assert_allclose(jitted.log_realised, plain.log_realised, rtol=1e-6)
    dead = rnnjax.Trajectory(jnp.zeros((4, 2)), jnp.zeros((3, 1)))
    cell = rnnjax.StepCell(lambda w, h, x: (jax.nn.relu(w * h - 1.0), h), jnp.zeros(2))
    lost = rnnjax.gradient_alignment(cell, jnp.ones(()), dead, jnp.ones(2), lags=[3])
    assert lost.log_realised[0] == lost.log_bound[0] == lost.log_typical[0] == -jnp.inf


@pytest.mark.parametrize(
    ("gradient", "lags", "message"),
    [
        (np.ones((B, H + 1)), None, r"gradient must have shape \(2, 4\), got \(2, 5\)"),
        (np.zeros((B, H)), None, "gradient must not be all zero"),
        (np.full((B, H), np.nan), None, "gradient must be finite"),
        (np.ones((B, H)), [0, 2], "lags must be a positive integer, got 0"),
        (np.ones((B, H)), [T + 1], r"lags must be distinct numbers of steps in \[1, 12\], got \[13\]"),
    ],
)
def test_bad_arguments_are_named(gradient, lags, message):
    cell, params, path, _ = network("tanh")
    with pytest.raises(ValueError, match=message):
        rnnjax.gradient_alignment(cell, params, path, jnp.asarray(gradient, jnp.float32), lags=lags)
