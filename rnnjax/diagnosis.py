"""Which regime a network is in, and the number that says so."""

import dataclasses
import math

import numpy as np

from rnnjax import validation
from rnnjax.typing import ArrayLike

CRITICAL_RANGE = math.log(100)
"""Nats by which ‖∂s_T/∂s_0‖₂ may differ from 1 over a whole sequence for a network to count as critical."""


@dataclasses.dataclass(frozen=True)
class Regime:
    """What long Jacobian products of a network do.

    Attributes:
      name: ``vanishing``, ``critical``, ``exploding``, or ``non-finite`` where the product is no longer a number.
      exponent: largest finite-time Lyapunov exponent log ‖∂s_T/∂s_0‖₂ / T, nats per step, mean over sequences.
      standard_error: standard error of ``exponent`` over sequences, nats per step; NaN with one sequence.
      log_spectral_norm: log ‖∂s_T/∂s_0‖₂, nats, mean over sequences: the number ``name`` rests on.
    """

    name: str
    exponent: float
    standard_error: float
    log_spectral_norm: float


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
        return Regime("non-finite", mean / num_steps, math.nan, mean)
    spread = norms if norms.size > 1 and np.isfinite(norms).all() else None
    error = math.nan if spread is None else float(spread.std(ddof=1)) / math.sqrt(norms.size)
    margin = max(CRITICAL_RANGE, 0.0 if math.isnan(error) else 2 * error)
    name = "vanishing" if mean < -margin else "exploding" if mean > margin else "critical"
    return Regime(name, mean / num_steps, error / num_steps, mean)
