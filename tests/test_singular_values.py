"""Singular values of long products against closed forms, invariants and exact arithmetic."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnjax
from rnnjax import testing
from tests.reference_spectra import LIMIT, orthogonal, spectrum, worst


def logs(chain, dtype=None):
    return np.asarray(spectrum(chain, dtype)[0], np.float64)


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


def cluster(num_steps, size, dtype):
    """Singular values from 1.1 to 0.9, too close for QR iteration, and one of 1e-8, along directions that turn."""
    rotations = np.linalg.qr(np.random.default_rng(2).normal(size=(num_steps + 1, size, size)))[0]
    values = np.ones((num_steps, 1, size))
    values[50, 0, :-1] = np.linspace(1.1, 0.9, size - 1)
    values[100:104, 0, -1] = 1e-2
    return jnp.asarray(rotations[1:] * values @ np.swapaxes(rotations[:-1], 1, 2), dtype)


CHAINS = {  # Chains of one shape share one compiled program.
    "condition 900": lambda dtype: testing.chain_of_steps(
        jax.random.key(0), 1000, 4, condition_number=900.0, dtype=dtype
    ),
    "condition 30": lambda dtype: testing.chain_of_steps(
        jax.random.key(1), 200, 6, condition_number=30.0, gain=2.0, dtype=dtype
    ),
    "Gaussian": lambda dtype: gaussian(200, 6, dtype),
    "near identity": lambda dtype: near_identity(200, 6, dtype),
    "cluster": lambda dtype: cluster(200, 6, dtype),
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
    "below every float": (np.diag([1, 1e-30]), 300, [0.0, -9000 * math.log(10)]),
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
    # Entries are rounded to the dtype and every step repeats that error; the result is rounded once. Columns may be
    # left unfactored until rounding has grown to 4e-12 nats a time.
    largest = max((abs(value) for value in expected if np.isfinite(value)), default=0)
    allowed = testing.rounding_tolerance(dtype, 4 * num_steps + 4 * largest) + 3e-11
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


@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
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


def henon_jacobians(num_steps):
    """Jacobians of the Hénon map with a = 1.4, b = 0.3 along its attractor."""
    x, y, steps = 0.1, 0.1, []
    for _ in range(num_steps + 100):
        steps.append([[-2.8 * x, 1], [0.3, 0]])
        x, y = 1 - 1.4 * x * x + y, 0.3 * x
    return np.array(steps[100:])


def test_ten_thousand_steps_of_the_henon_map(dtype):
    chain = henon_jacobians(10_000).astype(dtype)
    exact = testing.exact_log_singular_values(chain)
    values, _, log_abs_det = spectrum(jnp.asarray(chain))
    assert exact[0] > 4000 and exact[-1] < -16_000
    assert worst(values, exact) < LIMIT[dtype.name]
    assert worst([log_abs_det], [10_000 * math.log(np.asarray(0.3, dtype))]) < LIMIT[dtype.name]


@pytest.mark.parametrize("factored_in", ["float32", "float64"])
def test_a_hundred_thousand_rotations_change_no_length(factored_in):
    steps = np.linalg.qr(np.random.default_rng(0).normal(size=(100_000, 3, 3)))[0]
    assert worst(logs(jnp.asarray(steps, jnp.float32), factored_in), [0.0, 0.0, 0.0]) < 1e-2


def test_forty_thousand_nats_in_one_product(dtype):
    """log σ from about 20,000 to −20,000, with directions that are not the axes and differ at each step."""
    chain = testing.chain_of_steps(jax.random.key(3), 9000, 3, condition_number=900.0, dtype=dtype)
    forward, backward = logs(chain), logs(jnp.swapaxes(chain[::-1], 1, 2))
    assert forward[0] > 15_000 and forward[-1] < -15_000
    limit = 2e-2 if dtype == np.float32 else 1e-8  # float32 holds 20,000 to 1e-3
    assert worst(backward, forward) < limit
    assert abs(forward.sum() - np.linalg.slogdet(np.asarray(chain, np.float64))[1].sum()) < 3 * limit


def test_saturated_gates(dtype):
    """Step condition numbers of 1e7 and beyond: beyond float32, within reach of a float64 factorisation."""
    chain = network_jacobians(rnnjax.LSTMCell(6), 200, dtype, 5, 6.0)
    assert np.median(np.linalg.cond(np.asarray(chain, np.float64))) > 1e5
    exact = testing.exact_log_singular_values(np.asarray(chain))
    assert worst(logs(chain), exact) < (1e-3 if dtype == np.float32 else 1e-6)
