"""Expectations of an activation and its slope over a Gaussian, in float64 on the host."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import legendre

from rnnjax.activations import make_activation
from rnnjax.typing import Array

ZERO, UNBOUNDED = 1e-12, 1e24  # Pre-activations of smaller, larger variances count as 0, as ∞.
CUTOFF = 12.0  # Standard deviations; what lies beyond weighs 4e-33.
_LOG_SLOPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # ln φ' also where φ' underflows.
    "tanh": lambda x: math.log(4) - np.logaddexp(0, 2 * x) - np.logaddexp(0, -2 * x),
    "sigmoid": lambda x: -np.logaddexp(0, x) - np.logaddexp(0, -x),
}


def value_and_slope(activation: str | Callable[[Array], Array], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns φ(x) and φ'(x) in float64."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        value, slope = jax.jvp(make_activation(activation).function, (jnp.asarray(x),), (jnp.ones_like(x),))
    return np.asarray(value), np.asarray(slope)


def log_slope(activation: str | Callable[[Array], Array], x: np.ndarray) -> np.ndarray:
    """Returns ln |φ'(x)|, −∞ where φ' is 0."""
    if isinstance(activation, str) and activation in _LOG_SLOPES:
        return _LOG_SLOPES[activation](x)
    with np.errstate(divide="ignore"):
        return np.log(np.abs(value_and_slope(activation, x)[1]))


def gaussian_quadrature(variance: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes x, weights p: Σ p f(x) = E[f(√q z)], on panels fine enough for φ, its kinks at integers and z."""
    deviation = math.sqrt(min(max(variance, ZERO**2), UNBOUNDED))
    # From 20 on by steps of 2 %: a saturated φ' falls over distances of order 1, but ln φ' needs relative precision.
    far = 20 * 1.02 ** np.arange(math.log(max(deviation, 1)) / math.log(1.02))
    edges = np.unique(np.concatenate([np.arange(21.0), far, deviation * np.arange(0, CUTOFF + 0.5, 0.5)]))
    edges = edges[edges <= CUTOFF * deviation]
    nodes, weights = legendre.leggauss(16)
    half = np.diff(edges)[:, None] / 2
    x = (edges[:-1, None] + half * (1 + nodes)).ravel()
    p = (half * weights).ravel() * np.exp(-0.5 * (x / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))
    return np.append(-x, x), np.append(p, p)
