"""Which regime a network is in, with its confidence; what limits its memory; and the remedy to try first."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from rnnjax import validation
from rnnjax.cells import AffineCell, Cell, GRUCell, LeakyCell, LSTMCell, SkipCell, VanillaCell
from rnnjax.jacobians import jacobian_operator
from rnnjax.norms import spectral_norm_profile
from rnnjax.structured import StructuredJacobians
from rnnjax.typing import Array, ArrayLike, Carry, Params
from rnnjax.unroll import Trajectory, trajectory

CRITICAL_RANGE = math.log(100)
"""Nats by which ‖∂s_T/∂s_0‖₂ may differ from 1 over a whole sequence for a network to count as critical."""
SATURATION = 0.1
"""A unit is saturated at a step where its state answers its recurrent pre-activations with less than this share of the
largest slope its cell has."""


@dataclasses.dataclass(frozen=True)
class Regime:
    """What long Jacobian products of a network do.

    Attributes:
      name: ``vanishing``, ``critical``, ``exploding``, or ``non-finite`` where the product is no longer a number.
      exponent: largest finite-time Lyapunov exponent log ‖∂s_T/∂s_0‖₂ / T, nats per step, mean over sequences.
      standard_error: standard error of ``exponent`` over sequences, nats per step; NaN with one sequence.
      log_spectral_norm: log ‖∂s_T/∂s_0‖₂, nats, mean over sequences: the number ``name`` rests on.
      confidence: probability, in [0, 1], that the mean over all sequences lies in the range of ``name``, by Student's t
        distribution with the standard error; NaN with one sequence.
    """

    name: str
    exponent: float
    standard_error: float
    log_spectral_norm: float
    confidence: float = math.nan


def classify_regime(log_spectral_norms: ArrayLike, num_steps: int) -> Regime:
    """Names the regime from the spectral norms of ∂s_T/∂s_0.

    The network is critical while the norm stays within a factor of 100 of 1 over the whole sequence
    (|log ‖∂s_T/∂s_0‖₂| ≤ ln 100, or within twice its standard error); below it vanishes, above it explodes.

    Args:
      log_spectral_norms: log ‖∂s_T/∂s_0‖₂ in nats, ``[n]``, one for each sequence.
      num_steps: T.

    Returns:
      The ``Regime``.

    Raises:
      ValueError: no sequences, or T < 1.

    Example:
      >>> classify_regime([-40.0, -44.0], num_steps=64).name
      'vanishing'

    Source: R. Pascanu et al., On the difficulty of training recurrent neural networks, ICML 2013, section 2.
    """
    validation.positive_integer("num_steps", num_steps)
    norms = np.asarray(log_spectral_norms, np.float64)
    if norms.ndim != 1 or norms.size == 0:
        raise ValueError(f"log_spectral_norms must have shape [n] with n ≥ 1, got {norms.shape}")
    with np.errstate(invalid="ignore"):  # inf − inf
        mean = float(norms.mean())
    if math.isnan(mean) or mean == math.inf:
        return Regime("non-finite", mean / num_steps, math.nan, mean, 1.0)
    spread = norms if norms.size > 1 and np.isfinite(norms).all() else None
    error = math.nan if spread is None else float(spread.std(ddof=1)) / math.sqrt(norms.size)
    margin = max(CRITICAL_RANGE, 0.0 if math.isnan(error) else 2 * error)
    name = "vanishing" if mean < -margin else "exploding" if mean > margin else "critical"
    return Regime(name, mean / num_steps, error / num_steps, mean, _confidence(name, mean, error, norms.size))


def _confidence(name: str, mean: float, error: float, number: int) -> float:
    if math.isnan(error):
        return math.nan
    if error == 0:
        low, high = float(mean > -CRITICAL_RANGE), float(mean > CRITICAL_RANGE)
    else:
        low, high = (
            float(stats.t.cdf((mean - edge) / error, number - 1)) for edge in (-CRITICAL_RANGE, CRITICAL_RANGE)
        )
    return {"vanishing": 1 - low, "critical": low - high, "exploding": high}[name]


@dataclasses.dataclass(frozen=True)
class Symptoms:
    """What a diagnosis rests on.

    Attributes:
      cell: the cell.
      num_steps: T.
      regime: its regime.
      gain: root mean square singular value of the recurrent matrices, averaged over the gates; NaN if there are none.
      saturated_share: share of (step, sequence, unit) that is saturated; NaN for a ``StepCell``.
      dead_share: share of units that answer no recurrent pre-activation at any step; NaN for a ``StepCell``.
      message: what was not finite, and where; empty if all was.
    """

    cell: Cell
    num_steps: int
    regime: Regime
    gain: float = math.nan
    saturated_share: float = math.nan
    dead_share: float = math.nan
    message: str = ""


@dataclasses.dataclass(frozen=True)
class Remedy:
    """One thing to try.

    Attributes:
      name: what it is.
      settings: the fields of ``RunConfig`` to change, with their new values.
      reason: why, in numbers.
    """

    name: str
    settings: Mapping[str, Any]
    reason: str


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What ails a network, and what to try.

    Attributes:
      symptoms: what it rests on.
      limit: what limits the memory, in words and numbers.
      remedies: what to try, the first first; none for a network in the critical regime with live units.
    """

    symptoms: Symptoms
    limit: str
    remedies: tuple[Remedy, ...]


def diagnose(cell: Cell, params: Params, inputs: Any, carry: Carry | None = None) -> Diagnosis:
    """Says which regime a network is in on given inputs, what limits its memory, and which remedies to try in order.

    Args:
      cell: any cell; remedies are named for those of this package.
      params: its weights, as they are at the start of training, or wherever it stands.
      inputs: ``[T, ..., D]``: a few sequences are enough, more make the regime surer; or a ``Trajectory``.
      carry: the carry before the first step; ``cell.initialize_carry`` by default; that of the trajectory where there
        is one.

    Returns:
      The ``Diagnosis``.

    Raises:
      ValueError: shapes that do not fit the cell, non-finite inputs or weights; a carry beside a trajectory. States and
        Jacobians that overflow are no error: they are the finding.

    Example:
      >>> import jax, rnnjax
      >>> cell = rnnjax.VanillaCell(16, recurrent_initializer=rnnjax.initializers.Orthogonal(0.5))
      >>> params = cell.init(jax.random.key(0), input_size=2)
      >>> found = diagnose(cell, params, jax.random.normal(jax.random.key(1), (50, 4, 2)))
      >>> found.symptoms.regime.name, found.remedies[0].name, dict(found.remedies[0].settings)
      ('vanishing', 'orthogonal initialisation at gain 1', {'initializer': 'orthogonal', 'gain': 1.0})
    """
    return advise(measure(cell, params, inputs, carry))


def measure(cell: Cell, params: Params, inputs: Any, carry: Carry | None = None) -> Symptoms:
    """Returns the symptoms that ``diagnose`` rests on; arguments as there."""
    path = inputs if isinstance(inputs, Trajectory) else None
    if path is None:
        cell.check(params, inputs, carry)
    elif carry is not None:
        raise ValueError("carry must be left out with a trajectory, which begins with it")
    driven_by = inputs if path is None else path.inputs
    for name, value in (("params", params), ("inputs", driven_by), ("carry", carry)):
        validation.finite(name, value)
    num_steps, gain = jax.tree.leaves(driven_by)[0].shape[0], _gain(cell, params)
    try:
        path = trajectory(cell, params, inputs, carry) if path is None else path
        jacobians = jacobian_operator(cell, params, path)
    except validation.NonFiniteError as error:
        regime = Regime("non-finite", math.nan, math.nan, math.nan, 1.0)
        return Symptoms(cell, num_steps, regime, gain, message=str(error))
    norms = np.asarray(spectral_norm_profile(jacobians)[-1]).reshape(-1)
    regime = classify_regime(norms, num_steps)
    if not isinstance(cell, AffineCell) or not isinstance(jacobians, StructuredJacobians):
        return Symptoms(cell, num_steps, regime)
    saturated, dead = saturated_and_dead(cell, jacobians)
    return Symptoms(cell, num_steps, regime, gain, float(saturated), float(dead))


def symptoms_of_run(cell: Cell, num_steps: int, rows: Sequence[Mapping[str, Any]], *, last: bool = False) -> Symptoms:
    """Returns the symptoms of a monitored training run from its metrics, as ``read_metrics`` gives them.

    Args:
      cell: the cell that was trained.
      num_steps: T, the length of its sequences.
      rows: the lines of metrics.jsonl.
      last: of the last monitored step, rather than the first.

    Returns:
      The ``Symptoms``; which units are dead is not among the metrics.

    Raises:
      ValueError: no line of a monitored step.
    """
    monitored = [row for row in rows if "regime" in row]
    if not monitored:
        raise ValueError(f"rows must hold a monitored training step, one with a regime; got {len(rows)} without")
    row = monitored[-1 if last else 0]
    numbers = {name: math.nan if row[name] is None else float(row[name]) for name in _METRICS}
    error, norm = numbers["exponent_standard_error"], numbers["log_spectral_norm"]
    regime = Regime(row["regime"], numbers["exponent"], error, norm, numbers["regime_confidence"])
    # A spectral radius is the gain of an orthogonal matrix, and close to that of a large Gaussian one.
    radius = float(np.mean(row["kernel_spectral_radius"]))
    return Symptoms(cell, num_steps, regime, radius, numbers["saturated_share"])


def saturated_and_dead(cell: AffineCell, jacobians: StructuredJacobians) -> tuple[Array, Array]:
    """Returns the share of (step, sequence, unit) that is saturated, and of units that never respond.

    Args:
      cell: the cell.
      jacobians: its step Jacobians, ``[T, ..., S, S]``.

    Returns:
      Two scalars in [0, 1]; NaN where Jacobians are not numbers.
    """
    response = jnp.abs(jacobians.recurrent_derivatives).max(axis=(-3, -2))
    saturated = (response < SATURATION * cell.max_slope).astype(response.dtype)
    dead = (response.reshape(-1, response.shape[-1]).max(axis=0) == 0).astype(response.dtype)
    return jnp.mean(jnp.where(jnp.isnan(response), response, saturated)), jnp.mean(dead)


def advise(symptoms: Symptoms) -> Diagnosis:
    """Returns the diagnosis that follows from symptoms."""
    regime, cell = symptoms.regime, symptoms.cell
    norm = f"‖∂s_T/∂s_0‖ is e^{regime.log_spectral_norm:.1f} over {symptoms.num_steps} steps"
    if regime.name == "non-finite":
        limit = f"states or Jacobians overflow: {symptoms.message or norm}"
        return Diagnosis(symptoms, limit, (*_tamed(symptoms, limit), _CLIP))
    if symptoms.dead_share >= 0.25:
        limit = f"{symptoms.dead_share:.0%} of the units answer nothing at any step: {norm}"
        return Diagnosis(symptoms, limit, _revived(symptoms, limit))
    if regime.name == "exploding":
        limit = f"gradients explode: {norm}, at gain {symptoms.gain:.2g}"
        return Diagnosis(symptoms, limit, (*_tamed(symptoms, limit), _CLIP))
    if regime.name == "vanishing":
        return Diagnosis(symptoms, *_kept(symptoms, norm))
    if symptoms.saturated_share >= 0.5 and isinstance(cell, VanillaCell):
        limit = f"{symptoms.saturated_share:.0%} of the units are saturated, although {norm}"
        return Diagnosis(symptoms, limit, _tamed(symptoms, limit))
    return Diagnosis(symptoms, f"nothing within {symptoms.num_steps} steps: {norm}", ())


_METRICS = ("regime_confidence", "exponent", "exponent_standard_error", "log_spectral_norm", "saturated_share")
_ORTHOGONAL = {"initializer": "orthogonal", "gain": 1.0}
_CLIP = Remedy("clip the gradient's norm at 1", {"clip_norm": 1.0}, "a step is bounded whatever the gradient")


def _tamed(symptoms: Symptoms, limit: str) -> tuple[Remedy, ...]:
    """What makes recurrent weights smaller."""
    settings: dict[str, Any] = dict(_ORTHOGONAL)
    if getattr(symptoms.cell, "activation", None) == "relu":
        return (
            Remedy("identity initialisation", {"initializer": "identity", "gain": 1.0}, f"{limit}; ReLUs pass h on"),
        )
    if getattr(symptoms.cell, "activation", None) == "softplus":
        settings["activation"] = "tanh"
    return (Remedy("orthogonal initialisation at gain 1", settings, f"{limit}; gain 1 keeps the norm of gradients"),)


def _revived(symptoms: Symptoms, limit: str) -> tuple[Remedy, ...]:
    identity = {"initializer": "identity", "gain": 1.0}
    return (
        Remedy("identity initialisation", identity, f"{limit}; at the identity a ReLU passes on what it holds"),
        Remedy("leaky ReLU", {"activation": "leaky_relu", **_ORTHOGONAL}, "its slope is never 0"),
    )


def _kept(symptoms: Symptoms, norm: str) -> tuple[str, tuple[Remedy, ...]]:
    """What carries the state further, where gradients vanish."""
    cell, steps = symptoms.cell, symptoms.num_steps
    if isinstance(cell, LSTMCell | GRUCell):
        limit = f"the gates forget: {norm}, {-symptoms.regime.exponent:.2g} nats lost a step"
        chrono = {"chrono": max(steps, 3), "forget_bias": None}
        return limit, (Remedy("chrono initialisation", chrono, f"{limit}; gates for memories of up to {steps} steps"),)
    limit = f"{norm}, {-symptoms.regime.exponent:.2g} nats lost a step, at gain {symptoms.gain:.2g}"
    gated = Remedy("LSTM", {"cell": "lstm", "chrono": max(steps, 3)}, "its memory is carried on by a gate")
    if isinstance(cell, LeakyCell | SkipCell) and symptoms.gain > 0.9:
        leak = {"leak": min(cell.leak, max(2 / steps, 0.02))}
        return limit, (Remedy("smaller leak", leak, f"{limit}; a leak of 2/T keeps the state over T steps"), gated)
    activation = getattr(cell, "activation", None)
    if activation == "relu":
        identity = {"initializer": "identity", "gain": 1.0}
        return limit, (Remedy("identity initialisation", identity, f"{limit}; a ReLU then passes h on"), gated)
    if activation in ("sigmoid", "softplus") or symptoms.saturated_share >= 0.5:
        settings = {"activation": "tanh", **_ORTHOGONAL}
        reason = f"{limit}; tanh has slope 1 at rest, and gain 1 keeps it there"
        return limit, (Remedy("tanh at gain 1, orthogonal", settings, reason), gated)
    if symptoms.gain < 0.95:
        reason = f"{limit}; at gain 1 an orthogonal matrix keeps the norm"
        return limit, (Remedy("orthogonal initialisation at gain 1", _ORTHOGONAL, reason), gated)
    return limit, (Remedy("leaky cell", {"cell": "leaky", "leak": max(2 / steps, 0.02)}, limit), gated)


def _gain(cell: Cell, params: Params) -> float:
    if not isinstance(cell, AffineCell):
        return math.nan
    kernel = np.asarray(params.recurrent_kernel, np.float64)
    return float(np.sqrt(np.sum(kernel**2, axis=(0, 2)) / cell.hidden_size).mean())
