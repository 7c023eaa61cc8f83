"""Graded factors: they multiply back to the product, whatever the order, the scale and the precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnjax
from rnnjax import graded, testing
from rnnjax.products import factor_product


def gaussian_chain(num_steps, size, dtype=np.float32, batch_shape=(), seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(num_steps, *batch_shape, size, size)) / np.sqrt(size), dtype)


def formed(chain):
    """A_T … A_1 in float64."""
    product = np.eye(chain.shape[-1])
    for matrix in np.asarray(chain, np.float64):
        product = matrix @ product
    return product


def multiplied_back(product):
    left, right = (np.asarray(x, np.float64) for x in (product.left, product.right))
    scales = np.asarray(product.log_scales, np.float64) + np.asarray(product.log_scales_remainder, np.float64)
    return (left * np.exp(scales)[..., None, :]) @ right


def total_scales(product):
    return np.asarray(product.log_scales, np.float64) + np.asarray(product.log_scales_remainder, np.float64)


@pytest.mark.parametrize(("num_steps", "size"), [(1, 5), (2, 2), (7, 1), (7, 6)])
def test_factors_multiply_back_to_the_product(num_steps, size, dtype):
    chain = gaussian_chain(num_steps, size, dtype)
    product = factor_product(chain)
    expected = formed(chain)
    error = np.abs(multiplied_back(product) - expected).max() / np.abs(expected).max()
    assert error < testing.rounding_tolerance(dtype, 100)
    if num_steps > 1 and size > 1:
        assert np.abs(formed(chain[::-1]) - expected).max() > 0.1
    assert {leaf.dtype for leaf in jax.tree.leaves(product)} == {dtype, jnp.dtype("int32")}


def test_the_contract_of_the_factors_holds_over_a_thousand_nats(dtype):
    chain = testing.chain_of_steps(jax.random.key(0), 400, 5, condition_number=300.0, gain=0.5, dtype=dtype)
    product = factor_product(chain)
    left = np.asarray(product.left, np.float64)
    np.testing.assert_allclose(left.T @ left, np.eye(5), atol=testing.rounding_tolerance(dtype, 20))
    scales = total_scales(product)
    assert np.ptp(scales) > 1000
    assert (np.diff(scales) < 3).all()
    # V is a product of unit triangular factors of moderate size: invertible without loss, with determinant ±1.
    assert np.linalg.cond(np.asarray(product.right, np.float64)) < 1e3
    assert abs(np.linalg.det(np.asarray(product.right, np.float64))) == pytest.approx(1, abs=1e-3)
    assert product.log_abs_det == pytest.approx(400 * 5 * math.log(0.5), rel=1e-5)


def test_log_abs_det_is_the_sum_over_the_steps(dtype):
    chain = gaussian_chain(300, 4, dtype, (2,))
    expected = np.linalg.slogdet(np.asarray(chain, np.float64))[1].sum(0)
    product = factor_product(chain)
    np.testing.assert_allclose(product.log_abs_det, expected, rtol=testing.rounding_tolerance(dtype, 10))
    np.testing.assert_allclose(total_scales(product).sum(-1), expected, rtol=1e-8)  # beyond float32 when narrowed
    singular = factor_product(chain.at[7, 0, 2].set(0))
    assert singular.log_abs_det[0] == -np.inf
    assert singular.log_abs_det[1] == product.log_abs_det[1]


@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
def test_batch_axes_are_independent_products(dtype):
    chain = gaussian_chain(9, 3, dtype, (2, 2))
    together = factor_product(chain)
    mapped = jax.jit(jax.vmap(jax.vmap(factor_product, in_axes=1), in_axes=1))(chain)
    for index in np.ndindex(2, 2):
        alone = factor_product(chain[:, *index])
        for product in (together, mapped):
            np.testing.assert_allclose(
                multiplied_back(jax.tree.map(lambda leaf, i=index: leaf[i], product)),
                multiplied_back(alone),
                atol=testing.rounding_tolerance(dtype, 50),
            )
            np.testing.assert_allclose(product.log_abs_det[index], alone.log_abs_det, rtol=1e-5)


def test_float64_factorisation_leaves_a_float32_program_as_it_was():
    assert not jax.config.jax_enable_x64
    chain = testing.chain_of_steps(jax.random.key(2), 200, 4, condition_number=900.0)

    @jax.jit
    def program(chain):
        product = factor_product(chain * 1.0)
        return product, jnp.sum(product.left) * jnp.arange(3.0)

    inside, after = program(chain)
    assert {leaf.dtype for leaf in jax.tree.leaves((inside, after))} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert not jax.config.jax_enable_x64
    exact = testing.exact_log_singular_values(np.asarray(chain))
    wide, narrow = (rnnjax.log_singular_values(p) for p in (inside, factor_product(chain, dtype="float32")))
    assert np.abs(np.asarray(wide, np.float64) - exact).max() < 1e-4
    # The two are different computations: float32 itself is far less accurate, yet within the contract.
    assert 1e-6 < np.abs(np.asarray(narrow, np.float64) - exact).max() < 2e-3


@pytest.mark.parametrize("spread", [0, 12])
def test_column_scales_are_powers_of_two_near_the_sizes_of_columns(spread, dtype):
    rng = np.random.default_rng(0)
    matrix = np.asarray(gaussian_chain(1, 4, dtype)[0], np.float64) * 10.0 ** rng.uniform(-spread, 0, 4)
    scales = np.asarray(graded.column_scales(jnp.asarray(matrix, dtype).at[:, 1].set(0)))
    assert scales[1] == 0
    np.testing.assert_array_equal(np.frexp(np.delete(scales, 1))[0], 0.5)
    equilibrated = matrix / np.abs(np.delete(matrix, 1, axis=1)).max(axis=1, keepdims=True)
    ratio = np.delete(np.abs(equilibrated).max(axis=0) / np.where(scales > 0, scales, 1), 1)
    assert ((ratio > 0.66) & (ratio < 2.0001)).all()


def test_sums_are_compensated(dtype):
    terms = np.random.default_rng(0).normal(size=3000).astype(dtype) * 100 + np.asarray(0.1, dtype)
    zero = jnp.zeros((), dtype)
    (total, remainder), _ = jax.lax.scan(lambda s, x: (graded.add(*s, x), None), (zero, zero), jnp.asarray(terms))
    exact = math.fsum(float(t) for t in terms)
    assert abs(float(total) + float(remainder) - exact) < testing.rounding_tolerance(dtype, 1) * abs(exact) * 0.1
    lost, kept = graded.add(total, remainder, jnp.asarray(-np.inf, dtype))
    assert lost == -np.inf
    assert kept == remainder


def test_bfloat16_matrices_are_taken_as_exact_numbers():
    narrow = gaussian_chain(20, 3, jnp.bfloat16)
    product = factor_product(narrow)
    assert product.left.dtype == jnp.float32
    np.testing.assert_allclose(multiplied_back(product), formed(narrow.astype(jnp.float32)), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda a: a[0], {}, r"matrices must be square .* \[T, ..., S, S\], got shape \(3, 3\)"),
        (lambda a: a[:, :2], {}, r"got shape \(5, 2, 3\)"),
        (lambda a: a[:0], {}, r"at least one, .* got shape \(0, 3, 3\)"),
        (lambda a: a[:, :0, :0], {}, r"got shape \(5, 0, 0\)"),
        (lambda a: a.astype(int), {}, "matrices must be a floating-point dtype"),
        (lambda a: a.at[3, 0, 1].set(np.nan), {}, "matrices must be finite, got a NaN or an overflow at time step 3"),
        (lambda a: a.at[4, 2, 2].set(np.inf), {}, "at time step 4"),
        (lambda a: a.astype(jnp.bfloat16).at[2, 0, 0].set(np.nan), {}, "at time step 2"),
        (lambda a: a, {"dtype": "float23"}, "dtype must be one of float32, float64, got 'float23'"),
        (lambda a: a, {"dtype": "fast"}, "dtype must be one of float32, float64, got 'fast'"),
        (lambda a: a, {"dtype": jnp.bfloat16}, "dtype must be one of float32, float64, got 'bfloat16'"),
        (lambda a: a, {"dtype": int}, "dtype must be one of float32, float64, got 'int"),
    ],
)
def test_bad_chains_are_refused(change, options, message):
    with pytest.raises(ValueError, match=message):
        factor_product(change(gaussian_chain(5, 3)), **options)


@pytest.mark.parametrize("size", [1, 3, 8, 210])  # a block, blocks of unlike size, and one that is not cut into blocks
def test_triangles_times_matrices(size):
    with jax.enable_x64():
        triangle, matrix = (np.random.default_rng(seed).normal(size=(size, size)) for seed in range(2))
        triangle = np.triu(triangle)
        found = graded.triangular_times(jnp.asarray(triangle), jnp.asarray(matrix))
        np.testing.assert_allclose(found, triangle @ matrix, atol=1e-12 * size)


def test_rows_are_transposed_as_with_their_orthogonal_factor():
    with jax.enable_x64():
        rows = jax.random.normal(jax.random.key(0), (5, 5))
        scales, remainder = jnp.array([3.0, 1.0, 0.0, -2.0, -400.0]), jnp.zeros(5)
        expected = graded.transposed(graded.Factors(jnp.eye(5), scales, remainder, rows))
        found = graded.transposed_rows(scales, remainder, rows)
        for actual, desired in zip(found, (expected.log_scales, expected.remainder, expected.right), strict=True):
            np.testing.assert_allclose(actual, desired, atol=1e-12)
