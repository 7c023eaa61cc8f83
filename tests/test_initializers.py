"""Initialisers against the distributions they are named after."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import rnnjax
from rnnjax import initializers, testing
from rnnjax.initializers import (
    INITIALIZERS,
    Gaussian,
    Glorot,
    He,
    Identity,
    Orthogonal,
    make_initializer,
    per_gate,
)

FAN_IN, FAN_OUT = 300, 200


def draw(initializer, shape=(FAN_IN, FAN_OUT), dtype=jnp.float32, seed=0):
    return initializer(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize("gain", [1.0, 0.3])
@pytest.mark.parametrize("num_gates", [1, 3, 4])
def test_every_gate_is_orthogonal_on_its_own(num_gates, gain, dtype):
    kernel = per_gate(Orthogonal(gain), jax.random.key(0), 16, num_gates, 16, dtype)
    assert kernel.shape == (16, num_gates, 16)
    assert kernel.dtype == dtype
    for gate in range(num_gates):
        sigma = np.linalg.svd(np.asarray(kernel[:, gate], np.float64), compute_uv=False)
        np.testing.assert_allclose(sigma, gain, rtol=testing.rounding_tolerance(dtype, 40))
    assert len({float(kernel[0, gate, 0]) for gate in range(num_gates)}) == num_gates


@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
def test_rectangular_orthogonal_kernels_have_orthonormal_rows_or_columns(shape):
    kernel = np.asarray(draw(Orthogonal(2.0), shape), np.float64)
    np.testing.assert_allclose(np.linalg.svd(kernel, compute_uv=False), 2.0, rtol=1e-5)


def test_orthogonal_draws_follow_haar_measure():
    # In three dimensions every coordinate of a uniform direction is uniform on [-1, 1] (Archimedes).
    draws = jax.vmap(lambda key: Orthogonal()(key, (3, 3), jnp.float32))(jax.random.split(jax.random.key(0), 2000))
    for row, column in [(0, 0), (1, 2)]:
        assert scipy.stats.kstest(np.asarray(draws[:, row, column]), scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("initializer", "law"),
    [
        (Glorot, lambda gain: scipy.stats.uniform(*(gain * np.sqrt(6 / (FAN_IN + FAN_OUT)) * np.array([-1, 2])))),
        (He, lambda gain: scipy.stats.norm(0, gain * np.sqrt(2 / FAN_IN))),
        (Gaussian, lambda gain: scipy.stats.norm(0, gain * np.sqrt(1 / FAN_IN))),
    ],
)
@pytest.mark.parametrize("gain", [1.0, 2.5])
def test_random_kernels_follow_their_law(initializer, law, gain):
    entries = np.asarray(draw(initializer(gain)), np.float64).ravel()
    # 60,000 entries: the variance of a sample is known to about 1.2 % at two standard errors.
    assert entries.var() == pytest.approx(law(gain).var(), rel=0.025)
    assert scipy.stats.kstest(entries, law(gain).cdf).pvalue > 1e-3


def test_identity_is_the_identity_times_the_gain():
    np.testing.assert_array_equal(draw(Identity(0.5), (3, 3)), 0.5 * np.eye(3))
    np.testing.assert_array_equal(draw(Identity(), (2, 3)), np.eye(2, 3))


@pytest.mark.parametrize("name", INITIALIZERS)
def test_narrow_dtypes_are_rounded_from_float32(name):
    wide = draw(make_initializer(name, 0.7), (8, 8), jnp.float32)
    narrow = draw(make_initializer(name, 0.7), (8, 8), jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(narrow, np.float32), wide, rtol=2.0**-8)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_draws_depend_on_the_key_alone(name):
    initializer = make_initializer(name)
    np.testing.assert_array_equal(draw(initializer, (5, 5)), draw(make_initializer(name), (5, 5)))
    if name != "identity":
        assert not np.array_equal(draw(initializer, (5, 5)), draw(initializer, (5, 5), seed=1))


def test_initializers_compare_and_hash_by_value():
    assert Orthogonal(0.5) == Orthogonal(0.5)
    assert hash(Orthogonal(0.5)) == hash(Orthogonal(0.5))
    assert Orthogonal(0.5) != Orthogonal(0.6)
    assert Orthogonal(0.5) != Gaussian(0.5)
    assert len({make_initializer(name, gain) for name in INITIALIZERS for gain in (1.0, 2.0, 1.0)}) == 10
    with pytest.raises(dataclasses.FrozenInstanceError):
        Orthogonal().gain = 2.0


@pytest.mark.parametrize("gain", [0, -1.0, np.nan, np.inf, "1", True])
def test_gains_must_be_positive_numbers(gain):
    with pytest.raises(ValueError, match="gain must be a positive finite number, got"):
        make_initializer("orthogonal", gain)


def test_unknown_names_are_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"initializer must be one of .*, got 'ortogonal'; did you mean 'orthogonal'"):
        make_initializer("ortogonal")


def test_chrono_spreads_time_scales_evenly():
    """e^b is uniform on [1, longest − 1]: a Kolmogorov–Smirnov distance below its 0.1 % value."""
    bias = np.asarray(initializers.Chrono(50)(jax.random.key(0), (4000,)), np.float64)
    share = np.sort((np.exp(bias) - 1) / 48)
    assert share[0] > -1e-6 and share[-1] < 1 + 1e-6
    assert np.abs(share - (np.arange(4000) + 0.5) / 4000).max() < 1.95 / np.sqrt(4000)


@pytest.mark.parametrize(("cell", "keeping", "writing"), [(rnnjax.LSTMCell, 1, 0), (rnnjax.GRUCell, 1, None)])
def test_chrono_opens_the_keeping_gate_and_shuts_the_input_gate_as_far(cell, keeping, writing):
    bias = np.asarray(cell(64, forget_bias=initializers.Chrono(20)).init(jax.random.key(3), 2).bias)
    assert np.unique(bias[keeping]).size > 60 and (bias[keeping] >= 0).all() and (bias[keeping] <= np.log(19)).all()
    rest = [gate for gate in range(len(bias)) if gate not in (keeping, writing)]
    assert not bias[rest].any()
    if writing is not None:
        np.testing.assert_array_equal(bias[writing], -bias[keeping])


@pytest.mark.parametrize("longest", [2, 0, -1, np.nan, np.inf, "9"])
def test_chrono_needs_a_memory_of_more_than_two_steps(longest):
    with pytest.raises(ValueError, match="longest must be a"):
        initializers.Chrono(longest)
