"""Chains of LSTM Jacobians in which the rows of h leave out what they share with those of c."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnjax
from rnnjax.jacobians import jacobian_operator
from rnnjax.sheared import ShearedJacobians, sheared
from rnnjax.structured import StructuredJacobians
from rnnjax.testing import rounding_tolerance
from tests.reference_spectra import exact_of, worst

T = 50


def random_chain(dtype, num_steps=6, hidden=4):
    """Factors of a made-up cell with two carries, none of them zero."""
    by_carry, by_gate, kernel = (
        jax.random.normal(jax.random.key(seed), shape, dtype)
        for seed, shape in enumerate([(num_steps, 2, 2, hidden), (num_steps, 2, 3, hidden), (hidden, 3, hidden)])
    )
    # Most units of the LSTM kind, h in proportion to c but for one gate, and one that is not.
    proportions = jnp.linspace(0.2, 3.0, hidden - 1, dtype=dtype)
    by_carry = by_carry.at[:, 0, :, 1:].set(proportions[None, None] * by_carry[:, 1, :, 1:])
    by_gate = by_gate.at[:, 0, :2, 1:].set(proportions[None, None] * by_gate[:, 1, :2, 1:])
    by_gate = by_gate.at[:, 0, 2, 1:].add(0.01)
    return StructuredJacobians.from_factors(by_carry, by_gate, kernel)


def saturated_lstm(gain, dtype, seed=0, num_steps=T):
    """An LSTM of two units with large weights, and its inputs."""
    cell, random = rnnjax.LSTMCell(2), np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: cell.init(jax.random.key(0), 3))
    params = jax.tree.map(lambda leaf: jnp.asarray(gain * random.normal(size=leaf.shape), dtype), shapes)
    return cell, params, jnp.asarray(random.normal(size=(num_steps, 3)), dtype)


def shears(chain):
    """S_t for t = 0 … T as matrices, the last from nowhere but its definition."""
    a, b = np.moveaxis(np.asarray(chain.before, np.float64), 1, 0)
    assert np.all(a * b == 0)
    size = a.shape[-1]
    matrices = np.zeros((len(a) + 1, 2 * size, 2 * size)) + np.eye(2 * size)
    for step in range(len(a)):
        matrices[step, :size, size:] = -np.diag(a[step])
        matrices[step, size:, :size] = -np.diag(b[step])
    return matrices


def test_steps_are_sheared_jacobians(dtype):
    jacobians = random_chain(dtype)
    chain = sheared(jacobians, dtype)
    assert chain.shape == jacobians.shape and chain.dtype == jacobians.dtype
    outer = shears(chain)
    assert np.count_nonzero(outer[1:-1] - np.eye(8)), "some units are sheared"
    plain = np.asarray(jacobians.dense(), np.float64)
    columns = np.random.default_rng(3).normal(size=(8, 5))
    atol = rounding_tolerance(dtype, 100)
    for step in range(6):
        own, right = chain.at_step(step), np.linalg.inv(outer[step])
        cases = [
            (own.dense(), outer[step + 1] @ plain[step] @ right),
            (own.times(jnp.asarray(columns, dtype)), outer[step + 1] @ plain[step] @ right @ columns),
            (own.times(jnp.asarray(columns, dtype), last=True), plain[step] @ right @ columns),
            (own.transpose_times(jnp.asarray(columns, dtype)), (outer[step + 1] @ plain[step] @ right).T @ columns),
            (own.transpose_times(jnp.asarray(columns, dtype), last=True), (outer[step + 1] @ plain[step]).T @ columns),
            (chain.starting_at(step).at_step(step).dense(), outer[step + 1] @ plain[step]),
        ]
        for found, expected in cases:
            np.testing.assert_allclose(found, expected, atol=atol * np.abs(expected).max())


def test_the_product_is_that_of_the_jacobians():
    with jax.enable_x64():
        jacobians = random_chain(jnp.float64)
        found, expected = (
            np.linalg.multi_dot(np.asarray(x.dense())[::-1]) for x in (sheared(jacobians, jnp.float64), jacobians)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_steps_of_an_lstm_become_well_conditioned():
    def condition(matrices):
        for _ in range(5):  # rows and columns of like size
            matrices = matrices / np.abs(matrices).max(axis=-1, keepdims=True)
            matrices = matrices / np.abs(matrices).max(axis=-2, keepdims=True)
        return np.median(np.linalg.cond(matrices))

    with jax.enable_x64():
        cell = rnnjax.LSTMCell(32)
        params = cell.init(jax.random.key(0), 3)
        path = rnnjax.trajectory(cell, params, jax.random.normal(jax.random.key(1), (50, 3)))
        jacobians = jacobian_operator(cell, params, path)
        plain, better = (
            np.asarray(jacobians.dense(), np.float64),
            np.asarray(sheared(jacobians, jnp.float64).dense(), np.float64),
        )
    assert condition(plain[1:]) > 200 and condition(better[1:-1]) < 20


def test_digits_survive_where_rows_nearly_cancel(dtype):
    """h = a c but for a few units of rounding: what is left of rows of h is right, as exact fractions say."""
    random, one = np.random.default_rng(0), jnp.ones((2, 50), dtype)
    own, ratio, gate = (jnp.asarray(random.uniform(0.5, 1, (2, 50)), dtype) for _ in range(3))
    by_carry = jnp.stack([jnp.stack([0 * one, ratio * own], 1), jnp.stack([0 * one, own], 1)], 1)
    hidden = ratio * gate * (1 + 8 * jnp.finfo(dtype).eps)
    by_gate = jnp.stack([hidden, gate], 1)[:, :, None]
    chain = sheared(StructuredJacobians.from_factors(by_carry, by_gate, jnp.full((50, 1, 50), 1e-3, dtype)), dtype)
    shear = np.asarray(chain.before[1, 0], np.float64)
    assert (shear > 0).all()
    for found, a, h, c in zip(chain.rows.recurrent_derivatives[0, 0, 0], shear, hidden[0], gate[0], strict=True):
        exact = Fraction(float(h)) - Fraction(float(a)) * Fraction(float(c))
        assert abs(float(found) - exact) <= 1e-3 * abs(exact)


def test_units_are_left_alone_where_shears_would_not_make_rows_smaller():
    one = jnp.ones((3, 1))
    by_carry = jnp.stack([jnp.stack([0 * one, 1e-3 * one], 1), jnp.stack([0 * one, 2e-3 * one], 1)], 1)
    by_gate = jnp.stack([1e-6 * one, one], 1)[:, :, None]
    chain = sheared(StructuredJacobians.from_factors(by_carry, by_gate, jnp.full((1, 1, 1), 1e-4)), jnp.float32)
    np.testing.assert_array_equal(chain.rows.recurrent_derivatives[:, 0], by_gate[:, 0])
    np.testing.assert_array_equal(chain.before[:, 0], 0)


def test_other_jacobians_stay_as_they_are():
    cell = rnnjax.GRUCell(3)
    params = cell.init(jax.random.key(0), 2)
    jacobians = jacobian_operator(cell, params, rnnjax.trajectory(cell, params, jnp.ones((4, 2))))
    found = sheared(jacobians, jnp.float32)
    np.testing.assert_array_equal(found.dense(), jacobians.dense())
    assert not isinstance(found, ShearedJacobians)


@pytest.mark.parametrize("seed", [3, 9])  # where rows are not sheared: 1e-9 to 3e-9 nats
def test_saturated_gates(seed, dtype):
    """Steps of condition 1e5 and beyond, and none of the digits lost."""
    cell, params, inputs = saturated_lstm(3.0, dtype, seed)
    jacobians = jacobian_operator(cell, params, rnnjax.trajectory(cell, params, inputs))
    assert isinstance(sheared(jacobians, dtype), ShearedJacobians)
    exact = exact_of(jacobians)
    spectrum = rnnjax.singular_spectrum(rnnjax.factor_product(jacobians))
    error = worst(spectrum.log_singular_values, exact)
    assert error < (1e-4 if dtype == np.float32 else 1e-10)
    assert error < spectrum.error_estimate.max()
    assert abs(spectrum.residual) < spectrum.error_estimate.sum()


def test_error_estimates_of_random_lstms_are_honest():
    for seed in range(12):
        cell, params, inputs = saturated_lstm(0.5 + 0.3 * seed, jnp.float32, seed, num_steps=30)
        jacobians = jacobian_operator(cell, params, rnnjax.trajectory(cell, params, inputs))
        spectrum = rnnjax.singular_spectrum(rnnjax.factor_product(jacobians))
        assert np.all(abs(spectrum.log_singular_values - exact_of(jacobians)) <= spectrum.error_estimate), seed


@pytest.mark.parametrize("seed", [0, 1, 2, 4])
def test_saturated_gates_in_float32_throughout(seed):
    """As on a TPU: where rows are not sheared, they are wrong by up to 0.6 nats."""
    cell, params, inputs = saturated_lstm(3.0, jnp.float32, seed)
    jacobians = jacobian_operator(cell, params, rnnjax.trajectory(cell, params, inputs))
    spectrum = rnnjax.singular_spectrum(rnnjax.factor_product(jacobians, dtype="float32"))
    assert worst(spectrum.log_singular_values, exact_of(jacobians)) < 1e-2


def between(jacobians, first, last):
    factors = {name: getattr(jacobians, name)[first:last] for name in ("carry_derivatives", "recurrent_derivatives")}
    return dataclasses.replace(jacobians, **factors)


def test_profiles_and_grids_of_saturated_gates(dtype):
    cell, params, inputs = saturated_lstm(3.0, dtype, seed=9, num_steps=30)
    jacobians = jacobian_operator(cell, params, rnnjax.trajectory(cell, params, inputs))
    limit = 1e-4 if dtype == np.float32 else 1e-10
    lags, times = [1, 11, 30], [0, 9, 10, 30]
    profile = rnnjax.spectral_profile(cell, params, inputs, lags=lags)
    for lag, values in zip(lags, profile.log_singular_values, strict=True):
        assert worst(values, exact_of(between(jacobians, 30 - lag, 30))) < limit
    grid = rnnjax.spectral_grid(cell, params, inputs, times=times).log_singular_values
    for i, last in enumerate(times):
        for j, first in enumerate(times[:i]):
            assert worst(grid[i, j], exact_of(between(jacobians, first, last))) < limit


@pytest.mark.parametrize("block", ["h", "c"])
def test_blocks_of_the_state(block, dtype):
    """Rows and columns outside a block are zero in the plain basis, not in the sheared one."""
    cell, params, inputs = saturated_lstm(1.0, dtype, num_steps=7)
    jacobians = jacobian_operator(cell, params, rnnjax.trajectory(cell, params, inputs))
    product = np.linalg.multi_dot(np.asarray(jacobians.dense(), np.float64)[::-1])
    own = slice(0, 2) if block == "h" else slice(2, 4)
    expected = np.log(np.linalg.svd(product[own, own], compute_uv=False))
    profile = rnnjax.spectral_profile(cell, params, inputs, lags=[7], block=block).log_singular_values[0]
    grid = rnnjax.spectral_grid(cell, params, inputs, times=[0, 7], block=block).log_singular_values[1, 0]
    for found in (profile, grid):
        np.testing.assert_allclose(found[:2], expected, atol=1e-3 if dtype == np.float32 else 1e-9)
        assert np.all(np.isneginf(found[2:]))


def test_rank_is_lost_where_it_was():
    """Without recurrent weights nothing comes from h: rank H, exactly."""
    cell = rnnjax.LSTMCell(3)
    params = cell.init(jax.random.key(0), 2)
    params = dataclasses.replace(params, recurrent_kernel=jnp.zeros_like(params.recurrent_kernel))
    path = rnnjax.trajectory(cell, params, jax.random.normal(jax.random.key(1), (9, 2)))
    values = rnnjax.log_singular_values(rnnjax.factor_product(jacobian_operator(cell, params, path)))
    assert np.isfinite(values[:3]).all() and np.isneginf(values[3:]).all()


def test_rank_is_lost_where_states_are_zero():
    """While c = 0, o has no influence and h = o c to first order: rank H, exactly."""
    cell = rnnjax.LSTMCell(4)
    params = cell.init(jax.random.key(0), 1)
    inputs = jnp.concatenate([jnp.zeros((5, 1)), jax.random.normal(jax.random.key(1), (10, 1))])
    profile = rnnjax.spectral_profile(cell, params, inputs, lags=[10, 15])
    assert np.isfinite(profile.log_singular_values[0]).all()
    assert (
        np.isfinite(profile.log_singular_values[1, :4]).all() and np.isneginf(profile.log_singular_values[1, 4:]).all()
    )
