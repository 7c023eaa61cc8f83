"""Singular values by lag and between any two times, and the spectral norm at every lag."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnjax
from rnnjax import testing
from rnnjax.jacobians import jacobian_operator
from rnnjax.norms import _norms_of_sequence
from rnnjax.operators import DenseJacobians
from tests.reference_spectra import LIMIT, orthogonal, spectrum, worst

PROFILED = {
    "tanh": rnnjax.VanillaCell(4),
    "lstm": rnnjax.LSTMCell(2),
    "step": rnnjax.StepCell(lambda p, c, x: (jnp.sin(p.recurrent_kernel[:, 0].T @ c) + x, c), np.zeros(4, np.float32)),
}


def profiled(name, dtype, batch_shape=(), num_steps=24):
    cell = PROFILED[name]
    maker = cell if name != "step" else PROFILED["tanh"]
    params = jax.tree.map(lambda a: 1.5 * a, maker.init(jax.random.key(1), 4, dtype))
    inputs = jax.random.normal(jax.random.key(2), (num_steps, *batch_shape, 4), dtype)
    if name == "step":
        cell = rnnjax.StepCell(cell.step_fn, jnp.zeros(4, dtype))
    return cell, params, inputs


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in PROFILED), ("lstm", "float64")], indirect=["dtype"]
)
def test_profiles_are_the_products_of_the_last_steps(name, dtype):
    cell, params, inputs = profiled(name, dtype)
    path = rnnjax.trajectory(cell, params, inputs)
    jacobians = rnnjax.step_jacobians(cell, params, path)
    profile = rnnjax.spectral_profile(cell, params, inputs)
    norms = rnnjax.spectral_norm_profile(jax.jit(jacobian_operator)(cell, params, path))
    np.testing.assert_array_equal(profile.lags, np.arange(1, 25))
    # One product for each lag, all in one batch: earlier steps are replaced by the identity.
    is_last = np.arange(24)[:, None] >= 24 - np.asarray(profile.lags)
    products = jnp.where(is_last[..., None, None], jacobians[:, None], jnp.eye(4, dtype=dtype)[None, None])
    separate, separate_norms, log_abs_det = spectrum(products)
    assert worst(profile.log_singular_values, np.asarray(separate, np.float64)) < LIMIT[dtype.name] / 10
    assert worst(profile.log_abs_det, np.asarray(log_abs_det, np.float64)) < LIMIT[dtype.name] / 10
    assert worst(norms, np.asarray(separate_norms, np.float64)) < LIMIT[dtype.name] / 10
    assert worst(rnnjax.spectral_norm_profile(jacobians), np.asarray(norms, np.float64)) < LIMIT[dtype.name] / 10
    for lag in (1, 2, 13, 24):
        exact = testing.exact_log_singular_values(np.asarray(jacobians[24 - lag :]))
        assert worst(profile.log_singular_values[lag - 1], exact) < LIMIT[dtype.name]


@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
def test_chosen_lags_are_those_of_the_whole_profile(dtype):
    cell, params, inputs = profiled("lstm", dtype)
    whole = rnnjax.spectral_profile(cell, params, inputs)
    assert whole.log_singular_values.shape == (24, 4)
    for lags in ([7, 24], (9, 2), np.array([1, 2]), jnp.array([24, 23])):
        chosen = rnnjax.spectral_profile(cell, params, inputs, lags=lags)
        order = np.sort(np.asarray(lags))
        np.testing.assert_array_equal(chosen.lags, order)
        expected = np.asarray(whole.log_singular_values, np.float64)[order - 1]
        assert worst(chosen.log_singular_values, expected) < LIMIT[dtype.name] / 10
        assert worst(chosen.log_abs_det, np.asarray(whole.log_abs_det, np.float64)[order - 1]) < LIMIT[dtype.name] / 10


def test_profiles_work_inside_other_transformations():
    cell, params, inputs = profiled("tanh", np.float32, (3,), 10)
    profile = jax.jit(lambda x: rnnjax.spectral_profile(cell, params, x, lags=[2, 10]).log_singular_values)
    jacobians = rnnjax.step_jacobians(cell, params, rnnjax.trajectory(cell, params, inputs))
    for values in (profile(inputs), jax.vmap(profile, 1, 1)(inputs)):
        assert values.dtype == jnp.float32
        for index, lag in enumerate([2, 10]):
            chains = np.moveaxis(np.asarray(jacobians[10 - lag :]), 1, 0)
            exact = np.array([testing.exact_log_singular_values(chain) for chain in chains])
            assert worst(values[index], exact) < 1e-5
    assert not jax.config.jax_enable_x64


def test_norm_profiles_keep_their_precision_over_many_steps():
    chain = jnp.asarray(np.broadcast_to(0.55 * orthogonal(2), (3000, 2, 2)), jnp.float32)
    lags = np.arange(1, 3001)
    exact = lags * math.log(np.linalg.norm(np.asarray(chain[0], np.float64), 2))
    np.testing.assert_allclose(rnnjax.spectral_norm_profile(chain), exact, atol=LIMIT["float32"], rtol=0)
    dead = rnnjax.spectral_norm_profile(chain[:5].at[2].set(0))
    np.testing.assert_array_equal(np.isneginf(dead), [False, False, True, True, True])


@pytest.mark.parametrize(
    ("lags", "message"),
    [
        ([0], "lags must be a positive integer, got 0"),
        ([1.5], "lags must be a positive integer, got 1.5"),
        ([2, 25], r"lags must be distinct numbers of steps in \[1, 24\], got \[2, 25\]"),
        ([3, 3], "lags must be distinct"),
        ([], "lags must be distinct"),
    ],
)
def test_bad_lags_are_refused(lags, message):
    with pytest.raises(ValueError, match=message):
        rnnjax.spectral_profile(*profiled("tanh", np.float32), lags=lags)


def test_bad_numbers_are_refused_wherever_they_enter():
    cell, params, inputs = profiled("tanh", np.float32)
    chain = rnnjax.step_jacobians(cell, params, rnnjax.trajectory(cell, params, inputs))
    operator = jax.jit(jacobian_operator)(cell, params, rnnjax.trajectory(cell, params, inputs))
    with pytest.raises(ValueError, match="matrices must be finite, got a NaN or an overflow at time step 9"):
        rnnjax.spectral_norm_profile(chain.at[9, 0, 0].set(np.nan))
    operator = operator.replace(recurrent_kernel=operator.recurrent_kernel.at[1, 0, 2].set(np.nan))
    with pytest.raises(ValueError, match=r"jacobians.recurrent_kernel\[1, 0, 2\] = nan"):
        rnnjax.spectral_norm_profile(operator)
    with pytest.raises(ValueError, match="inputs must be finite"):
        rnnjax.spectral_profile(cell, params, inputs.at[4].set(np.inf))
    with pytest.raises(ValueError, match="dtype must be one of float32, float64, got 'half'"):
        rnnjax.spectral_profile(cell, params, inputs, dtype="half")


BLOCKS = {"h": slice(0, 2), "c": slice(2, 4)}


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_are_those_of_the_products(block, dtype):
    cell, params, inputs = profiled("lstm", dtype)
    jacobians = np.asarray(rnnjax.step_jacobians(cell, params, rnnjax.trajectory(cell, params, inputs)), np.float64)
    profile = rnnjax.spectral_profile(cell, params, inputs, lags=[1, 2, 5], block=block)
    for lag, values in zip((1, 2, 5), profile.log_singular_values, strict=True):
        product = np.linalg.multi_dot([np.eye(4), *jacobians[::-1][:lag]])[BLOCKS[block], BLOCKS[block]]
        np.testing.assert_allclose(
            values[:2], np.log(np.linalg.svd(product, compute_uv=False)), atol=1e3 * LIMIT[dtype.name] ** 1.5
        )
        assert np.isneginf(np.asarray(values[2:])).all()
    with pytest.raises(ValueError, match="block must be one of c, h, got 'x'"):
        rnnjax.spectral_profile(cell, params, inputs, block="x")


def test_blocks_of_any_step_function_are_named_like_its_carry():
    cell = rnnjax.StepCell(
        lambda p, s, x: ({"fast": p * s["slow"] + x, "slow": s["fast"] * s["slow"]}, x),
        {"fast": jnp.ones(2), "slow": jnp.ones(2)},
    )
    inputs = jnp.linspace(0.5, 1, 12).reshape(6, 2)
    profile = rnnjax.spectral_profile(cell, 0.5, inputs, lags=[1, 2], block="['fast']")
    assert np.isneginf(np.asarray(profile.log_singular_values[0])).all()  # fast reaches fast in two steps only
    path = rnnjax.trajectory(cell, 0.5, inputs)
    expected = np.sort(np.log(0.5 * np.abs(np.asarray(path.carries["slow"][4]))))[::-1]
    np.testing.assert_allclose(profile.log_singular_values[1, :2], expected, atol=1e-6)


@pytest.mark.parametrize("batch_shape", [(), (2,)])
def test_grid_holds_the_product_of_every_pair_of_times(batch_shape, dtype):
    cell, params, inputs = profiled("lstm", dtype, batch_shape)
    jacobians = np.asarray(rnnjax.step_jacobians(cell, params, rnnjax.trajectory(cell, params, inputs)))
    times = [0, 1, 7, 12, 24]
    grid = rnnjax.spectral_grid(cell, params, inputs, times=times)
    np.testing.assert_array_equal(grid.times, times)
    assert grid.log_singular_values.shape == (5, 5, *batch_shape, 4)
    for a, later in enumerate(times):
        for b, earlier in enumerate(times):
            values = np.asarray(grid.log_singular_values[a, b])
            assert np.isnan(values).all() == (later <= earlier)
            for index in np.ndindex(*batch_shape) if later > earlier else ():
                exact = testing.exact_log_singular_values(jacobians[(slice(earlier, later), *index)])
                assert worst(values[index], exact) < LIMIT[dtype.name]


def test_grid_of_a_block_and_its_default_times():
    cell, params, inputs = profiled("lstm", np.float32)
    grid = rnnjax.spectral_grid(cell, params, inputs, block="c")
    assert grid.times[0] == 0 and grid.times[-1] == 24 and len(grid.times) == 17
    profile = rnnjax.spectral_profile(cell, params, inputs, lags=[24], block="c")
    np.testing.assert_allclose(grid.log_singular_values[-1, 0, :2], profile.log_singular_values[0, :2], atol=1e-4)


@pytest.mark.parametrize("times", [[3], [0, 25], [1, 1], [-1, 2], "ab", 3])
def test_bad_times_are_refused(times):
    with pytest.raises(ValueError, match=r"^times must be"):
        rnnjax.spectral_grid(*profiled("tanh", np.float32), times=times)


@pytest.mark.parametrize("size", [12, 40])
def test_norm_at_every_lag_of_wide_states(size, dtype):
    """Wide enough for subspace iteration, and long enough for directions to fall below rounding and be left out."""
    rng = np.random.default_rng(size)
    chain = rng.normal(size=(150, size, size)) / np.sqrt(size)
    chain[::7] += np.eye(size)
    product, scale, expected = np.eye(size), 0.0, []
    for matrix in chain[::-1]:
        product = product @ matrix
        norm = np.linalg.norm(product, 2)
        product, scale = product / norm, scale + np.log(norm)
        expected.append(scale)
    norms = rnnjax.spectral_norm_profile(jnp.asarray(chain, dtype))
    np.testing.assert_allclose(norms, expected, atol=1e-4 if dtype == np.float32 else 1e-8)


@pytest.mark.parametrize("num_steps", [1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("size", [1, 3, 40])
def test_norm_of_few_steps_is_that_of_their_product(size, num_steps):
    steps = np.random.default_rng(num_steps).normal(size=(num_steps, size, size)) / size**0.5
    with jax.enable_x64(True):
        found, product = rnnjax.spectral_norm_profile(jnp.asarray(steps)), np.eye(size)
    for lag in range(num_steps):
        product = product @ steps[num_steps - 1 - lag]
        np.testing.assert_allclose(found[lag], np.log(np.linalg.norm(product, 2)), atol=1e-6)


def test_norm_where_another_direction_takes_the_lead():
    shrinking = jnp.concatenate([jnp.full(9, 0.9), jnp.full(1, 0.8), jnp.full(20, 0.7)])
    growing = jnp.concatenate([jnp.full(29, 0.2), jnp.full(1, 1.1)])
    chain = jnp.stack([jnp.diag(shrinking if t > 30 else growing) for t in range(60)])
    logs = np.log(np.asarray(jnp.stack([jnp.diagonal(m) for m in chain]), np.float64))
    expected = np.cumsum(logs[::-1], axis=0).max(axis=1)
    np.testing.assert_allclose(rnnjax.spectral_norm_profile(chain), expected, atol=1e-4)


def passing_slowly(rate, seed, size=12, num_steps=240):
    """Known singular values e^(sums of logs), the first two of which take the lead in turns, and their norms by lag."""
    rng = np.random.default_rng(seed)
    frames = [np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(num_steps + 1)]
    logs = np.broadcast_to(np.linspace(-0.02, -0.3, size), (num_steps, size)).copy()
    turns = np.arange(num_steps) // 40 % 2
    logs[:, 0], logs[:, 1] = -0.01 - rate * turns, -0.01 - rate * (1 - turns)
    logs += 0.3 * rate * rng.normal(size=logs.shape)
    chain = [frames[t] @ np.diag(np.exp(logs[t])) @ frames[t + 1].T for t in range(num_steps)][::-1]
    return np.stack(chain), np.cumsum(logs, axis=0).max(axis=1)


@pytest.mark.parametrize("rate", [1e-3, 3e-3, 3e-2])
def test_norm_where_two_directions_pass_each_other_slowly(rate, dtype):
    for seed in range(6):
        chain, exact = passing_slowly(rate, seed)
        norms = rnnjax.spectral_norm_profile(jnp.asarray(chain, dtype))
        np.testing.assert_allclose(norms, exact, atol=1e-4 if dtype == np.float32 else 1e-8)


def test_norm_that_iterations_do_not_find_comes_from_an_svd(monkeypatch):
    monkeypatch.setattr("rnnjax.norms._MAX_ITERATIONS", 1)
    chain, exact = passing_slowly(3e-3, 0, num_steps=20)
    norms = _norms_of_sequence(DenseJacobians(jnp.asarray(chain, jnp.float32)))
    np.testing.assert_allclose(norms, exact, atol=1e-5)


def test_parts_of_a_state_of_many_carries():
    cell = rnnjax.SkipCell(2, span=3)
    params, inputs = cell.init(jax.random.key(0), 1), jnp.ones((4, 1))
    whole = rnnjax.spectral_profile(cell, params, inputs).log_singular_values
    assert whole.shape == (4, 6)
    jacobians = rnnjax.step_jacobians(cell, params, rnnjax.trajectory(cell, params, inputs))
    for index, block in enumerate(["h", "[1]", "[2]"]):
        part = rnnjax.spectral_profile(cell, params, inputs, lags=[1], block=block).log_singular_values[0]
        own = slice(2 * index, 2 * index + 2)
        expected = np.linalg.svd(np.asarray(jacobians[-1, own, own], np.float64), compute_uv=False)
        np.testing.assert_allclose(np.exp(part[:2]), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"block must be one of .*\[2\]"):
        rnnjax.spectral_profile(cell, params, inputs, block="c")


def test_error_estimates_hold_at_short_lags_of_ill_conditioned_steps():
    """No product has settled there: the error is that of the last step and its factorisation, κ up to 1e12."""
    rng, size, errors, estimates = np.random.default_rng(0), 6, [], []
    with jax.enable_x64(True):
        step = lambda steps, h, x: (jnp.matmul(steps[x[0].astype(int)], h, precision="highest"), h)  # noqa: E731
        cell, times = rnnjax.StepCell(step, jnp.zeros(size)), jnp.arange(2.0)[:, None]
        for _ in range(25):
            values = 10.0 ** -rng.uniform(0, 12, (2, size))
            left, right = (np.linalg.qr(rng.normal(size=(2, size, size)))[0] for _ in range(2))
            steps = left * values[:, None] @ right
            profile = rnnjax.spectral_profile(cell, jnp.asarray(steps), times)
            grid = rnnjax.spectral_grid(cell, jnp.asarray(steps), times, times=[0, 1, 2])
            for result, pair in ((profile, (0,)), (profile, (1,)), (grid, (2, 1)), (grid, (2, 0))):
                exact = testing.exact_log_singular_values(steps if pair in ((1,), (2, 0)) else steps[1:])
                errors.append(abs(np.asarray(result.log_singular_values[pair]) - exact))
                estimates.append(np.asarray(result.error_estimate[pair]))
    assert np.mean(np.array(errors) > np.array(estimates)) < 0.01
