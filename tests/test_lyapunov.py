"""Lyapunov exponents against closed forms, determinants, random-matrix theory and the literature's maps."""

import math

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import rnnjax
from rnnjax import testing
from rnnjax.frames import block_growth, frame_growth, random_frame
from rnnjax.jacobians import jacobian_operator
from rnnjax.lyapunov import finite_time_exponents, kaplan_yorke_dimension, lyapunov_spectrum
from rnnjax.operators import DenseJacobians

pytestmark = pytest.mark.slow

OPTIONS = ("num_steps", "num_exponents", "num_transient", "num_state_transient", "block_length")
spectrum = jax.jit(lyapunov_spectrum, static_argnames=OPTIONS)
LIMIT = {"float32": 1e-5, "float64": 1e-12}  # nats per step
ROOT = np.array([[0.6, -0.8], [0.8, 0.6]])
NUM_TRANSIENT, NUM_STEPS = 100, 400


def linear_step(_, state, inputs):
    state = inputs.reshape(state.size, state.size) @ state
    return state, state


def chain_spectrum(matrices, **options):
    """Exponents of s_t = J_t s_{t−1} for given Jacobians ``[T, ..., S, S]``."""
    cell = rnnjax.StepCell(linear_step, jnp.zeros(matrices.shape[-1], matrices.dtype))
    return spectrum(cell, {}, matrices.reshape(*matrices.shape[:-2], -1), **options)


def constant_chain(matrix, dtype):
    return jnp.broadcast_to(jnp.asarray(matrix, dtype)[None], (NUM_STEPS, 2, 2))


@pytest.mark.parametrize(
    ("matrix", "exponents", "dimension"),
    [
        (0.7 * ROOT, [math.log(0.7)] * 2, 0),
        (3 * ROOT, [math.log(3)] * 2, 2),
        (np.diag([0.5, -4.0]), [math.log(4), math.log(0.5)], 2),
        (np.diag([0.25, 2.0]), [math.log(2), math.log(0.25)], 1.5),
        ([[2, 1], [1, 1]], [0.9624236501192069, -0.9624236501192069], 2),
        ([[0, 1], [3, 0]], [math.log(3) / 2] * 2, 2),
        (np.diag([2.0, 0.0]), [math.log(2), -math.inf], 1),
        (np.zeros((2, 2)), [-math.inf, -math.inf], 0),
    ],
    ids=["0.7 rotation", "3 rotation", "diagonal", "contracting", "cat map", "swap", "rank 1", "zero"],
)
def test_constant_jacobians(matrix, exponents, dimension, dtype):
    result = chain_spectrum(constant_chain(matrix, dtype), num_transient=NUM_TRANSIENT)
    assert result.exponents.dtype == dtype
    np.testing.assert_allclose(result.exponents, exponents, atol=LIMIT[dtype.name])
    np.testing.assert_allclose(result.kaplan_yorke_dimension, dimension, atol=10 * LIMIT[dtype.name])
    lost = np.isneginf(exponents)
    np.testing.assert_array_equal(np.isnan(result.standard_errors), lost)
    np.testing.assert_array_equal(np.isnan(result.convergence_drift), lost)


@pytest.mark.parametrize("a", [1.0, 5.0])
def test_shear_has_exponents_zero_although_its_singular_values_grow(a):
    key = jax.random.key(3)
    chain = constant_chain([[1, a], [0, 1]], jnp.float32)
    result = chain_spectrum(chain, num_transient=NUM_TRANSIENT, key=key)
    first, second = np.asarray(random_frame(key, DenseJacobians(chain), 2), np.float64)[:, 0]
    lengths = [math.hypot(first + a * t * second, second) for t in (NUM_TRANSIENT, NUM_STEPS)]  # ‖Aᵗq‖
    growth = math.log(lengths[1] / lengths[0]) / (NUM_STEPS - NUM_TRANSIENT)
    np.testing.assert_allclose(result.exponents, [growth, -growth], atol=1e-5)
    assert 0 < result.exponents[0] < 0.01


def random_exponents(size):
    """λ_i of products of Gaussian matrices of variance 1/N, and the variances of log|R_ii| of a step."""
    halves = [mpmath.mpf(size - i) / 2 for i in range(size)]
    exponents = [float((mpmath.log(mpmath.mpf(2) / size) + mpmath.digamma(half)) / 2) for half in halves]
    return np.array(exponents), np.array([float(mpmath.psi(1, half) / 4) for half in halves])


@pytest.fixture(scope="module")
def gaussian_chain():
    return jnp.asarray(np.random.default_rng(0).normal(size=(1000, 6, 4, 4)) / 2, jnp.float32)


@pytest.fixture(scope="module")
def gaussian_result(gaussian_chain):
    return chain_spectrum(gaussian_chain)


def test_gaussian_matrices_have_the_exponents_of_theory(gaussian_result):
    exponents, variances = random_exponents(4)
    np.testing.assert_allclose(exponents, [-0.135181, -0.328329, -0.635181, -1.328329], atol=1e-6)
    deviations = np.asarray(gaussian_result.exponents) - exponents
    assert np.all(np.abs(deviations) < 4 * np.asarray(gaussian_result.standard_errors))
    assert np.all(np.abs(deviations.mean(axis=0)) < 4 * np.sqrt(variances / 6000))


@pytest.mark.parametrize(("num_steps", "num_sequences", "relative"), [(1000, 6, 0.5), (39, 64, 0.2)])
def test_standard_errors_are_those_of_independent_steps(num_steps, num_sequences, relative, gaussian_result):
    # Variances from 20 block means and n sequences are known to √(2/19n): 13 % for n = 6, 4 % for n = 64.
    result = gaussian_result
    if num_steps != 1000:
        normal = np.random.default_rng(1).normal(size=(num_steps, num_sequences, 4, 4))
        result = chain_spectrum(jnp.asarray(normal / 2, jnp.float32))
    variances = random_exponents(4)[1] / num_steps
    assert result.standard_errors.shape == (num_sequences, 4)
    np.testing.assert_allclose(np.mean(np.square(result.standard_errors), axis=0), variances, rtol=relative)


def test_leading_exponents_are_those_of_the_full_spectrum(gaussian_chain, gaussian_result):
    # A gap of 0.3 nats over 500 steps leaves nothing of how the two frames start.
    leading = chain_spectrum(gaussian_chain, num_transient=500, num_exponents=2, block_length=1)
    assert leading.local_exponents.shape == (500, 6, 2)
    full = gaussian_result.local_exponents[10:, :, :2].mean(axis=0)
    np.testing.assert_allclose(leading.exponents, full, atol=1e-5)
    assert np.all(np.isnan(leading.kaplan_yorke_dimension) == (leading.exponents[:, 0] >= 0))


def rotations(gains):
    """Rotations by 53°, scaled by ``gains`` ``[T, ...]``."""
    gains = np.asarray(gains)
    return jnp.asarray(gains[..., None, None] * ROOT.reshape((1,) * gains.ndim + (2, 2)), jnp.float32)


def test_transient_steps_do_not_count():
    chain = rotations([math.exp(5)] * 10 + [0.5] * 30)
    np.testing.assert_allclose(chain_spectrum(chain, num_transient=10).exponents, [math.log(0.5)] * 2, rtol=1e-5)
    np.testing.assert_allclose(chain_spectrum(chain).exponents, [(50 + 30 * math.log(0.5)) / 40] * 2, rtol=1e-5)


def test_drift_and_standard_error_of_a_chain_that_changes():
    # Ten blocks have mean 0 and ten ln 2: their standard deviation is ½ ln 2 √(20/19).
    result = chain_spectrum(rotations([1.0] * 20 + [2.0] * 20))
    np.testing.assert_allclose(result.exponents, [math.log(2) / 2] * 2, rtol=1e-5)
    np.testing.assert_allclose(result.convergence_drift, [math.log(2) / 2] * 2, rtol=1e-5)
    np.testing.assert_allclose(result.standard_errors, [math.log(2) / 2 / math.sqrt(19)] * 2, rtol=1e-5)


def test_one_step_has_no_standard_error():
    result = chain_spectrum(jnp.asarray([[[2.0, 1.0], [0.5, 1.0]]]))
    assert np.isnan(result.standard_errors).all()
    np.testing.assert_allclose(result.exponents.sum(), math.log(1.5), rtol=1e-5)


def test_every_sequence_has_its_own_exponents():
    gains = np.array([[0.5, 1.0, 2.0], [0.1, 3.0, 0.9]])
    result = chain_spectrum(rotations(np.broadcast_to(gains, (40, 2, 3))))
    np.testing.assert_allclose(result.exponents, np.log(gains)[..., None].repeat(2, axis=-1), atol=1e-5)
    np.testing.assert_array_equal(np.isnan(result.kaplan_yorke_dimension), False)
    assert result.local_exponents.shape == (20, 2, 3, 2)


def henon(_, state, __):
    x, y = state
    return jnp.stack([1 - 1.4 * x**2 + y, 0.3 * x]), x


def logistic(_, state, __):
    return 4 * state * (1 - state), state


def tent(_, state, __):
    return jnp.where(state < 0.5, 2 * state, 2 - 2 * state), state


def map_spectrum(step, start, num_steps):
    """Exponents of an autonomous map in float64; the first 100 steps lead to its attractor."""
    with jax.enable_x64(True):
        cell = rnnjax.StepCell(step, jnp.asarray(start))
        result = spectrum(cell, {}, jnp.zeros((num_steps, 1)), num_transient=100)
        return jax.tree.map(np.asarray, result)


def test_henon_map():
    result = map_spectrum(henon, [0.1, 0.1], 6000)
    np.testing.assert_allclose(result.exponents.sum(), math.log(0.3), rtol=1e-12)
    assert np.all(np.abs(result.exponents - [0.4190, -1.6230]) < 4 * result.standard_errors)
    assert np.all(result.standard_errors < 0.01)
    np.testing.assert_allclose(result.kaplan_yorke_dimension, 1.258, atol=0.01)  # Grassberger & Procaccia 1983: 1.26


@pytest.mark.parametrize(("step", "limit"), [(logistic, 5e-3), (tent, 1e-12)], ids=["logistic", "tent"])
def test_chaotic_maps_of_the_interval(step, limit):
    result = map_spectrum(step, [0.1234], 3000)
    np.testing.assert_allclose(result.exponents, [math.log(2)], atol=limit)
    assert abs(result.exponents[0] - math.log(2)) <= 4 * result.standard_errors[0] + 1e-12
    assert result.kaplan_yorke_dimension == 1


def test_scalar_tanh_unit_settles_at_its_fixed_point():
    fixed_point = mpmath.findroot(lambda h: mpmath.tanh(1.5 * h) - h, 0.9)
    exponent = float(mpmath.log(1.5 * (1 - fixed_point**2)))
    np.testing.assert_allclose([float(fixed_point), exponent], [0.85855964, -0.93061020], atol=1e-8)
    with jax.enable_x64(True):
        cell = rnnjax.VanillaCell(1)
        params = rnnjax.CellParams(jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), 1.5), jnp.zeros((1, 1)))
        result = spectrum(cell, params, jnp.zeros((100, 1)), jnp.array([0.5]), num_transient=60)
        np.testing.assert_allclose(result.exponents, [exponent], rtol=1e-12)


def random_like(tree, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * scale, jnp.float32), tree)


@pytest.fixture(scope="module")
def tanh_network():
    """A tanh network's cell, weights, inputs ``[20, 3, 2]``, and its step Jacobians diag(1 − h²) Uᵀ by NumPy."""
    cell = rnnjax.VanillaCell(4)
    params = random_like(cell.init(jax.random.key(0), 2), 2)
    inputs, jacobians = random_like(np.empty((20, 3, 2)), 3), []
    input_kernel, kernel, bias = (np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params))
    state = np.zeros((3, 4))
    for drive in np.asarray(inputs) @ input_kernel[:, 0] + bias[0]:
        state = np.tanh(drive + state @ kernel[:, 0])
        jacobians.append((1 - state[:, :, None] ** 2) * kernel[:, 0].T)
    return cell, params, inputs, np.stack(jacobians)


def test_sum_of_exponents_is_the_mean_log_determinant(tanh_network):
    cell, params, inputs, jacobians = tanh_network
    expected = np.linalg.slogdet(jacobians)[1].mean(axis=0)
    np.testing.assert_allclose(spectrum(cell, params, inputs).exponents.sum(axis=-1), expected, atol=1e-4)


@pytest.mark.parametrize("options", [{"num_exponents": n} for n in (0, 3, 1.0, True)])
def test_impossible_number_of_exponents(options):
    with pytest.raises(ValueError, match=r"^num_exponents must be a whole number in \[1, 2\]"):
        chain_spectrum(rotations([1.0] * 5), **options)


@pytest.mark.parametrize("num_transient", [-1, 5, 2.5])
def test_impossible_transient(num_transient):
    with pytest.raises(ValueError, match=r"^num_transient must be a whole number in \[0, 4\]"):
        chain_spectrum(rotations([1.0] * 5), num_transient=num_transient)


def test_refused_inputs_and_weights():
    cell = rnnjax.VanillaCell(2)
    params = cell.init(jax.random.key(0), 1)
    with pytest.raises(ValueError, match=r"^inputs must have at least one time step"):
        lyapunov_spectrum(cell, params, jnp.zeros((0, 1)))
    with pytest.raises(ValueError, match=r"^params must be finite"):
        lyapunov_spectrum(cell, params.replace(bias=jnp.full((1, 2), jnp.nan)), jnp.zeros((3, 1)))


def chaotic_network(size, gain, seed=0):
    """A random tanh network W_ij ~ N(0, g²/N) in float64, and a state to start from."""
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.normal(size=(size, 1, size)) * gain / math.sqrt(size))
    params = rnnjax.CellParams(jnp.zeros((1, 1, size)), kernel, jnp.zeros((1, size)))
    return rnnjax.VanillaCell(size), params, jnp.asarray(rng.normal(size=size))


def qr_at_every_step(jacobians, frame):
    """log|R_ii| ``[T, k]`` by NumPy."""
    logs = []
    for jacobian in np.asarray(jacobians):
        frame, triangle = np.linalg.qr(jacobian @ frame)
        logs.append(np.log(np.abs(np.diagonal(triangle))))
    return np.array(logs)


@pytest.mark.parametrize("count", [6, 24])
def test_blocks_are_those_of_a_qr_at_every_step(count):
    with jax.enable_x64(True):
        cell, params, state = chaotic_network(24, 2.0)
        result = spectrum(
            cell, params, None, state, num_steps=210, num_exponents=count, num_transient=30, block_length=50
        )
        path = rnnjax.trajectory(cell, params, jnp.zeros((210, 1)), state)
        steps = DenseJacobians(rnnjax.step_jacobians(cell, params, path))
        frame = np.asarray(random_frame(jax.random.key(0), steps, count))
        result, steps = jax.tree.map(np.asarray, (result, steps))
    logs = qr_at_every_step(steps.matrices, frame)[30:]
    expected = np.array([logs[a : a + 50].sum(axis=0) for a in range(0, 180, 50)])
    np.testing.assert_allclose(result.block_logs, expected, atol=1e-6)
    assert np.abs(result.exponents - -np.sort(-logs.mean(axis=0))).max() < 1e-8
    lengths = np.array([50, 50, 50, 30])[:, None]
    np.testing.assert_allclose((result.local_exponents * lengths).sum(axis=0) / 180, result.exponents, atol=1e-12)
    np.testing.assert_allclose(result.frame.T @ result.frame, np.eye(count), atol=1e-12)


@pytest.mark.parametrize("num_tame", [0, 40])
def test_steps_of_any_condition_keep_their_digits(num_tame, dtype):
    # Columns that differ by 10^6 after one step, along directions that turn: a fixed number of steps would lose one,
    # and so would a stretch that rotations before them made long.
    rng = np.random.default_rng(3)
    turns = np.linalg.qr(rng.normal(size=(2, 60, 3, 3)))[0]
    chain = turns[0] * np.array([1e3, 1.0, 1e-3]) @ turns[1]
    chain[:num_tame] = turns[0, :num_tame]
    chain = np.asarray(chain, dtype)
    frame = np.asarray(random_frame(jax.random.key(0), DenseJacobians(jnp.asarray(chain)), 3), np.float64)
    expected = qr_at_every_step(chain.astype(np.float64), frame).mean(axis=0)
    result = chain_spectrum(jnp.asarray(chain), block_length=60)
    np.testing.assert_allclose(result.exponents, expected, atol={"float32": 2e-2, "float64": 1e-10}[dtype.name])


def test_growth_beyond_the_range_of_floats(dtype):
    scale = {"float32": 1e25, "float64": 1e200}[dtype.name]
    for factor in (scale, 1 / scale):
        chain = jnp.asarray(np.broadcast_to(factor * ROOT, (40, 2, 2)), dtype)
        result = chain_spectrum(chain, block_length=40)
        np.testing.assert_allclose(result.exponents, [math.log(factor)] * 2, rtol=1e-5)


def test_rank_lost_inside_a_block_leaves_the_others_unharmed():
    rng = np.random.default_rng(5)
    chain = rng.normal(size=(45, 2, 4, 4))
    chain[13, 1, :2] = 0  # Two dead units in one sequence at one step.
    with jax.enable_x64(True):
        result = jax.tree.map(np.asarray, chain_spectrum(jnp.asarray(chain), block_length=45))
        steps = DenseJacobians(jnp.asarray(chain))
        frame = np.asarray(random_frame(jax.random.key(0), steps, 4))[0]
    for sequence, rank in ((0, 4), (1, 2)):
        logs = qr_at_every_step(chain[:, sequence], frame).mean(axis=0)
        np.testing.assert_allclose(result.exponents[sequence, :rank], -np.sort(-logs[:rank]), atol=1e-10)
        np.testing.assert_array_equal(result.exponents[sequence, rank:], -np.inf)
    np.testing.assert_array_equal(np.isnan(result.standard_errors), True)  # one block


def test_autonomous_networks_are_driven_by_zeros():
    cell = rnnjax.LSTMCell(3)
    params = cell.init(jax.random.key(0), 2)
    carry = (jnp.ones((2, 3)), jnp.ones((2, 3)))
    without = spectrum(cell, params, carry=carry, num_steps=30)
    chex.assert_trees_all_equal(without, spectrum(cell, params, jnp.zeros((30, 2, 2)), carry))
    step_cell = rnnjax.StepCell(lambda p, h, x: (p * jnp.tanh(h) + 0 * x, h), jnp.zeros(1))
    result = spectrum(step_cell, 2.0, carry=jnp.zeros((3, 1)), num_steps=5)
    np.testing.assert_allclose(result.exponents, np.full((3, 1), math.log(2)), rtol=1e-6)


def test_the_state_settles_alone_before_the_frame():
    with jax.enable_x64(True):
        cell, params, state = chaotic_network(5, 1.5)
        options = {"num_transient": 7, "block_length": 6}
        result = spectrum(cell, params, None, state, num_steps=60, num_state_transient=20, **options)
        settled = rnnjax.trajectory(cell, params, jnp.zeros((20, 1)), state).carries[-1]
        expected = spectrum(cell, params, None, settled, num_steps=40, **options)
        chex.assert_trees_all_close(result, expected, atol=1e-12)


@pytest.mark.parametrize("stops", [[40], [17, 25, 61]])
def test_resumed_runs_are_one_run(stops):
    with jax.enable_x64(True):
        cell, params, state = chaotic_network(5, 1.5)
        inputs = jnp.asarray(np.random.default_rng(1).normal(size=(70, 2, 1)))
        params, state = params.replace(input_kernel=jnp.ones((1, 1, 5))), jnp.stack([state, -state])
        options = {"num_exponents": 4, "num_transient": 5, "num_state_transient": 2, "block_length": 5}
        whole = spectrum(cell, params, inputs, state, **options)
        result, last = spectrum(cell, params, inputs[: stops[0]], state, **options), stops[0]
        for stop in (*stops[1:], 70):
            result, last = spectrum(cell, params, inputs[last:stop], resume=result), stop
        assert result.num_steps == 63 and len(result.local_exponents) == 13
        signs = jnp.sign((result.frame * whole.frame).sum(axis=-2, keepdims=True))
        chex.assert_trees_all_close(result.replace(frame=result.frame * signs), whole, atol=1e-10)


@pytest.mark.parametrize(
    "options", [{"num_exponents": 2}, {"num_transient": 1}, {"block_length": 1}, {"carry": jnp.zeros(2)}]
)
def test_resume_settles_the_other_options(options):
    result = chain_spectrum(rotations([1.0] * 5))
    with pytest.raises(ValueError, match=r"^resume must be a LyapunovResult, got int$"):
        lyapunov_spectrum(rnnjax.VanillaCell(2), None, num_steps=5, resume=3)
    with pytest.raises(ValueError, match=r"^resume settles every option but inputs and num_steps"):
        chain_spectrum(rotations([1.0] * 5), resume=result, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"^inputs must be given, or num_steps for an autonomous network"),
        ({"num_steps": 0}, r"^num_steps must be a positive integer, got 0"),
        ({"num_steps": 5, "inputs": jnp.zeros((5, 1))}, r"^num_steps must be left out where inputs are given, got 5"),
        ({"num_steps": 5, "num_state_transient": 5}, r"^num_state_transient must be a whole number in \[0, 4\], got 5"),
        ({"num_steps": 5, "block_length": 0}, r"^block_length must be a whole number in \[1, 5\], got 0"),
        ({"num_steps": 5, "num_transient": 2, "block_length": 4}, r"^block_length must be a whole number in \[1, 3\]"),
    ],
)
def test_impossible_lengths(arguments, message):
    cell = rnnjax.VanillaCell(2)
    with pytest.raises(ValueError, match=message):
        lyapunov_spectrum(cell, cell.init(jax.random.key(0), 1), **arguments)


def test_growth_that_overflows_is_an_error():
    cell = rnnjax.VanillaCell(2, activation="identity")
    params = cell.init(jax.random.key(0), 1).replace(recurrent_kernel=jnp.full((2, 1, 2), 3e38))
    with pytest.raises(ValueError, match=r"^growth of the frame must be finite, got a NaN or an overflow"):
        lyapunov_spectrum(cell, params, num_steps=30)


def test_errors_of_dimension_and_entropy_are_their_spread_over_sequences():
    chain = np.random.default_rng(2).normal(size=(1000, 48, 3, 3)) * 0.8
    result = chain_spectrum(jnp.asarray(chain, jnp.float32))
    positive = np.where(result.exponents > 0, result.exponents, 0).sum(axis=-1)
    np.testing.assert_allclose(result.entropy_rate, positive, atol=1e-6)
    for value, error in (
        (result.kaplan_yorke_dimension, result.kaplan_yorke_standard_error),
        (result.entropy_rate, result.entropy_rate_standard_error),
    ):
        assert np.all(np.isfinite(value)) and value.min() > 0
        # The spread of 48 values is known to 10 %, the mean of 48 squared errors from 20 blocks to 5 %.
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(error))), np.std(value, ddof=1), rtol=0.35)


def test_entropy_of_too_few_exponents_is_unknown():
    gains = jnp.asarray(np.broadcast_to(np.diag([3.0, 2.0, 0.5]), (30, 3, 3)), jnp.float32)
    results = [chain_spectrum(gains, num_exponents=k, num_transient=25) for k in (2, 3)]
    assert np.isnan(results[0].entropy_rate) and np.isnan(results[0].entropy_rate_standard_error)
    assert np.isnan(results[0].kaplan_yorke_standard_error)
    np.testing.assert_allclose(results[1].entropy_rate, math.log(6), rtol=1e-5)
    np.testing.assert_allclose(results[1].kaplan_yorke_standard_error, 0, atol=1e-6)


@pytest.mark.parametrize(("name", "compiled"), [("vanilla", False), ("vanilla", True), ("step", True)])
def test_derivatives_are_those_of_finite_differences(name, compiled):
    with jax.enable_x64(True):
        cell, params, state = chaotic_network(4, 0.9, seed=2)
        if name == "step":
            kernel = params.recurrent_kernel[:, 0]
            cell = rnnjax.StepCell(lambda p, h, x: (jnp.tanh(h @ p) + 0 * x.sum(), h), state)
            params, state = kernel, None

        def weighted(scale):
            scaled = jax.tree.map(lambda leaf: scale * leaf, params)
            result = lyapunov_spectrum(cell, scaled, None, state, num_steps=24, num_exponents=3, num_transient=3)
            return result.exponents @ jnp.array([1.0, -2.0, 0.7])

        value = jax.jit(weighted)
        function = value if compiled else weighted
        one, step = jnp.asarray(1.0), 1e-5
        expected = (value(one + step) - value(one - step)) / (2 * step)
        np.testing.assert_allclose(jax.grad(function)(one), expected, rtol=1e-6)
        np.testing.assert_allclose(jax.jvp(function, (one,), (one,))[1], expected, rtol=1e-6)


def test_in_chaos_the_derivative_of_an_exponent_explodes_with_time():
    # dλ₁/dg sums perturbations of the state that have grown since each step: as e^(λ₁ T), though λ₁ settles.
    with jax.enable_x64(True):
        cell, params, state = chaotic_network(32, 3.0)

        def leading(scale, num_steps):
            scaled = params.replace(recurrent_kernel=scale * params.recurrent_kernel)
            result = lyapunov_spectrum(cell, scaled, None, state, num_steps=num_steps, num_exponents=1)
            return result.exponents[0]

        gradient = jax.jit(jax.value_and_grad(leading), static_argnums=1)
        results = [gradient(jnp.asarray(1.0), num_steps) for num_steps in (25, 150)]
        (exponent, short), (_, long) = jax.tree.map(float, results)
    assert exponent > 0.1
    assert abs(long) > 1e4 * abs(short) > 0


@pytest.mark.parametrize(("gain", "largest", "share"), [(1.5, 0.06522, 0.0842), (3.0, 0.31006, 0.1528)])
def test_random_tanh_networks_have_the_exponents_of_mean_field_theory(gain, largest, share):
    with jax.enable_x64(True):
        cell, params, state = chaotic_network(256, gain)
        options = {"num_exponents": 64, "num_state_transient": 200, "num_transient": 100}
        result = jax.tree.map(np.asarray, spectrum(cell, params, None, state, num_steps=800, **options))
    assert abs(result.exponents[0] - largest) < 0.01 + 0.05 * largest
    assert abs((result.exponents > 0).mean() * 64 / 256 - share) < 0.012


@pytest.mark.parametrize(
    ("exponents", "state_size", "dimension"),
    [
        ([0.9056, 0.0, -14.5723], None, 2 + 0.9056 / 14.5723),  # Lorenz: 2.062
        ([0.5, -1.0], 2, 1.5),
        ([-0.1, -0.2], 2, 0),
        ([0.0, -0.2], 2, 1),
        ([1.0, -0.25, -0.25, -3.0], 4, 3 + 0.5 / 3),
        ([0.5, -math.inf], 2, 1),
        ([-math.inf, -math.inf], 2, 0),
        ([0.5, 0.2], 2, 2),
        ([0.5, -0.5], 2, 2),
        ([0.5, 0.2], 3, math.nan),
        ([0.5, 0.2], None, math.nan),
        ([math.nan, math.nan], 2, math.nan),
    ],
)
def test_kaplan_yorke_dimension(exponents, state_size, dimension):
    result = kaplan_yorke_dimension(jnp.array(exponents), state_size)
    np.testing.assert_allclose(result, dimension, rtol=1e-6)


def test_kaplan_yorke_dimension_of_many_spectra():
    spectra = jnp.array([[[0.5, -1.0], [-1.0, -2.0]], [[0.2, -0.8], [1.0, 0.0]]])
    np.testing.assert_allclose(kaplan_yorke_dimension(spectra), [[1.5, 0], [1.25, math.nan]], rtol=1e-6)


exponents_of = jax.jit(lambda chain, count: finite_time_exponents(DenseJacobians(chain), count), static_argnums=1)


def test_finite_time_exponents_are_singular_values_per_step(dtype):
    chain = testing.chain_of_steps(jax.random.key(0), 40, 4, condition_number=200.0, dtype=dtype)
    exact = testing.exact_log_singular_values(np.asarray(chain)) / 40
    assert np.all(-np.diff(exact) * 40 > 18)  # gaps at which e^(−2·gap) is below rounding
    count = 4 if dtype == np.float32 else 2
    np.testing.assert_allclose(exponents_of(chain, count), exact[:count], atol=10 * LIMIT[dtype.name])


def test_finite_time_exponents_are_those_of_the_factored_product():
    chain = testing.chain_of_steps(jax.random.key(1), 40, 4, condition_number=200.0)
    factored = rnnjax.log_singular_values(rnnjax.factor_product(chain)) / 40
    np.testing.assert_allclose(exponents_of(chain, 4), factored, atol=1e-4)


def test_error_of_finite_time_exponents_falls_with_the_square_of_the_gaps():
    chain = np.random.default_rng(7).normal(size=(12, 5, 3, 3)) / math.sqrt(3)
    logs = [np.log(np.linalg.svd(np.linalg.multi_dot(list(chain[::-1, b])), compute_uv=False)) for b in range(5)]
    result = np.asarray(exponents_of(jnp.asarray(chain, jnp.float32), 3))
    assert result.shape == (5, 3) and np.all(np.diff(result, axis=-1) <= 0)
    confusion = np.exp(2 * np.diff(logs, axis=-1)).sum(axis=-1, keepdims=True)
    assert np.all(np.abs(result * 12 - logs) < 10 * confusion + 1e-4) and confusion.min() < 1e-3
    np.testing.assert_allclose(result.sum(axis=-1), np.linalg.slogdet(chain)[1].mean(axis=0), atol=1e-4)


def test_finite_time_exponents_of_an_affine_cell_need_no_matrices(tanh_network):
    cell, params, inputs, jacobians = tanh_network
    structured = jax.jit(rnnjax.structured_jacobians)(cell, params, rnnjax.trajectory(cell, params, inputs))
    result = finite_time_exponents(structured, 2)
    for b in range(3):
        exact = testing.exact_log_singular_values(jacobians[:, b]) / 20
        assert np.all(np.diff(exact[:3]) * 20 < -4)
        np.testing.assert_allclose(result[b], exact[:2], atol=1e-4)
    with pytest.raises(ValueError, match=r"^num_exponents must be a whole number in \[1, 4\]"):
        finite_time_exponents(structured, 5)


def test_frames_are_orthonormal_and_grow_backward_by_the_transposed_steps():
    chain = np.random.default_rng(8).normal(size=(6, 2, 3, 3))
    jacobians = DenseJacobians(jnp.asarray(chain, jnp.float32))
    start = random_frame(jax.random.key(1), jacobians, 2)
    np.testing.assert_allclose(np.swapaxes(start, 1, 2) @ start, np.broadcast_to(np.eye(2), (2, 2, 2)), atol=1e-6)
    _, growth = frame_growth(jacobians, start, backward=True)
    frames = np.asarray(start, np.float64)
    for t in reversed(range(6)):
        frames, triangles = np.linalg.qr(np.swapaxes(chain[t], 1, 2) @ frames)
        expected = np.log(np.abs(np.diagonal(triangles, axis1=1, axis2=2)))
        np.testing.assert_allclose(growth[t], expected, atol=1e-4)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("cell", [rnnjax.VanillaCell(5), rnnjax.LeakyCell(5, leak=0.6), rnnjax.GRUCell(5)])
def test_growth_is_the_same_with_factors_as_with_dense_matrices(cell, backward):
    with jax.enable_x64():
        inputs = jnp.asarray(np.random.default_rng(4).normal(size=(13, 2, 2)))
        params = jax.tree.map(lambda x: x.astype(jnp.float64), cell.init(jax.random.key(1), 2))
        factors = jacobian_operator(cell, params, rnnjax.trajectory(cell, params, inputs))
        start = random_frame(jax.random.key(0), factors, 3)
        for ours, theirs in zip(
            block_growth(factors, start, (0, 5, 13), backward),
            block_growth(DenseJacobians(factors.dense()), start, (0, 5, 13), backward),
            strict=True,
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-11)


@pytest.mark.parametrize("backward", [False, True])
def test_growth_between_boundaries_is_that_of_a_qr_at_every_step(backward, dtype):
    """Frame, sums of logs and their derivative, over the third to the eighth of eleven steps."""
    chain = jnp.asarray(np.random.default_rng(0).normal(size=(11, 5, 5)), dtype)
    start, boundaries = random_frame(jax.random.key(0), DenseJacobians(chain), 3), (2, 4, 5, 8)
    taken = (chain[::-1].swapaxes(1, 2) if backward else chain)[2:8]
    limit = 2e-4 if dtype == np.float32 else 1e-11

    def in_blocks(taken):
        whole = jnp.concatenate([chain[:2], taken, chain[8:]])
        if backward:
            whole = jnp.concatenate([chain[:3], taken[::-1].swapaxes(1, 2), chain[9:]])
        return block_growth(DenseJacobians(whole), start, boundaries, backward)

    def by_steps(taken):
        frame, logs = frame_growth(DenseJacobians(taken), start)
        return frame, jnp.stack([logs[a - 2 : b - 2].sum(axis=0) for a, b in zip((2, 4, 5), (4, 5, 8), strict=True)])

    for ours, theirs in zip(in_blocks(taken), by_steps(taken), strict=True):
        np.testing.assert_allclose(jnp.abs(ours), jnp.abs(theirs), atol=limit)  # signs of columns are free
    gradients = (jax.grad(lambda steps, f=f: (f(steps)[1] ** 2).sum())(taken) for f in (in_blocks, by_steps))
    np.testing.assert_allclose(*gradients, rtol=100 * limit, atol=100 * limit)


@pytest.mark.parametrize("block_length", [None, 1, 2])
@pytest.mark.parametrize(("size", "dead"), [(4, (0,)), (4, (3,)), (8, (0, 5))])
def test_dead_units_lose_exactly_their_directions_whatever_the_blocks(size, dead, block_length):
    """At the first step for want of a direction to come from, too: a dead unit has neither slope nor influence."""
    cell = rnnjax.VanillaCell(size, activation="relu")
    params = cell.init(jax.random.key(0), 1)
    params = params.replace(bias=jnp.ones((1, size)).at[0, jnp.array(dead)].set(-100.0))
    for num_steps in (30, 100):
        found = lyapunov_spectrum(cell, params, jnp.zeros((num_steps, 1)), block_length=block_length)
        lost = np.isneginf(found.exponents)
        path = rnnjax.trajectory(cell, params, jnp.zeros((num_steps, 1)))
        rank = min(np.linalg.matrix_rank(jacobian) for jacobian in rnnjax.step_jacobians(cell, params, path))
        np.testing.assert_array_equal(lost, np.arange(size) >= rank)
        np.testing.assert_array_equal(np.isnan(found.convergence_drift), lost)


@pytest.mark.parametrize("lost_at", [3, 30])
def test_nothing_is_said_of_the_convergence_of_a_direction_that_is_lost(lost_at):
    matrices = np.random.default_rng(0).normal(size=(40, 2, 2)).astype("float32")
    matrices[lost_at, 1] = 0
    result = chain_spectrum(matrices, block_length=4)
    np.testing.assert_array_equal(np.isneginf(result.exponents), [False, True])
    np.testing.assert_array_equal(np.isnan(result.convergence_drift), [False, True])
    np.testing.assert_array_equal(np.isnan(result.standard_errors), [False, True])
