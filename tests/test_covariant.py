"""Covariant Lyapunov vectors against eigenvectors, and against what makes them covariant."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnjax
from rnnjax.covariant import covariant_vectors
from rnnjax.lyapunov import lyapunov_spectrum

pytestmark = pytest.mark.slow


def linear_step(_, state, inputs):
    state = inputs.reshape(state.size, state.size) @ state
    return state, state


def chain_vectors(matrices, **options):
    """Covariant vectors of s_t = J_t s_{t−1} for Jacobians ``[T, ..., S, S]``, in float64."""
    with jax.enable_x64(True):
        matrices = jnp.asarray(matrices, jnp.float64)
        cell = rnnjax.StepCell(linear_step, jnp.zeros(matrices.shape[-1]))
        inputs = matrices.reshape(*matrices.shape[:-2], -1)
        return jax.tree.map(np.asarray, covariant_vectors(cell, {}, inputs, **options))


def constant_vectors(matrix, **options):
    transients = {"num_transient": 60, "num_backward_transient": 60}
    return chain_vectors(np.broadcast_to(matrix, (130, *np.shape(matrix))), **transients, **options)


def with_spectrum(values, seed):
    """A matrix with given eigenvalues, and its eigenvectors as unit columns."""
    vectors = np.random.default_rng(seed).normal(size=(len(values), len(values)))
    vectors /= np.linalg.norm(vectors, axis=0)
    return vectors * np.array(values) @ np.linalg.inv(vectors), vectors


@pytest.mark.parametrize("count", [2, 4])
def test_vectors_of_one_matrix_are_its_eigenvectors(count):
    values = [3.0, -1.5, 0.6, 0.2]
    matrix, eigenvectors = with_spectrum(values, 0)
    result = constant_vectors(matrix, num_exponents=count)
    assert result.vectors.shape == (10, 4, count)
    np.testing.assert_allclose(np.abs((result.vectors * eigenvectors[:, :count]).sum(axis=-2)), 1, rtol=1e-12)
    exact = np.log(np.abs(values[:count]))
    np.testing.assert_allclose(result.local_exponents, np.broadcast_to(exact, (10, count)), atol=1e-10)
    np.testing.assert_allclose(result.exponents, exact, atol=1e-10)
    cosines = np.abs(eigenvectors[:, :count].T @ eigenvectors[:, :count])
    with jax.enable_x64(True):
        np.testing.assert_allclose(result.cosines(), np.broadcast_to(cosines, (10, count, count)), atol=1e-10)
        angles = np.arccos(np.minimum(cosines, 1)) * (1 - np.eye(count))
        np.testing.assert_allclose(result.angles(), np.broadcast_to(angles, (10, count, count)), atol=1e-7)


@pytest.mark.parametrize("slope", [1.0, 1e-9])
def test_small_angles_keep_their_digits(slope):
    # [[2, b], [0, ½]] has the eigenvectors (1, 0) and (b, −3/2): the tangent of their angle is 3 / 2b.
    result = constant_vectors([[2.0, 1.5 / slope], [0.0, 0.5]])
    with jax.enable_x64(True):
        np.testing.assert_allclose(result.angles()[:, 0, 1], math.atan(slope), rtol=1e-6)
        np.testing.assert_allclose(result.smallest_angle(1), math.atan(slope), rtol=1e-6)


def test_directions_of_the_cat_map_are_orthogonal():
    result = constant_vectors([[2, 1], [1, 1]])
    with jax.enable_x64(True):
        np.testing.assert_allclose(result.smallest_angle(1), math.pi / 2, atol=1e-10)


def smallest_principal_angle(first, second):
    """Smallest angle between two spans, by its definition: cos θ = ‖Q₁ᵀ Q₂‖₂."""
    cosine = np.linalg.norm(np.linalg.qr(first)[0].T @ np.linalg.qr(second)[0], 2)
    return math.acos(min(cosine, 1))


@pytest.fixture(scope="module")
def network():
    """Two driven chaotic tanh networks: their Jacobians ``[T, 2, S, S]``, vectors and exponents."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        kernel = jnp.asarray(rng.normal(size=(6, 1, 6)))
        params = rnnjax.CellParams(jnp.ones((1, 1, 6)), kernel, jnp.zeros((1, 6)))
        cell, inputs = rnnjax.VanillaCell(6), jnp.asarray(rng.normal(size=(500, 2, 1)))
        jacobians = rnnjax.step_jacobians(cell, params, rnnjax.trajectory(cell, params, inputs))
        result = covariant_vectors(cell, params, inputs, num_transient=100, num_backward_transient=100)
        spectrum = lyapunov_spectrum(cell, params, inputs[:400], num_transient=100)
        return jax.tree.map(np.asarray, (jacobians, result, spectrum))


def test_each_vector_is_carried_to_itself(network):
    jacobians, result, _ = network
    assert result.vectors.shape == (300, 2, 6, 6)
    carried = jacobians[101:400] @ result.vectors[:-1]
    lengths = np.linalg.norm(carried, axis=-2)
    np.testing.assert_allclose(np.log(lengths), result.local_exponents[1:], atol=1e-9)
    aligned = np.abs((carried / lengths[..., None, :] * result.vectors[1:]).sum(axis=-2))
    np.testing.assert_allclose(aligned, 1, atol=1e-12)


def test_vectors_grow_at_the_exponents(network):
    _, result, spectrum = network
    # The two averages differ by log|v · q| at the ends, over the 300 steps.
    np.testing.assert_allclose(result.exponents, spectrum.exponents, atol=0.02)
    assert np.all(np.diff(spectrum.exponents) < -0.02)


def test_smallest_angle_is_that_of_the_two_spans(network):
    _, result, _ = network
    with jax.enable_x64(True):
        angles = np.asarray(result.smallest_angle(2))
        pairs = np.asarray(result.angles())
    assert angles.shape == (300, 2)
    for t in range(0, 300, 37):
        vectors = result.vectors[t, 1]
        exact = smallest_principal_angle(vectors[:, :2], vectors[:, 2:])
        np.testing.assert_allclose(angles[t, 1], exact, atol=1e-7)
    assert np.all(angles <= pairs[:, :, :2, 2:].min(axis=(-2, -1)) + 1e-7)


def test_lost_rank_is_named_by_its_step():
    chain = np.broadcast_to(np.diag([2.0, 0.5]), (10, 2, 2)).copy()
    chain[6] = 0
    with pytest.raises(ValueError, match=r"must keep the rank of the frame, got a loss at time step 6$"):
        chain_vectors(chain)


def test_rank_lost_by_a_dead_unit_is_named():
    cell = rnnjax.VanillaCell(4, activation="relu")
    params = cell.init(jax.random.key(0), 1).replace(bias=jnp.ones((1, 4)).at[0, 0].set(-100.0))
    with pytest.raises(ValueError, match=r"got a loss at time step 0$"):
        covariant_vectors(cell, params, jnp.zeros((20, 1)))


@pytest.mark.parametrize(("bias", "dtype"), [(25.0, "float32"), (40.0, "float32"), (180.0, "float64")])
def test_saturated_units_leave_vectors_finite_and_exponents_exact(bias, dtype):
    """The unit's slope, down to 4 e^(−2 · 180), has no square, nor has its inverse."""
    with jax.enable_x64(dtype == "float64"):
        cell = rnnjax.VanillaCell(3)
        params = cell.init(jax.random.key(0), 1, dtype).replace(bias=jnp.array([[0, 0.3, bias]], dtype))
        inputs = jnp.zeros((60, 1), dtype)
        result = covariant_vectors(cell, params, inputs, num_transient=10, num_backward_transient=10)
        jacobians = np.asarray(rnnjax.step_jacobians(cell, params, rnnjax.trajectory(cell, params, inputs)), float)
    np.testing.assert_allclose(np.linalg.norm(result.vectors, axis=-2), 1, rtol=1e-5)
    frame, logs = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0], []
    for jacobian in jacobians:
        frame, triangle = np.linalg.qr(jacobian @ frame)
        logs.append(np.log(abs(np.diag(triangle))))
    np.testing.assert_allclose(result.exponents, np.mean(logs[10:50], axis=0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_exponents": 3}, r"^num_exponents must be a whole number in \[1, 2\], got 3"),
        ({"num_transient": 10}, r"^num_transient must be a whole number in \[0, 9\], got 10"),
        (
            {"num_transient": 4, "num_backward_transient": 6},
            r"^num_backward_transient must be a whole number in \[0, 5\], got 6",
        ),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        chain_vectors(np.broadcast_to(np.eye(2), (10, 2, 2)), **options)


def test_impossible_number_of_expanding_directions():
    result = constant_vectors([[2, 1], [1, 1]])
    for count in (0, 2):
        with pytest.raises(ValueError, match=r"^num_expanding must be a whole number in \[1, 1\]"):
            result.smallest_angle(count)
