"""The regime's name against its definition, on either side of every threshold."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from rnnjax.diagnosis import CRITICAL_RANGE, classify_regime

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("log_norms", "name"),
    [
        ([-40.0, -44.0], "vanishing"),
        ([40.0, 44.0], "exploding"),
        ([0.0], "critical"),
        ([-math.log(100) + 1e-9], "critical"),
        ([-math.log(100) - 1e-9], "vanishing"),
        ([math.log(100) - 1e-9], "critical"),
        ([math.log(100) + 1e-9], "exploding"),
        ([-INF], "vanishing"),
        ([-INF, 3.0], "vanishing"),
        ([INF], "non-finite"),
        ([INF, 3.0], "non-finite"),
        ([NAN, 3.0], "non-finite"),
        ([INF, -INF], "non-finite"),
    ],
)
def test_name(log_norms, name):
    assert classify_regime(log_norms, num_steps=7).name == name


def test_critical_range_is_a_factor_of_a_hundred():
    assert math.exp(CRITICAL_RANGE) == pytest.approx(100)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("half_distance", "is_critical"), [(9.9, False), (10.1, True)])
def test_a_mean_within_two_standard_errors_of_zero_is_critical(sign, half_distance, is_critical):
    # Of two numbers m ± d the standard error is d, so the margin is 2d.
    regime = classify_regime(sign * np.array([20 - half_distance, 20 + half_distance]), num_steps=10)
    assert (regime.name == "critical") == is_critical
    assert regime.standard_error == pytest.approx(half_distance / 10)


def test_numbers_are_per_step_and_over_sequences():
    regime = classify_regime(jnp.array([-10.0, -20.0, -30.0, -40.0]), num_steps=5)
    assert regime.log_spectral_norm == pytest.approx(-25)
    assert regime.exponent == pytest.approx(-5)
    # Deviations ±15 and ±5: variance 500/3, of the mean 500/12.
    assert regime.standard_error == pytest.approx(math.sqrt(500 / 12) / 5)


@pytest.mark.parametrize(
    ("log_norms", "exponent"), [([4.0], 2), ([-INF, -6.0], -INF), ([INF, 1.0], INF), ([NAN, 1.0], NAN), ([-INF], -INF)]
)
def test_no_standard_error_from_one_sequence_or_without_a_finite_spread(log_norms, exponent):
    regime = classify_regime(log_norms, num_steps=2)
    np.testing.assert_equal(regime.exponent, exponent)
    np.testing.assert_equal(regime.standard_error, NAN)


@pytest.mark.parametrize("log_norms", [[], [[1.0, 2.0]], 3.0])
def test_wrong_shape_is_refused(log_norms):
    with pytest.raises(ValueError, match=r"^log_spectral_norms must have shape \[n\]"):
        classify_regime(log_norms, num_steps=5)


@pytest.mark.parametrize("num_steps", [0, -1, 2.5, True])
def test_wrong_number_of_steps_is_refused(num_steps):
    with pytest.raises(ValueError, match=r"^num_steps must be a positive integer"):
        classify_regime([1.0], num_steps)
