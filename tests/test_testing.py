"""References and random chains against closed forms."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.stats

from rnnjax import testing


def test_tolerances_are_those_of_ieee_formats():
    assert testing.tolerance("float64") == 2.0**-26
    assert testing.tolerance(jnp.float32, scale=3) == pytest.approx(3 * 2.0**-11.5, rel=1e-15)
    assert testing.rounding_tolerance("bfloat16") == 2.0**-7
    assert testing.rounding_tolerance("float32", scale=8) == 2.0**-20


@pytest.mark.parametrize("function", [testing.tolerance, testing.rounding_tolerance])
def test_tolerances_reject_integers_and_bad_scales(function):
    with pytest.raises(ValueError, match="dtype must be a floating-point dtype, got int32"):
        function("int32")
    with pytest.raises(ValueError, match="scale must be a positive finite number, got 0"):
        function("float32", scale=0)


def test_matrix_has_the_prescribed_spectrum(dtype):
    sigma = np.array([3.0, 0.01, 1.0, 0.5, 0.0])
    matrix = testing.matrix_of_spectrum(jax.random.key(1), sigma, dtype)
    assert matrix.dtype == dtype
    computed = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    np.testing.assert_allclose(computed, np.sort(sigma)[::-1], rtol=0, atol=testing.rounding_tolerance(dtype, 30))
    assert not np.allclose(matrix, matrix.T, atol=0.1)


def test_matrices_of_a_batch_are_independent():
    matrices = testing.matrix_of_spectrum(jax.random.key(0), jnp.ones([2, 3, 4]))
    assert matrices.shape == (2, 3, 4, 4)
    gram = jnp.einsum("...ji,...jk->...ik", matrices, matrices, precision="highest")
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(4), gram.shape), atol=3e-6)
    assert len({float(matrix[0, 0]) for matrix in matrices.reshape(6, 4, 4)}) == 6


def test_orthogonal_factors_follow_haar_measure():
    # In three dimensions every coordinate of a uniform direction is uniform on [-1, 1] (Archimedes).
    entries = testing.matrix_of_spectrum(jax.random.key(3), jnp.ones([2000, 3]))
    for row, column in [(0, 0), (2, 1)]:
        assert scipy.stats.kstest(np.asarray(entries[:, row, column]), scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        ([1.0, -2.0], "singular_values must be at least 0, got -2.0"),
        ([1.0, np.nan], r"singular_values must be finite, got singular_values\[1\] = nan"),
        ([], r"non-empty floating-point array \[..., S\], got float32\[0\]"),
        ([2, 1], r"non-empty floating-point array \[..., S\], got int32\[2\]"),
        (1.0, r"non-empty floating-point array \[..., S\], got float32\[\]"),
    ],
)
def test_matrix_of_spectrum_rejects(sigma, message):
    with pytest.raises(ValueError, match=message):
        testing.matrix_of_spectrum(jax.random.key(0), sigma)


def test_chain_has_the_given_condition_number_and_determinant(dtype):
    chain = testing.chain_of_steps(jax.random.key(2), 7, 4, condition_number=1000.0, gain=0.9, dtype=dtype)
    assert chain.shape == (7, 4, 4)
    assert chain.dtype == dtype
    steps = np.asarray(chain, np.float64)
    np.testing.assert_allclose(np.linalg.cond(steps), 1000.0, rtol=testing.rounding_tolerance(dtype, 5000))
    log_abs_det = np.linalg.slogdet(steps).logabsdet
    np.testing.assert_allclose(log_abs_det, 4 * np.log(0.9), rtol=testing.rounding_tolerance(dtype, 5000))
    assert not np.allclose(steps[0] @ steps[1], steps[1] @ steps[0], atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps must be a positive integer, got 0"),
        ({"state_size": 2.5}, "state_size must be a positive integer, got 2.5"),
        ({"condition_number": 0.5}, "condition_number must be a number in .*, got 0.5"),
        ({"gain": 0.0}, "gain must be a positive finite number, got 0.0"),
        ({"state_size": 1}, "condition_number must be 1 where state_size is 1, got 10"),
    ],
)
def test_chain_of_steps_rejects(arguments, message):
    valid = {"num_steps": 3, "state_size": 2, "condition_number": 10}
    with pytest.raises(ValueError, match=message):
        testing.chain_of_steps(jax.random.key(0), **(valid | arguments))


def repeated(step, num_steps):
    return np.stack([np.asarray(step, np.float64)] * num_steps)


def test_reference_on_diagonal_chain():
    mu = np.array([0.3, -1.7, 1e-3, 0.9])
    expected = np.sort(500 * np.log(np.abs(mu)))[::-1]
    np.testing.assert_allclose(testing.exact_log_singular_values(repeated(np.diag(mu), 500)), expected, rtol=1e-14)


def test_reference_on_scaled_rotation():
    # 3/5 and 4/5 are not floats, so the rotation uses the integers 3 and 4 and has the gain 5 exactly.
    rotation = [[3.0, -4.0], [4.0, 3.0]]
    values = testing.exact_log_singular_values(repeated(rotation, 300) / 8)
    np.testing.assert_allclose(values, 300 * np.log(5 / 8), rtol=1e-15)


@pytest.mark.parametrize("num_steps", [1, 40, 1000])
def test_reference_on_shear(num_steps):
    shear = num_steps * 0.75
    expected = np.arcsinh(shear / 2)
    values = testing.exact_log_singular_values(repeated([[1.0, 0.75], [0.0, 1.0]], num_steps))
    np.testing.assert_allclose(values, [expected, -expected], rtol=1e-14)


def test_reference_on_cat_map():
    expected = 2000 * np.log((3 + np.sqrt(5)) / 2)
    values = testing.exact_log_singular_values(repeated([[2.0, 1.0], [1.0, 1.0]], 2000))
    np.testing.assert_allclose(values, [expected, -expected], rtol=1e-15)


def test_reference_multiplies_the_first_step_first():
    first, second = np.array([[1.0, 2.0], [0.0, 1.0]]), np.array([[3.0, 0.0], [1.0, 0.5]])
    expected = np.log(np.linalg.svd(second @ first, compute_uv=False))
    np.testing.assert_allclose(testing.exact_log_singular_values(np.stack([first, second])), expected, rtol=1e-14)


def test_reference_survives_a_path_far_wider_than_its_end():
    # Grows to a range of 2·200·ln 2 and shrinks back: the product is the identity exactly.
    steps = np.concatenate([repeated(np.diag([2.0, 0.5]), 200), repeated(np.diag([0.5, 2.0]), 200)])
    np.testing.assert_allclose(testing.exact_log_singular_values(steps), [0.0, 0.0], rtol=0, atol=1e-25)


def test_reference_finds_its_own_digits_and_keeps_the_determinant():
    steps = np.random.default_rng(0).normal(size=(120, 6, 6)) / np.sqrt(6)
    values = testing.exact_log_singular_values(steps)
    assert np.ptp(values) > 120
    with mpmath.workdps(60):
        log_abs_det = sum(mpmath.log(abs(mpmath.det(mpmath.matrix(step.tolist())))) for step in steps)
    np.testing.assert_allclose(values.sum(), float(log_abs_det), rtol=1e-14)
    np.testing.assert_array_equal(testing.exact_log_singular_values(steps, digits=3), values)
    moved = testing.exact_log_singular_values(steps * 2.0**-40)
    np.testing.assert_allclose(moved, values - 120 * 40 * np.log(2), rtol=1e-14)
    transposed = testing.exact_log_singular_values(steps.transpose(0, 2, 1)[::-1])
    np.testing.assert_allclose(transposed, values, rtol=1e-14)


def test_reference_gives_minus_infinity_for_exactly_lost_ranks_only():
    np.testing.assert_array_equal(
        testing.exact_log_singular_values(repeated(np.eye(5, k=1), 3)), [0, 0, -np.inf, -np.inf, -np.inf]
    )
    np.testing.assert_array_equal(testing.exact_log_singular_values(np.zeros([2, 3, 3])), np.full(3, -np.inf))
    block = np.random.default_rng(1).normal(size=(50, 2, 2))
    steps = np.zeros([50, 4, 4])
    steps[:, :2, :2] = block
    steps[:, 3, :2] = steps[:, 0, :2]
    values = testing.exact_log_singular_values(steps)
    assert np.isfinite(values[:2]).all()
    np.testing.assert_array_equal(values[2:], -np.inf)
    tiny = testing.exact_log_singular_values(repeated(np.diag([1.0, 5e-324]), 3))
    np.testing.assert_allclose(tiny, [0.0, 3 * -1074 * np.log(2)], rtol=1e-15, atol=1e-25)


def test_reference_takes_low_precision_as_exact_numbers():
    steps = np.asarray(jnp.full([10, 1, 1], 0.1, jnp.bfloat16))
    expected = 10 * np.log(0.10009765625)
    np.testing.assert_allclose(testing.exact_log_singular_values(steps), [expected], rtol=1e-15)


@pytest.mark.parametrize(
    ("jacobians", "message"),
    [
        (np.ones([2, 3]), r"floating-point array \[T, S, S\], got float64\[2, 3\]"),
        (np.ones([2, 3, 4]), r"got float64\[2, 3, 4\]"),
        (np.ones([0, 3, 3]), r"got float64\[0, 3, 3\]"),
        (np.ones([2, 3, 3], int), r"got int64\[2, 3, 3\]"),
        (np.full([1, 1, 1], np.inf), r"jacobians must be finite, got jacobians\[0, 0, 0\] = inf"),
    ],
)
def test_reference_rejects(jacobians, message):
    with pytest.raises(ValueError, match=message):
        testing.exact_log_singular_values(jacobians)
