"""What is measured beside training: exact, on a few sequences of the current batch, every so many steps."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rnnjax import validation
from rnnjax.cells import AffineCell, CellParams
from rnnjax.diagnosis import Regime, classify_regime, saturated_and_dead
from rnnjax.jacobians import jacobian_operator
from rnnjax.lyapunov import finite_time_exponents
from rnnjax.norms import spectral_norm_profile
from rnnjax.structured import StructuredJacobians
from rnnjax.typing import Array
from rnnjax.unroll import trajectory


@flax.struct.dataclass
class LayerView:
    """One recurrent layer as it runs on a batch.

    Attributes:
      cell: its cell.
      params: its weights.
      inputs: what drives it, ``[T, B, D]``.
    """

    cell: AffineCell
    params: CellParams
    inputs: Array


@flax.struct.dataclass
class Reading:
    """What one monitored training step shows, for L layers, n sequences of T steps, k exponents and G gates.

    Attributes:
      log_spectral_norms: log ‖∂s_T/∂s_{T−lag}‖₂ in nats, ``[L, T, n]``; entry i belongs to lag i + 1.
      finite_time_exponents: leading finite-time Lyapunov exponents, nats per step, ``[L, k, n]``, descending, by one
        round of subspace iteration (see ``lyapunov.finite_time_exponents``); the exact largest is the last of
        ``log_spectral_norms``, over T.
      hidden_gradient_norms: ‖∂L/∂h_t‖ over the whole batch, ``[L, T]``, from the training's own backward pass.
      kernel_spectral_norms: ‖U_g‖₂ of each gate's recurrent matrix, ``[L, G]``.
      kernel_spectral_radii: spectral radius of each gate's recurrent matrix, ``[L, G]``.
      saturated_share: share of (step, sequence, unit) that is saturated, ``[L]``.
    """

    log_spectral_norms: np.ndarray
    finite_time_exponents: np.ndarray
    hidden_gradient_norms: np.ndarray
    kernel_spectral_norms: np.ndarray
    kernel_spectral_radii: np.ndarray
    saturated_share: np.ndarray

    def regimes(self) -> list[Regime]:
        """Returns each layer's regime, from the spectral norms at the longest lag."""
        return [classify_regime(norms[-1], len(norms)) for norms in self.log_spectral_norms]

    def summary(self) -> dict[str, Any]:
        """Returns what a line of metrics.jsonl holds: the last layer's numbers."""
        regime = self.regimes()[-1]
        return {
            "regime": regime.name,
            "regime_confidence": regime.confidence,
            "exponent": regime.exponent,
            "exponent_standard_error": regime.standard_error,
            "log_spectral_norm": regime.log_spectral_norm,
            "finite_time_exponents": self.finite_time_exponents[-1].mean(axis=-1),
            "hidden_gradient_norm_first": self.hidden_gradient_norms[-1, 0],
            "hidden_gradient_norm_last": self.hidden_gradient_norms[-1, -1],
            "kernel_spectral_norm": self.kernel_spectral_norms[-1],
            "kernel_spectral_radius": self.kernel_spectral_radii[-1],
            "saturated_share": self.saturated_share[-1],
        }


@dataclasses.dataclass(frozen=True)
class Monitor:
    """Decides when and on what to measure.

    Attributes:
      every: training steps from one measurement to the next; the first and the last step are always measured.
      num_sequences: sequences of the batch that the Jacobian products are taken on.
      num_exponents: leading exponents to keep, at most the state size.

    Raises:
      ValueError: a setting that is not a positive integer.
    """

    every: int = 100
    num_sequences: int = 2
    num_exponents: int = 8

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            validation.positive_integer(field.name, getattr(self, field.name))

    def is_due(self, step: int, num_steps: int) -> bool:
        """Returns whether training step ``step`` of ``num_steps`` is to be measured."""
        return step % self.every == 0 or step == num_steps - 1

    def measure(self, layers: Sequence[LayerView], hidden_gradient_norms: Array) -> Reading:
        """Measures the layers of a network on the first sequences of a batch.

        Args:
          layers: the layers, all of the same cell, first to last.
          hidden_gradient_norms: ``[L, T]``, from the training step on the same batch.

        Returns:
          The ``Reading``; entries that overflowed are NaN or infinite, those of sequences with states that did NaN.
        """
        few = [LayerView(layer.cell, layer.params, layer.inputs[:, : self.num_sequences]) for layer in layers]
        measured = _measure(few, self.num_exponents)
        kernels = [np.asarray(layer.params.recurrent_kernel, np.float64) for layer in layers]
        norms, radii = zip(*(_kernel_spectra(kernel) for kernel in kernels), strict=True)
        return Reading(
            **{name: np.asarray(value) for name, value in measured.items()},
            hidden_gradient_norms=np.asarray(hidden_gradient_norms),
            kernel_spectral_norms=np.stack(norms),
            kernel_spectral_radii=np.stack(radii),
        )


def stacked(readings: list[Reading]) -> dict[str, np.ndarray]:
    """Returns every field of the readings with a leading axis ``[M]``, ready to be saved."""
    names = [field.name for field in dataclasses.fields(Reading)]
    return {name: np.stack([getattr(reading, name) for reading in readings]) for name in names}


@functools.partial(jax.jit, static_argnames="num_exponents")
def _measure(layers: Sequence[LayerView], num_exponents: int) -> dict[str, Array]:
    measured = [_measure_layer(layer, num_exponents) for layer in layers]
    return jax.tree.map(lambda *values: jnp.stack(values), *measured)


def _measure_layer(layer: LayerView, num_exponents: int) -> dict[str, Array]:
    path = trajectory(layer.cell, layer.params, layer.inputs)
    jacobians = jacobian_operator(layer.cell, layer.params, path)
    assert isinstance(jacobians, StructuredJacobians)  # as those of every affine cell
    exponents = finite_time_exponents(jacobians, min(num_exponents, jacobians.shape[-1]))
    # Not every derivative at NaN is NaN: a ReLU's is 0, and would look like a gradient that vanishes.
    finite = functools.reduce(jnp.logical_and, (_finite_sequences(leaf) for leaf in jax.tree.leaves(path.carries)))

    def where_finite(values: Array) -> Array:
        return jnp.where(jnp.broadcast_to(finite[None], values.shape), values, jnp.nan)

    return {
        "log_spectral_norms": where_finite(spectral_norm_profile(jacobians)),
        "finite_time_exponents": where_finite(jnp.moveaxis(exponents, -1, 0)),
        "saturated_share": jnp.where(finite.all(), saturated_and_dead(layer.cell, jacobians)[0], jnp.nan),
    }


def _finite_sequences(states: Array) -> Array:
    """Returns for each sequence of ``[T + 1, n, H]`` whether all its states are finite, bool ``[n]``."""
    return jnp.isfinite(states).all(axis=(0, 2))


def _kernel_spectra(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the spectral norm and the spectral radius of each gate's ``[H, H]`` matrix in ``[H, G, H]``."""
    gates = np.moveaxis(kernel, 1, 0)
    if not np.isfinite(gates).all():
        return (np.full(len(gates), np.nan),) * 2
    return np.linalg.norm(gates, 2, axis=(1, 2)), np.abs(np.linalg.eigvals(gates)).max(axis=1)
