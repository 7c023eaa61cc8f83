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
    """log σ_i, log of the spectral norm and log|det| of a product, in one program."""
    product = rnnjax.factor_product(chain, dtype=dtype)
    return rnnjax.log_singular_values(product), rnnjax.log_spectral_norm(product), product.log_abs_det


def logs(chain, dtype=None):
    return np.asarray(spectrum(chain, dtype)[0], np.float64)


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
        jax.eval_shape(lambda: cell.init(jax.random.key(0), 2)),
    )
    inputs = jnp.asarray(rng.normal(size=(num_steps, 2)), dtype)
    return rnnjax.step_jacobians(cell, params, rnnjax.trajectory(cell, params, inputs))


def gaussian(num_steps, size, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(num_steps, size, size)) / np.sqrt(size), dtype)


def near_identity(num_steps, size, dtype):
    return 0.98 * jnp.eye(size, dtype=dtype)[None] + 0.05 * gaussian(num_steps, size, dtype, 1)


CHAINS = {  # Chains of one shape share one compiled program.
    "condition 900": lambda dtype: testing.chain_of_steps(
        jax.random.key(0), 1000, 4, condition_number=900.0, dtype=dtype
    ),
    "condition 30": lambda dtype: testing.chain_of_steps(
        jax.random.key(1), 200, 6, condition_number=30.0, gain=2.0, dtype=dtype
    ),
    "Gaussian": lambda dtype: gaussian(200, 6, dtype),
    "near identity": lambda dtype: near_identity(200, 6, dtype),
    "saturated tanh": lambda dtype: network_jacobians(rnnjax.VanillaCell(12), 200, dtype, 2, 3.0),
    "LSTM": lambda dtype: network_jacobians(rnnjax.LSTMCell(3), 200, dtype, 3, 1.0),
    "GRU": lambda dtype: network_jacobians(rnnjax.GRUCell(6), 200, dtype, 4, 2.0),
    "ReLU": lambda dtype: network_jacobians(rnnjax.VanillaCell(6, activation="relu"), 200, dtype, 6, 1.5),
}


@pytest.mark.parametrize("name", CHAINS)
def test_all_singular_values_are_those_of_exact_arithmetic(name, dtype):
    chain = CHAINS[name](dtype)
    exact = testing.exact_log_singular_values(np.asarray(chain))
    assert worst(logs(chain), exact) < LIMIT[dtype.name]
    if dtype == np.float32 and chain.shape[-1] == 6:
        assert worst(logs(chain, "float32"), exact) < LIMIT["float32"]


def orthogonal(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def shear_logs(num_steps, slope):
    grown = slope * num_steps
    return np.log([(math.hypot(grown, 2) + grown) / 2, 2 / (math.hypot(grown, 2) + grown)])


EXACT = {  # step matrix, number of steps, log σ
    "g times orthogonal": (0.5 * orthogonal(4), 300, [300 * math.log(0.5)] * 4),
    "diagonal": (np.diag([0.5, -3.0, 1.0, 0.125]), 300, [300 * math.log(s) for s in (3, 1, 0.5, 0.125)]),
    "identity": (np.eye(4), 300, [0.0] * 4),
    "zero": (np.zeros((4, 4)), 300, [-np.inf] * 4),
    "rank one": (np.outer([3, 0, 4, 0], [0.5, 0, 0, 0]), 300, [math.log(2.5) + 299 * math.log(1.5)] + [-np.inf] * 3),
    "shear": (np.array([[1, 1.5], [0, 1]]), 300, shear_logs(300, 1.5)),
    "cat map": (np.array([[2.0, 1.0], [1.0, 1.0]]), 300, [300 * 0.962423650119207, -300 * 0.962423650119207]),
    "beyond every float": (np.diag([1e30, 1e-30]), 300, [9000 * math.log(10), -9000 * math.log(10)]),
    "one unit": (np.array([[-0.75]]), 300, [300 * math.log(0.75)]),
    "one lost unit": (np.array([[0.0]]), 300, [-np.inf]),
    "odd size": (1.25 * orthogonal(5), 5, [5 * math.log(1.25)] * 5),
    "nilpotent shift, all lost": (np.eye(5, k=1), 5, [-np.inf] * 5),
    "nilpotent shift, one left": (np.eye(5, k=1), 4, [0.0] + [-np.inf] * 4),
    "one step": (np.array([[3.0, 0], [4, 5]]), 1, [math.log(45) / 2, math.log(5) / 2]),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_cases(name, dtype):
    step, num_steps, expected = EXACT[name]
    chain = jnp.asarray(np.broadcast_to(step, (num_steps, *step.shape)), dtype)
    # Entries are rounded to the dtype and every step repeats that error; the result is rounded once.
    largest = max((abs(value) for value in expected if np.isfinite(value)), default=0)
    allowed = testing.rounding_tolerance(dtype, 4 * num_steps + 4 * largest)
    values, norm, _ = spectrum(chain)
    assert values.shape == (len(step),)
    assert worst(values, expected) < allowed
    assert worst([norm], expected[:1]) < allowed


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dead", [1, 3])
def test_dead_units_lose_exactly_their_rank_and_harm_no_other(dead, transposed, dtype):
    rng = np.random.default_rng(dead)
    chain = rng.normal(size=(40, 6, 6))
    for step in (3, 17, 18):  # one unit, or several, dead at once, in other places each time
        chain[step, rng.permutation(6)[:dead]] = 0
    chain = jnp.asarray(np.swapaxes(chain[::-1], 1, 2) if transposed else chain, dtype)
    exact = testing.exact_log_singular_values(np.asarray(chain))
    assert 0 < np.isneginf(exact).sum() < 6
    assert worst(logs(chain), exact) < LIMIT[dtype.name]


COINCIDING = {
    "two columns": [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 2]],
    "columns and rows": [[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0]],
}


@pytest.mark.parametrize("name", COINCIDING)
def test_coinciding_columns_lose_their_rank_once(name, dtype):
    """A zero on the diagonal of R that is not its last one must not be counted twice."""
    chain = np.stack([np.array(COINCIDING[name], float)] * 20)
    assert worst(logs(jnp.asarray(chain, dtype)), testing.exact_log_singular_values(chain)) < LIMIT[dtype.name]


def test_invariants_of_any_chain(dtype):
    chain = gaussian(200, 6, dtype, 7)
    values, norm, log_abs_det = map(np.asarray, spectrum(chain))
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=LIMIT[dtype.name])
    assert (np.diff(values) <= 0).all()
    close(np.sum(values, dtype=np.float64), log_abs_det)
    close(norm, values[0])
    close(logs(chain * 4), values + 200 * math.log(4))
    close(logs(jnp.swapaxes(chain[::-1], 1, 2)), values)
    assert np.abs(logs(chain[::-1]) - values).max() > 0.1
    rotation = jnp.asarray(orthogonal(6), dtype)
    close(logs(chain.at[-1].set(jnp.matmul(rotation, chain[-1], precision="highest"))), values)


def test_batches_maps_and_narrow_matrices(dtype):
    """Mapping a program that is compiled already is the case in which float64 is easily lost on the way."""
    chain = jnp.stack([gaussian(30, 3, dtype, seed) for seed in range(4)], axis=1).reshape(30, 2, 2, 3, 3)
    exact = np.array([[testing.exact_log_singular_values(np.asarray(chain[:, i, j])) for j in (0, 1)] for i in (0, 1)])
    mapped = jax.jit(jax.vmap(jax.vmap(spectrum, 1), 1))(chain)
    for values, norm, log_abs_det in (spectrum(chain), mapped):
        assert values.dtype == dtype
        assert worst(values, exact) < LIMIT[dtype.name] / 50
        assert worst(norm, exact[..., 0]) < LIMIT[dtype.name] / 50
        assert worst(log_abs_det, exact.sum(-1)) < LIMIT[dtype.name] / 50
    narrow = chain[:, 0, 0].astype(jnp.bfloat16)
    assert worst(logs(narrow), testing.exact_log_singular_values(np.asarray(narrow, np.float64))) < 1e-5


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


@pytest.mark.parametrize("name", PROFILED)
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
