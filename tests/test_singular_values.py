"""Singular values of long products against closed forms, invariants and exact arithmetic."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnjax
from rnnjax import testing
from rnnjax.jacobians import jacobian_operator

LIMIT = {"float32": 2e-3, "float64": 1e-9}  # nats


@functools.partial(jax.jit, static_argnames="dtype")
def spectrum(chain, dtype=None):
    return rnnjax.log_singular_values(rnnjax.factor_product(chain, dtype=dtype))


def logs(chain, dtype=None):
    return np.asarray(spectrum(chain, dtype), np.float64)


def worst(actual, exact):
    """Largest difference in nats; rank loss must agree exactly."""
    actual, exact = np.asarray(actual, np.float64), np.asarray(exact)
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(exact))
    live = np.isfinite(exact)
    return np.abs(actual[live] - exact[live]).max(initial=0.0)


def network_jacobians(cell, num_steps, dtype, seed, scale):
    """Step Jacobians of a network with Gaussian weights, driven by Gaussian inputs."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * scale / np.sqrt(cell.hidden_size), dtype),
        cell.init(jax.random.key(0), 2),
    )
    inputs = jnp.asarray(rng.normal(size=(num_steps, 2)), dtype)
    return rnnjax.step_jacobians(cell, params, rnnjax.trajectory(cell, params, inputs))


def gaussian(num_steps, size, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(num_steps, size, size)) / np.sqrt(size), dtype)


CHAINS = {
    "condition 900": lambda dtype: testing.chain_of_steps(jax.random.key(0), 1000, 4, condition_number=900.0, dtype=dtype),
    "condition 30, S=6": lambda dtype: testing.chain_of_steps(
        jax.random.key(1), 400, 6, condition_number=30.0, gain=2.0, dtype=dtype
    ),
    "Gaussian": lambda dtype: gaussian(500, 5, dtype),
    "near identity": lambda dtype: jnp.eye(6, dtype=dtype)[None] * 0.98 + 0.05 * gaussian(300, 6, dtype, 1),
    "saturated tanh": lambda dtype: network_jacobians(rnnjax.VanillaCell(12), 200, dtype, 2, 3.0),
    "LSTM": lambda dtype: network_jacobians(rnnjax.LSTMCell(3), 300, dtype, 3, 1.0),
    "GRU": lambda dtype: network_jacobians(rnnjax.GRUCell(4), 200, dtype, 4, 2.0),
    "ReLU": lambda dtype: network_jacobians(rnnjax.VanillaCell(6, activation="relu"), 60, dtype, 5, 1.5),
}


@pytest.mark.parametrize("name", CHAINS)
def test_all_singular_values_are_those_of_exact_arithmetic(name, dtype):
    chain = CHAINS[name](dtype)
    exact = testing.exact_log_singular_values(np.asarray(chain))
    assert worst(logs(chain), exact) < LIMIT[dtype.name]
    if dtype == np.float32 and name in ("condition 900", "saturated tanh"):
        assert worst(logs(chain, "float32"), exact) < LIMIT["float32"]


def orthogonal(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def shear_logs(num_steps, slope):
    grown = slope * num_steps
    return np.log([(math.hypot(grown, 2) + grown) / 2, 2 / (math.hypot(grown, 2) + grown)])


EXACT = {  # step matrix, number of steps, log σ
    "g times orthogonal": (0.5 * orthogonal(6), 1000, [1000 * math.log(0.5)] * 6),
    "odd size": (1.25 * orthogonal(5), 300, [300 * math.log(1.25)] * 5),
    "diagonal": (np.diag([0.5, -3.0, 1.0, 0.125]), 700, [700 * math.log(s) for s in (3, 1, 0.5, 0.125)]),
    "identity": (np.eye(3), 50, [0.0] * 3),
    "shear": (np.array([[1, 1.5], [0, 1]]), 400, shear_logs(400, 1.5)),
    "cat map": (np.array([[2.0, 1.0], [1.0, 1.0]]), 1000, [962.423650119207, -962.423650119207]),
    "one unit": (np.array([[-0.75]]), 1000, [1000 * math.log(0.75)]),
    "one step": (np.array([[3.0, 0], [4, 5]]), 1, [math.log(45) / 2, math.log(5) / 2]),
    "one unit, one step": (np.array([[2.0]]), 1, [math.log(2)]),
    "a lost unit": (np.array([[0.0]]), 3, [-np.inf]),
    "nilpotent shift, alive": (np.eye(5, k=1), 3, [0.0, 0.0, -np.inf, -np.inf, -np.inf]),
    "nilpotent shift, dead": (np.eye(5, k=1), 5, [-np.inf] * 5),
    "zero": (np.zeros((4, 4)), 10, [-np.inf] * 4),
    "rank one": (np.outer([3.0, 0, 4], [0, 2, 0]), 1, [math.log(10), -np.inf, -np.inf]),
    "a scale beyond every float": (np.diag([1e30, 1e-30]), 100, [3000 * math.log(10), -3000 * math.log(10)]),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_cases(name, dtype):
    step, num_steps, expected = EXACT[name]
    chain = jnp.asarray(np.broadcast_to(step, (num_steps, *step.shape)), dtype)
    # The entries themselves are rounded to the dtype, and every step repeats that error.
    allowed = num_steps * testing.rounding_tolerance(dtype, 4) + testing.rounding_tolerance(dtype, 4 * abs(expected[0]) + 4)
    product = rnnjax.factor_product(chain)
    values = np.asarray(rnnjax.log_singular_values(product), np.float64)
    assert values.shape == (len(step),)
    assert worst(values, np.array(expected)) < min(allowed, 100 * LIMIT[dtype.name])
    assert worst([rnnjax.log_spectral_norm(product)], np.array(expected[:1])) < min(allowed, 100 * LIMIT[dtype.name])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dead", [1, 3])
def test_dead_units_lose_exactly_their_rank_and_harm_no_other(dead, transposed, dtype):
    rng = np.random.default_rng(dead)
    chain = rng.normal(size=(40, 6, 6))
    for step in (3, 17, 18, 39):  # one unit, or several, dead at once, in other places each time
        chain[step, rng.permutation(6)[:dead]] = 0
    chain = jnp.asarray(np.swapaxes(chain[::-1], 1, 2) if transposed else chain, dtype)
    exact = testing.exact_log_singular_values(np.asarray(chain))
    assert 0 < np.isneginf(exact).sum() < 6
    assert worst(logs(chain), exact) < LIMIT[dtype.name]


def test_invariants_of_any_chain(dtype):
    chain = gaussian(300, 5, dtype, 7)
    product = rnnjax.factor_product(chain)
    values = logs(chain)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=LIMIT[dtype.name])
    assert (np.diff(values) <= 0).all()
    close(values.sum(), product.log_abs_det)
    close(rnnjax.log_spectral_norm(product), values[0])
    close(logs(chain * 4), values + 300 * math.log(4))
    close(logs(jnp.swapaxes(chain[::-1], 1, 2)), values)
    assert np.abs(logs(chain[::-1]) - values).max() > 0.1
    rotation = jnp.asarray(orthogonal(5), dtype)
    close(logs(chain.at[-1].set(jnp.matmul(rotation, chain[-1], precision="highest"))), values)


def test_batches_maps_and_narrow_matrices(dtype):
    chain = gaussian(30, 12, dtype).reshape(30, 2, 2, 6, 6)[..., :3, :3]
    alone = np.array([[logs(chain[:, i, j]) for j in range(2)] for i in range(2)])
    close = functools.partial(np.testing.assert_allclose, rtol=testing.rounding_tolerance(dtype, 30))
    close(logs(chain), alone)
    close(jax.jit(jax.vmap(jax.vmap(spectrum, 1), 1))(chain), alone)
    norm = rnnjax.log_spectral_norm(rnnjax.factor_product(chain))
    close(norm, alone[..., 0])
    narrow = chain[:, 0, 0].astype(jnp.bfloat16)
    exact = testing.exact_log_singular_values(np.asarray(narrow, np.float64))
    assert worst(logs(narrow), exact) < LIMIT["float32"]


PROFILED = {
    "tanh": rnnjax.VanillaCell(4),
    "lstm": rnnjax.LSTMCell(2),
    "step": rnnjax.StepCell(lambda p, c, x: (jnp.sin(p.recurrent_kernel[:, 0].T @ c) + x, c), np.zeros(4, np.float32)),
}


def profiled(name, dtype, batch_shape=(), num_steps=40):
    cell = PROFILED[name]
    maker = cell if name != "step" else PROFILED["tanh"]
    params = jax.tree.map(lambda a: 1.5 * a, maker.init(jax.random.key(1), 4, dtype))
    inputs = jax.random.normal(jax.random.key(2), (num_steps, *batch_shape, 4), dtype)
    if name == "step":
        cell = rnnjax.StepCell(cell.step_fn, jnp.zeros(4, dtype))
    return cell, params, inputs


@pytest.mark.parametrize("name", PROFILED)
def test_profiles_are_the_products_of_the_last_steps(name, dtype):
    cell, params, inputs = profiled(name, dtype)
    path = rnnjax.trajectory(cell, params, inputs)
    jacobians = rnnjax.step_jacobians(cell, params, path)
    profile = rnnjax.spectral_profile(cell, params, inputs)
    norms = rnnjax.spectral_norm_profile(jacobian_operator(cell, params, path))
    np.testing.assert_array_equal(profile.lags, np.arange(1, 41))
    assert profile.log_singular_values.shape == (40, 4)
    for lag in (1, 2, 3, 17, 40):
        chain = jacobians[40 - lag :]
        exact = testing.exact_log_singular_values(np.asarray(chain))
        assert worst(profile.log_singular_values[lag - 1], exact) < LIMIT[dtype.name]
        assert worst(logs(chain), exact) < LIMIT[dtype.name]
        assert norms[lag - 1] == pytest.approx(exact[0], abs=LIMIT[dtype.name])
        assert profile.log_abs_det[lag - 1] == pytest.approx(exact.sum(), abs=LIMIT[dtype.name])
    np.testing.assert_allclose(rnnjax.spectral_norm_profile(jacobians), norms, atol=LIMIT[dtype.name])


@pytest.mark.parametrize("lags", [[40], [1, 7, 8, 30], np.array([9, 2]), jnp.array([40, 1])])
def test_chosen_lags_are_those_of_the_whole_profile(lags, dtype):
    arguments = profiled("lstm", dtype, (2,))
    whole = rnnjax.spectral_profile(*arguments)
    chosen = rnnjax.spectral_profile(*arguments, lags=lags)
    order = np.sort(np.asarray(lags))
    np.testing.assert_array_equal(chosen.lags, order)
    for part, full in [(chosen.log_singular_values, whole.log_singular_values), (chosen.log_abs_det, whole.log_abs_det)]:
        np.testing.assert_allclose(part, full[order - 1], rtol=testing.rounding_tolerance(dtype, 100), atol=1e-5)
    alone = rnnjax.spectral_profile(arguments[0], arguments[1], arguments[2][:, 1], lags=lags)
    np.testing.assert_allclose(alone.log_singular_values, chosen.log_singular_values[:, 1], rtol=1e-5, atol=1e-5)


def test_profiles_work_inside_other_transformations():
    cell, params, inputs = profiled("tanh", np.float32, (3,), 10)
    expected = rnnjax.spectral_profile(cell, params, inputs, lags=[2, 10])
    compiled = jax.jit(lambda p, x: rnnjax.spectral_profile(cell, p, x, lags=[2, 10]))(params, inputs)
    mapped = jax.vmap(lambda x: rnnjax.spectral_profile(cell, params, x, lags=[2, 10]).log_singular_values, 1, 1)(inputs)
    for values in (compiled.log_singular_values, mapped):
        assert values.dtype == jnp.float32
        np.testing.assert_allclose(values, expected.log_singular_values, rtol=1e-5, atol=1e-5)
    assert not jax.config.jax_enable_x64


def test_norm_profiles_keep_their_precision_over_many_steps():
    chain = jnp.asarray(np.broadcast_to(0.55 * orthogonal(2), (3000, 2, 2)), jnp.float32)
    lags = np.arange(1, 3001)
    exact = lags * np.linalg.norm(np.asarray(chain[0], np.float64), 2)
    exact = lags * math.log(np.linalg.norm(np.asarray(chain[0], np.float64), 2))
    np.testing.assert_allclose(rnnjax.spectral_norm_profile(chain), exact, atol=LIMIT["float32"], rtol=0)
    dead = rnnjax.spectral_norm_profile(chain[:5].at[2].set(0))
    np.testing.assert_array_equal(np.isneginf(dead), [False, False, True, True, True])


@pytest.mark.parametrize(
    ("lags", "message"),
    [
        ([0], "lags must be a positive integer, got 0"),
        ([1.5], "lags must be a positive integer, got 1.5"),
        ([2, 41], r"lags must be distinct numbers of steps in \[1, 40\], got \[2, 41\]"),
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
    operator = jacobian_operator(cell, params, rnnjax.trajectory(cell, params, inputs))
    with pytest.raises(ValueError, match="matrices must be finite, got a NaN or an overflow at time step 9"):
        rnnjax.spectral_norm_profile(chain.at[9, 0, 0].set(np.nan))
    with pytest.raises(ValueError, match=r"jacobians.recurrent_kernel\[1, 0, 2\] = nan"):
        bad = operator.recurrent_kernel.at[1, 0, 2].set(np.nan)
        rnnjax.spectral_norm_profile(operator.replace(recurrent_kernel=bad))
    with pytest.raises(ValueError, match="inputs must be finite"):
        rnnjax.spectral_profile(cell, params, inputs.at[4].set(np.inf))
    with pytest.raises(ValueError, match="dtype must be one of float32, float64, got 'half'"):
        rnnjax.spectral_profile(cell, params, inputs, dtype="half")
