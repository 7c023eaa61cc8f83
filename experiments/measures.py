"""How far back a network can reach, and how far back its loss does reach, on one batch."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from rnnjax import GradientFlow, gradient_flow, spectral_norm_profile, trajectory
from rnnjax.jacobians import jacobian_operator
from rnnjax.models import RecurrentNetwork, layer_views
from rnnjax.monitor import LayerView
from rnnjax.operators import Jacobians
from rnnjax.tasks import Batch, Task
from rnnjax.typing import Array, Carry
from rnnjax.validation import NonFiniteError, finite_steps

HORIZON_SHARE = 0.9
"""Share of the gradient that the memory horizon gathers."""
NUM_SEQUENCES = 4
"""Sequences of a batch that the Jacobian products are taken on."""


def measure(network: RecurrentNetwork, task: Task, batch: Batch) -> dict[str, float]:
    """Measures the last recurrent layer on one batch.

    Returns:
      ``log_spectral_norm``: log ‖∂s_T/∂s_0‖₂ in nats, median over the first sequences; ``exponent``: the same over T,
      the largest finite-time exponent in nats per step; ``horizon``: lag in steps from which on 90 % of the loss
      gradient is gathered; ``share_within``: signed share of the gradient that lags below T/4 contribute. NaN where a
      state, a Jacobian or the loss is not finite, and for the last two where the gradient is zero.
    """
    return spectral_state(network, batch.inputs) | gradient_state(network, task, batch)


def spectral_state(network: RecurrentNetwork, inputs: Array) -> dict[str, float]:
    """Measures ``log_spectral_norm`` and ``exponent`` as `measure` does; needs no loss."""
    view = _last_layer(network, inputs)
    few = view.inputs[:, :NUM_SEQUENCES]
    carries, jacobians = _states_and_jacobians(LayerView(view.cell, view.params, few))
    try:
        finite_steps("state", carries)
        logs = spectral_norm_profile(jacobians)[-1]
    except NonFiniteError:
        return {"log_spectral_norm": np.nan, "exponent": np.nan}
    norm = float(np.median(np.asarray(logs, np.float64)))
    return {"log_spectral_norm": norm, "exponent": norm / len(few)}


def gradient_state(network: RecurrentNetwork, task: Task, batch: Batch) -> dict[str, float]:
    """Measures ``horizon`` and ``share_within`` as `measure` does."""
    shares = by_lag(network, task, batch)
    if np.isnan(shares).any():
        return {"horizon": np.nan, "share_within": np.nan}
    nothing: list[Any] = [None] * 3
    horizon = GradientFlow(*nothing, shares, *nothing).memory_horizon(HORIZON_SHARE)
    return {"horizon": float(horizon), "share_within": float(shares[: max(1, len(shares) // 4)].sum())}


def by_lag(network: RecurrentNetwork, task: Task, batch: Batch) -> np.ndarray:
    """Returns the signed share of the loss gradient by lag ``[T]``, with respect to the last recurrent layer's weights.

    It sums to 1; all NaN where the gradient is zero or not finite.
    """
    view = _last_layer(network, batch.inputs)

    def loss(outputs: Array) -> Array:
        features = outputs
        if network.skip_connections and len(network.layers) > 1:
            features = features + view.inputs
        return task.loss(network.output(features[-1] if task.readout == "last" else features), batch)

    try:
        shares = gradient_flow(view.cell, view.params, view.inputs, loss).share_by_lag
    except NonFiniteError:
        return np.full(len(batch.inputs), np.nan)
    return np.asarray(shares, np.float64)


@jax.jit
def _states_and_jacobians(view: LayerView) -> tuple[Carry, Jacobians]:
    path = trajectory(view.cell, view.params, view.inputs)
    return path.carries, jacobian_operator(view.cell, view.params, path)


def _last_layer(network: RecurrentNetwork, inputs: Array) -> LayerView:
    return layer_views(*nnx.split(network), inputs)[-1]
