"""Every product carries its own evidence: determinants, error estimates, counts, and a flag for what is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnjax
from rnnjax import products, testing
from rnnjax.jacobians import jacobian_operator
from rnnjax.operators import DenseJacobians
from rnnjax.structured import StructuredJacobians

pytestmark = pytest.mark.slow

NUM_STEPS, SIZE = 60, 6


def gaussian(rng):
    return rng.normal(size=(NUM_STEPS, SIZE, SIZE)) / np.sqrt(SIZE)


def near_identity(rng):
    return 0.99 * np.eye(SIZE) + 0.05 * gaussian(rng)


def prescribed_condition(rng):
    rotations = np.linalg.qr(rng.normal(size=(2, NUM_STEPS, SIZE, SIZE)))[0]
    half = 10 ** (rng.uniform(0, 5) / 2)
    return rotations[0] * np.geomspace(half, 1 / half, SIZE) @ rotations[1]


def saturated(rng):
    weights, state, steps = 3 * rng.normal(size=(SIZE, SIZE)) / np.sqrt(SIZE), rng.normal(size=SIZE), []
    for _ in range(NUM_STEPS):
        steps.append((1 / np.cosh(weights @ state) ** 2)[:, None] * weights)
        state = np.tanh(weights @ state)
    return np.array(steps)


@jax.jit(static_argnames="dtype")
def spectrum(chain, dtype=None):
    return rnnjax.singular_spectrum(rnnjax.factor_product(chain, dtype=dtype))


@pytest.mark.parametrize("factored_in", ["float32", "float64"])
def test_error_estimates_are_honest(factored_in, dtype):
    """99 % of the errors of random chains lie below their estimate, which is not above 100 times them in the median."""
    if dtype == np.float64 and factored_in == "float32":
        pytest.skip("float64 chains are always factored in float64")
    ratios, residuals = [], []
    for make in (gaussian, near_identity, prescribed_condition, saturated):
        for seed in range(25):
            chain = make(np.random.default_rng(1000 + seed)).astype(dtype)
            result = spectrum(jnp.asarray(chain), factored_in)
            exact = testing.exact_log_singular_values(chain)
            errors = np.abs(np.asarray(result.log_singular_values, np.float64) - exact)
            estimates = np.asarray(result.error_estimate, np.float64)
            ratios.append(estimates / np.maximum(errors, 1e-300))
            residuals.append(abs(float(result.residual)) / estimates.sum())
    assert np.mean(np.array(ratios) >= 1) >= 0.99
    assert 1 < np.median(ratios) <= 100
    assert max(residuals) < 1


def test_a_wrong_product_shows_in_its_residual():
    chain = jnp.asarray(gaussian(np.random.default_rng(0)), jnp.float32)
    product = rnnjax.factor_product(chain)
    assert abs(rnnjax.singular_spectrum(product).residual) < 1e-3
    wrong = product.replace(log_scales=product.log_scales.at[3].add(0.5))
    assert rnnjax.singular_spectrum(wrong).residual == pytest.approx(0.5, abs=1e-2)


def test_rank_that_rounding_alone_has_lost_is_no_certain_loss():
    """In float32, steps of condition 1e7 and more may leave a pivot of zero where no step is singular."""
    product = rnnjax.factor_product(testing.chain_of_steps(jax.random.key(0), 100, 6, condition_number=100.0))
    lost = product.replace(log_scales=product.log_scales.at[product.log_scales.argmin()].set(-np.inf))
    assert np.isposinf(rnnjax.singular_spectrum(lost).error_estimate[-1])
    known = lost.replace(log_abs_det=jnp.asarray(-np.inf, jnp.float32))
    assert rnnjax.singular_spectrum(known).error_estimate[-1] == 0
    chains = [testing.chain_of_steps(jax.random.key(seed), 100, 6, condition_number=3e7) for seed in range(6)]
    product = rnnjax.factor_product(jnp.stack(chains, axis=1), dtype="float32")
    seems_lost = np.isneginf(product.log_scales).any(axis=1) & np.isfinite(product.log_abs_det)
    np.testing.assert_array_equal(np.isposinf(product.error_estimate).any(axis=1), seems_lost)


def test_columns_are_factored_only_when_their_condition_asks_for_it():
    rotations = jnp.asarray(np.linalg.qr(np.random.default_rng(1).normal(size=(200, 5, 5)))[0], jnp.float32)
    tame = rnnjax.factor_product(rotations).num_factorizations
    wild = rnnjax.factor_product(testing.chain_of_steps(jax.random.key(0), 200, 5, condition_number=1e4))
    assert 0 < tame < 30
    assert wild.num_factorizations > 60
    every_step = rnnjax.factor_product(testing.chain_of_steps(jax.random.key(0), 200, 5, condition_number=1e9))
    assert every_step.num_factorizations >= 200


def test_blocks_of_steps_that_were_too_long_are_taken_back():
    """A tame stretch makes blocks long; the first ill-conditioned step inside one must not be swallowed."""
    rng = np.random.default_rng(2)
    chain = np.linalg.qr(rng.normal(size=(120, 4, 4)))[0]
    chain[100:110] = np.asarray(testing.chain_of_steps(jax.random.key(1), 10, 4, condition_number=1e7), np.float64)
    exact = testing.exact_log_singular_values(chain.astype(np.float32))
    result = spectrum(jnp.asarray(chain, jnp.float32))
    np.testing.assert_allclose(result.log_singular_values, exact, atol=1e-4)


def test_determinants_are_those_of_the_steps(dtype):
    for cell in (rnnjax.GRUCell(5), rnnjax.LSTMCell(5)):
        params = jax.tree.map(lambda a: 2 * a, cell.init(jax.random.key(0), 3, dtype))
        inputs = jax.random.normal(jax.random.key(1), (7, 2, 3), dtype)
        operator = jax.jit(jacobian_operator)(cell, params, rnnjax.trajectory(cell, params, inputs))
        assert isinstance(operator, StructuredJacobians)
        expected = np.linalg.slogdet(np.asarray(operator.dense(), np.float64))[1]
        np.testing.assert_allclose(operator.log_abs_det(), expected, atol=2e-5 if dtype == np.float32 else 1e-12)


def test_lstm_determinant_where_gates_are_shut():
    """With f = 0 the memory feeds nothing but the output, and with both zero the determinant is."""
    derivatives = jnp.asarray(np.random.default_rng(3).normal(size=(2, 2, 3)), jnp.float32)
    gates = jnp.asarray(np.random.default_rng(4).normal(size=(2, 4, 3)), jnp.float32)
    kernel = jnp.asarray(np.random.default_rng(5).normal(size=(3, 4, 3)), jnp.float32)
    shut = StructuredJacobians.from_factors(derivatives.at[1, 1, 0].set(0), gates, kernel)
    expected = np.linalg.slogdet(np.asarray(shut.dense(), np.float64))[1]
    np.testing.assert_allclose(shut.log_abs_det(), expected, atol=1e-5)
    assert np.isneginf(StructuredJacobians.from_factors(derivatives.at[:, 1, 2].set(0), gates, kernel).log_abs_det())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_an_error_or_a_flag(bad):
    chain = jnp.asarray(gaussian(np.random.default_rng(0)), jnp.float32)
    broken = chain.at[41, 2, 3].set(bad).at[50, 0, 0].set(bad)
    with pytest.raises(ValueError, match="at time step 41"):
        spectrum.__wrapped__(broken)
    assert spectrum(broken).first_non_finite_step == 41 and np.isnan(spectrum(broken).log_singular_values).all()
    assert spectrum(chain).first_non_finite_step == -1
    cell = rnnjax.StepCell(lambda p, h, x: (p * h * h, h), jnp.full(2, 10.0))  # h_t = 10^(2^t): 10^32, then overflow
    inputs = jnp.ones((12, 1))
    profile = jax.jit(lambda p: rnnjax.spectral_profile(cell, p, inputs, lags=[2]))
    assert profile(0.1).first_non_finite_step == -1
    exploded = profile(1.0)
    assert exploded.first_non_finite_step == 6 and np.isnan(exploded.log_singular_values).all()
    leading = jax.jit(lambda p: rnnjax.leading_log_singular_values(cell, p, rnnjax.trajectory(cell, p, inputs), 1))
    assert leading(0.1).first_non_finite_step == -1 and leading(0.1).converged
    assert leading(1.0).first_non_finite_step == 6 and not leading(1.0).converged
    assert np.isnan(leading(1.0).log_singular_values).all()


MEMORY_CELLS = {
    "affine": rnnjax.LSTMCell(16),
    "step": rnnjax.StepCell(lambda p, h, x: (jnp.tanh(p @ h) + x, h), np.zeros(32, np.float32)),
}


@pytest.mark.parametrize("name", MEMORY_CELLS)
def test_the_product_alone_needs_no_more_memory_for_more_steps(name):
    cell = MEMORY_CELLS[name]
    params = cell.init(jax.random.key(0), 32) if name == "affine" else jnp.eye(32)

    def program(num_steps):
        inputs = jnp.zeros((num_steps, 32))
        operator = jax.jit(jacobian_operator)(cell, params, rnnjax.trajectory(cell, params, inputs))
        return jax.jit(rnnjax.factor_product).lower(operator).compile().memory_analysis().temp_size_in_bytes

    short, long = program(50), program(1000)
    per_step = (long - short) / 950
    assert per_step < 4 * 32 * 32  # less than one 32 × 32 matrix: some copies of states, as many as S
    assert short < 60 * 8 * 32 * 32


def test_nothing_is_traced_again_for_new_numbers():
    traced = []

    @jax.jit
    def program(chain):
        traced.append(1)
        return rnnjax.log_singular_values(rnnjax.factor_product(chain))

    for seed in range(3):
        program(jnp.asarray(gaussian(np.random.default_rng(seed)), jnp.float32))
    assert len(traced) == 1
    before = products._factor_product._cache_size()
    for seed in range(3):
        rnnjax.factor_product(jnp.asarray(gaussian(np.random.default_rng(seed)), jnp.float32))
    assert products._factor_product._cache_size() <= before + 1


def test_operators_and_matrices_have_the_same_product():
    step_cell = rnnjax.StepCell(lambda p, c, x: (jnp.tanh(p @ c + x), c), jnp.zeros(4))
    weights = jnp.asarray(np.random.default_rng(6).normal(size=(4, 4)), jnp.float32)
    for cell, params in ((rnnjax.LSTMCell(2), None), (step_cell, weights)):
        params = cell.init(jax.random.key(0), 4) if params is None else params
        path = rnnjax.trajectory(cell, params, jax.random.normal(jax.random.key(1), (30, 2, 4)))
        operator = jacobian_operator(cell, params, path)
        matrices = DenseJacobians(operator.dense())
        values = [rnnjax.log_singular_values(rnnjax.factor_product(form)) for form in (operator, matrices)]
        np.testing.assert_allclose(*values, atol=1e-3)
