"""The monitor against NumPy: Jacobian products by hand, matrix norms, and cells built to saturate."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnjax
from rnnjax import initializers
from rnnjax.monitor import LayerView, Monitor, stacked
from rnnjax.serialization import plain

T, B, D, H = 10, 3, 2, 4
MONITOR = Monitor(every=5, num_sequences=2, num_exponents=3)
GRADIENT_NORMS = np.arange(2.0 * T).reshape(2, T)


def random_like(tree, seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), tree)


def wide(array):
    return np.asarray(array, np.float64)


def tanh_layer(params, inputs):
    """Hidden states ``[T, B, H]`` and step Jacobians diag(1 − h²) Uᵀ of a tanh layer."""
    hidden, states = np.zeros((inputs.shape[1], H)), []
    for x in wide(inputs):
        hidden = np.tanh(x @ wide(params.input_kernel[:, 0]) + hidden @ wide(params.recurrent_kernel[:, 0]))
        states.append(hidden)
    return np.stack(states), (1 - np.stack(states)[..., None] ** 2) * wide(params.recurrent_kernel[:, 0]).T


@pytest.fixture(scope="module")
def layers():
    """Two tanh layers, the second driven by the first."""
    cell = rnnjax.VanillaCell(H)
    bias = jnp.zeros((1, H))
    first = random_like(cell.init(jax.random.key(0), D), 4).replace(bias=bias)
    second = random_like(cell.init(jax.random.key(0), H), 104).replace(bias=bias)
    inputs = random_like(np.empty((T, B, D)), 3)
    between = jnp.asarray(tanh_layer(first, inputs)[0], jnp.float32)
    return [LayerView(cell, first, inputs), LayerView(cell, second, between)]


@pytest.fixture(scope="module")
def reading(layers):
    return MONITOR.measure(layers, jnp.asarray(GRADIENT_NORMS))


def products(layer, b):
    """∂s_T/∂s_{T−lag} of a sequence for lags 1 … T."""
    jacobians, product = tanh_layer(layer.params, layer.inputs)[1][:, b], np.eye(H)
    return [product := product @ jacobian for jacobian in jacobians[::-1]]


def test_norms_and_exponents_are_those_of_the_products(layers, reading):
    assert reading.log_spectral_norms.shape == (2, T, 2) and reading.finite_time_exponents.shape == (2, 3, 2)
    for index, layer in enumerate(layers):
        for b in range(2):
            singular_values = np.linalg.svd(np.stack(products(layer, b)), compute_uv=False)
            np.testing.assert_allclose(
                reading.log_spectral_norms[index, :, b], np.log(singular_values[:, 0]), atol=1e-4
            )
            exact = np.log(singular_values[-1])
            assert np.all(np.diff(exact) < -4)  # gaps at which the exponents' error is below the limit
            np.testing.assert_allclose(reading.finite_time_exponents[index, :, b] * T, exact[:3], atol=1e-3)


def test_kernel_spectra_and_gradient_norms(layers, reading):
    for index, layer in enumerate(layers):
        kernel = wide(layer.params.recurrent_kernel[:, 0])
        np.testing.assert_allclose(reading.kernel_spectral_norms[index], [np.linalg.norm(kernel, 2)])
        np.testing.assert_allclose(reading.kernel_spectral_radii[index], [np.abs(np.linalg.eigvals(kernel)).max()])
    np.testing.assert_array_equal(reading.hidden_gradient_norms, GRADIENT_NORMS)


def test_saturated_share_counts_small_slopes(layers, reading):
    for index, layer in enumerate(layers):
        slopes = 1 - tanh_layer(layer.params, layer.inputs[:, :2])[0] ** 2
        np.testing.assert_allclose(reading.saturated_share[index], np.mean(slopes < 0.1), rtol=1e-6)
    assert np.all((reading.saturated_share > 0) & (reading.saturated_share < 1))


def test_regimes_and_summary(reading):
    for regime, norms in zip(reading.regimes(), reading.log_spectral_norms, strict=True):
        assert regime.log_spectral_norm == pytest.approx(norms[-1].mean())
        assert regime.exponent == pytest.approx(norms[-1].mean() / T)
        assert regime.standard_error == pytest.approx(abs(norms[-1, 0] - norms[-1, 1]) / 2 / T)
    summary = reading.summary()
    assert summary["log_spectral_norm"] == pytest.approx(reading.log_spectral_norms[1, -1].mean())
    np.testing.assert_allclose(summary["finite_time_exponents"], reading.finite_time_exponents[1].mean(axis=1))
    assert (summary["hidden_gradient_norm_first"], summary["hidden_gradient_norm_last"]) == (T, 2 * T - 1)
    assert json.loads(json.dumps(plain("summary", summary)))["regime"] == "critical"


def test_stacked_readings_gain_a_leading_axis(reading):
    arrays = stacked([reading, reading.replace(saturated_share=np.array([0.25, 0.75]))])
    assert arrays["log_spectral_norms"].shape == (2, 2, T, 2)
    np.testing.assert_array_equal(arrays["saturated_share"], [reading.saturated_share, [0.25, 0.75]])


def test_gates_and_memory_against_forward_differentiation():
    cell = rnnjax.LSTMCell(H)
    params, inputs = random_like(cell.init(jax.random.key(0), D), 4), random_like(np.empty((T, 1, D)), 5)

    def last_state(state):
        carry, _ = jax.lax.scan(lambda carry, x: cell.apply(params, carry, x), (state[:H], state[H:]), inputs[:, 0])
        return jnp.concatenate(carry)

    reading = MONITOR.measure([LayerView(cell, params, inputs)], jnp.ones((1, T)))
    product = jax.jit(jax.jacfwd(last_state))(jnp.zeros(2 * H))
    expected = np.log(np.linalg.norm(wide(product), 2))
    np.testing.assert_allclose(reading.log_spectral_norms[0, -1], [expected], atol=1e-4)
    kernels = np.moveaxis(wide(params.recurrent_kernel), 1, 0)
    np.testing.assert_allclose(reading.kernel_spectral_norms[0], np.linalg.norm(kernels, 2, axis=(1, 2)))
    np.testing.assert_allclose(reading.kernel_spectral_radii[0], np.abs(np.linalg.eigvals(kernels)).max(axis=1))


def without_recurrence(cell, bias):
    """A layer whose units have the given biases as their pre-activations at every step."""
    params = cell.init(jax.random.key(0), D)
    params = params.replace(
        recurrent_kernel=jnp.zeros_like(params.recurrent_kernel), bias=jnp.asarray(bias, jnp.float32)[None]
    )
    return LayerView(cell, params, jnp.zeros((T, B, D)))


@pytest.mark.parametrize(
    ("cell", "bias", "share"),
    [
        (rnnjax.VanillaCell(H, activation="relu"), [-1, -1, -1, -1], 1),
        (rnnjax.VanillaCell(H, activation="relu"), [-1, 1, 1, 1], 0.25),
        (rnnjax.VanillaCell(H, activation="identity"), [-9, 0, 0, 9], 0),
        (rnnjax.VanillaCell(H), [-9, 9, 0, 0], 0.5),
        (rnnjax.VanillaCell(H, activation="sigmoid"), [0, 0, 0, 9], 0.25),  # the steepest slope is ¼
        (rnnjax.LeakyCell(H, leak=0.05), [0, 0, 9, 0], 0.25),  # the steepest slope is 0.05
    ],
    ids=["dead relu", "half-dead relu", "linear", "tanh", "sigmoid", "leaky"],
)
def test_saturated_share_of_constructed_cells(cell, bias, share):
    reading = MONITOR.measure([without_recurrence(cell, bias)], jnp.ones((1, T)))
    np.testing.assert_allclose(reading.saturated_share, [share])


def test_orthogonal_linear_network_has_one_exponent():
    cell = rnnjax.VanillaCell(H, activation="identity", recurrent_initializer=initializers.Orthogonal(0.5))
    layer = LayerView(cell, cell.init(jax.random.key(0), D), jnp.ones((T, B, D)))
    reading = Monitor(num_sequences=B, num_exponents=99).measure([layer], jnp.ones((1, T)))
    np.testing.assert_allclose(reading.finite_time_exponents, np.full((1, H, B), math.log(0.5)), rtol=1e-5)
    lags = np.arange(1, T + 1)[None, :, None]
    np.testing.assert_allclose(reading.log_spectral_norms, np.tile(lags * math.log(0.5), (1, 1, B)), rtol=1e-5)
    np.testing.assert_allclose(reading.kernel_spectral_radii, [[0.5]], rtol=1e-5)


def test_bfloat16_layer_is_measured_in_float32():
    cell = rnnjax.VanillaCell(H, activation="identity", recurrent_initializer=initializers.Identity(0.3))
    layer = LayerView(cell, cell.init(jax.random.key(0), D, jnp.bfloat16), jnp.ones((T, B, D)))
    reading = MONITOR.measure([layer], jnp.ones((1, T)))
    gain = float(jnp.bfloat16(0.3))
    assert reading.log_spectral_norms.dtype == np.float32
    np.testing.assert_allclose(reading.log_spectral_norms[0, -1], [T * math.log(gain)] * 2, rtol=1e-5)
    np.testing.assert_allclose(reading.finite_time_exponents, np.full((1, 3, 2), math.log(gain)), rtol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_weights_give_nan(layers, bad):
    params = layers[1].params
    params = params.replace(recurrent_kernel=params.recurrent_kernel.at[0, 0, 1].set(bad))
    reading = MONITOR.measure([layers[0], dataclasses.replace(layers[1], params=params)], jnp.ones((2, T)))
    for name in ("log_spectral_norms", "finite_time_exponents", "kernel_spectral_norms", "kernel_spectral_radii"):
        first, second = getattr(reading, name)
        assert np.isfinite(first).all() and np.isnan(second).any(), name
    assert np.isnan(reading.log_spectral_norms[1, -1]).all()
    assert np.isnan(reading.saturated_share[1]) and np.isfinite(reading.saturated_share[0])
    assert [regime.name == "non-finite" for regime in reading.regimes()] == [False, True]


def test_due_steps():
    assert [step for step in range(13) if MONITOR.is_due(step, 13)] == [0, 5, 10, 12]
    assert [step for step in range(11) if MONITOR.is_due(step, 11)] == [0, 5, 10]
    assert MONITOR.is_due(0, 1)


@pytest.mark.parametrize("name", ["every", "num_sequences", "num_exponents"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_impossible_settings(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a positive integer"):
        Monitor(**{name: value})


@pytest.mark.parametrize(("num_steps", "finite"), [(20, True), (60, False)])
def test_states_that_overflow_are_not_taken_for_a_gradient_that_vanishes(num_steps, finite):
    """The derivative of a ReLU at NaN is 0."""
    cell = rnnjax.VanillaCell(8, activation="relu", recurrent_initializer=rnnjax.initializers.Identity(10.0))
    params = cell.init(jax.random.key(0), input_size=2)
    inputs = jnp.abs(jax.random.normal(jax.random.key(1), (num_steps, 4, 2)))
    assert bool(jnp.isfinite(rnnjax.unroll(cell, params, inputs)[1]).all()) == finite
    reading = MONITOR.measure([LayerView(cell, params, inputs)], jnp.ones((1, num_steps)))
    assert reading.regimes()[0].name == ("exploding" if finite else "non-finite")
    for values in (reading.log_spectral_norms, reading.finite_time_exponents, reading.saturated_share):
        assert np.isnan(values).all() != finite
