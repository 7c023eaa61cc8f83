"""The regime's name against its definition, on either side of every threshold."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnjax
from rnnjax.configuration import RunConfig
from rnnjax.diagnosis import CRITICAL_RANGE, advise, classify_regime, diagnose, symptoms_of_run

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


def test_confidence_is_the_probability_of_the_named_range():
    """Student's t with two sequences is Cauchy: of 4.605 ± 3 (standard error) half lies on either side of ln 100."""
    edge = math.log(100)
    regime = classify_regime([-edge - 10, -edge + 4], num_steps=5)  # mean 3 below the edge, standard error 7
    assert regime.name == "critical"
    upper, lower = math.atan((2 * edge + 3) / 7), math.atan(3 / 7)
    assert regime.confidence == pytest.approx((upper - lower) / math.pi)
    assert classify_regime([-20.0, -20.0], num_steps=5).confidence == 1.0
    assert math.isnan(classify_regime([-20.0], num_steps=5).confidence)
    sure = classify_regime([-40.0, -41.0, -42.0], num_steps=5)
    assert sure.name == "vanishing" and sure.confidence > 0.999


T, B, D, H = 40, 4, 3, 16


def found(cell, *, scale=1.0, num_steps=T, bias=None):
    params = cell.init(jax.random.key(0), D)
    if bias is not None:
        params = params.replace(bias=bias(params.bias))
    return diagnose(cell, params, scale * jax.random.normal(jax.random.key(1), (num_steps, B, D)))


Orthogonal, Identity = rnnjax.initializers.Orthogonal, rnnjax.initializers.Identity
CASES = {
    "vanishing": (rnnjax.VanillaCell(H, recurrent_initializer=Orthogonal(0.5)), "vanishing", {"gain": 1.0}),
    "exploding": (rnnjax.VanillaCell(H, recurrent_initializer=Orthogonal(4.0)), "exploding", {"gain": 1.0}),
    "sigmoid": (rnnjax.VanillaCell(H, activation="sigmoid"), "vanishing", {"activation": "tanh"}),
    "relu": (
        rnnjax.VanillaCell(H, activation="relu", recurrent_initializer=Orthogonal(0.5)),
        "vanishing",
        {"initializer": "identity"},
    ),
    "leaky": (rnnjax.LeakyCell(H, leak=0.9, recurrent_initializer=Orthogonal(0.3)), "vanishing", {"gain": 1.0}),
    "gru": (rnnjax.GRUCell(H), "vanishing", {"chrono": T}),
    "lstm": (rnnjax.LSTMCell(H, forget_bias=-2.0), "vanishing", {"chrono": T, "forget_bias": None}),
    "lstm of gain 8": (rnnjax.LSTMCell(H, recurrent_initializer=Orthogonal(8.0)), "exploding", {"gain": 1.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_first_remedy_fits_regime_and_cell(name):
    cell, regime, settings = CASES[name]
    diagnosis = found(cell)
    assert diagnosis.symptoms.regime.name == regime
    assert settings.items() <= diagnosis.remedies[0].settings.items()
    RunConfig(**diagnosis.remedies[0].settings)  # every setting is one that a run can have
    assert f"{abs(diagnosis.symptoms.regime.log_spectral_norm):.1f}" in diagnosis.limit
    assert all(remedy.reason for remedy in diagnosis.remedies)


@pytest.mark.parametrize(
    "cell",
    [
        rnnjax.VanillaCell(H),
        rnnjax.VanillaCell(H, activation="relu", recurrent_initializer=Identity()),
        rnnjax.LSTMCell(H, forget_bias=rnnjax.initializers.Chrono(T)),
    ],
    ids=["orthogonal", "identity", "chrono"],
)
def test_a_healthy_network_gets_no_advice(cell):
    diagnosis = found(cell, scale=0.3, bias=lambda b: b + 0.1)  # or a ReLU at the identity soon meets an h of 0
    assert diagnosis.remedies == () and diagnosis.limit.startswith("nothing within 40 steps")


def test_dead_units_are_counted_and_revived():
    cell = rnnjax.VanillaCell(H, activation="relu", recurrent_initializer=Identity())
    diagnosis = found(cell, bias=lambda b: b.at[0, :8].set(-100.0))
    assert diagnosis.symptoms.dead_share == 0.5
    assert diagnosis.limit.startswith("50% of the units answer nothing at any step")
    assert [remedy.name for remedy in diagnosis.remedies] == ["identity initialisation", "leaky ReLU"]


def test_overflow_is_a_finding_with_its_step():
    cell = rnnjax.VanillaCell(H, activation="identity", recurrent_initializer=Orthogonal(1e4))
    diagnosis = found(cell)
    assert diagnosis.symptoms.regime.name == "non-finite"
    assert "time step" in diagnosis.limit and len(diagnosis.remedies) == 2


def test_any_step_function_has_a_regime():
    cell = rnnjax.StepCell(lambda w, h, x: (0.5 * h + x, h), jnp.zeros(D))
    diagnosis = diagnose(cell, jnp.ones(()), jnp.ones((T, B, D)))
    assert diagnosis.symptoms.regime.log_spectral_norm == pytest.approx(T * math.log(0.5), rel=1e-5)
    assert diagnosis.symptoms.regime.name == "vanishing" and diagnosis.remedies


def test_a_run_is_diagnosed_from_its_metrics():
    row = {"regime": "vanishing", "regime_confidence": None, "exponent": -0.7, "exponent_standard_error": 0.01}
    row |= {"log_spectral_norm": -28.0, "saturated_share": 0.0, "kernel_spectral_radius": [0.5]}
    rows = [{"loss": 1.0}, row, row | {"regime": "critical", "log_spectral_norm": 0.1}]
    cell = rnnjax.VanillaCell(H)
    first = advise(symptoms_of_run(cell, T, rows))
    assert first.remedies[0].settings["gain"] == 1.0 and "e^-28.0" in first.limit
    assert advise(symptoms_of_run(cell, T, rows, last=True)).remedies == ()
    with pytest.raises(ValueError, match="rows must hold a monitored training step"):
        symptoms_of_run(cell, T, rows[:1])


def test_a_trajectory_is_diagnosed_as_its_inputs_are():
    cell = rnnjax.GRUCell(6)
    params = cell.init(jax.random.key(0), 2)
    inputs, start = jax.random.normal(jax.random.key(1), (20, 3, 2)), jnp.ones((3, 6))
    path = rnnjax.trajectory(cell, params, inputs, start)
    assert diagnose(cell, params, path) == diagnose(cell, params, inputs, start)
    with pytest.raises(ValueError, match="carry must be left out with a trajectory"):
        diagnose(cell, params, path, start)


def test_a_trajectory_that_overflowed_is_a_finding():
    cell = rnnjax.VanillaCell(3, activation="relu")
    params = cell.init(jax.random.key(0), 1)
    path = rnnjax.trajectory(cell, params, jnp.ones((4, 2, 1)))
    broken = dataclasses.replace(path, carries=path.carries.at[2].set(jnp.nan))
    found = diagnose(cell, params, broken)
    assert found.symptoms.regime.name == "non-finite" and "time step 1" in found.symptoms.message
