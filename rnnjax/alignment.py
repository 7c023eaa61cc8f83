"""How much of what a Jacobian product can do a gradient gets: realised decay beside bound and typical value."""

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rnnjax import graded, products, validation
from rnnjax.cells import Cell
from rnnjax.jacobi import graded_svd
from rnnjax.jacobians import jacobian_operator
from rnnjax.operators import Jacobians, over_sequences
from rnnjax.products import Chain, Steps
from rnnjax.profiles import checked_lags
from rnnjax.sheared import sheared
from rnnjax.typing import Array, DType, Params
from rnnjax.unroll import Trajectory


@flax.struct.dataclass
class GradientAlignment:
    """A gradient δ = ∂L/∂s_T beside the singular directions of P = ∂s_T/∂s_{T−lag} = Σ_i σ_i u_i v_iᵀ, for P lags.

    Attributes:
      lags: int32 ``[P]``.
      log_singular_values: log σ_i in nats, descending, ``[P, ..., S]``.
      alignment: (u_i · δ)² / ‖δ‖², ``[P, ..., S]``; sums to 1 over i where no direction is lost.
      log_realised: log ‖Pᵀ δ‖ / ‖δ‖ in nats, what the gradient really loses or gains over the lag, ``[P, ...]``.
      log_bound: log σ_1 in nats, the most that any gradient keeps, ``[P, ...]``.
      log_typical: ½ log(Σ σ_i² / S) in nats, the root mean square over gradients of random direction, ``[P, ...]``.
    """

    lags: Array
    log_singular_values: Array
    alignment: Array
    log_realised: Array
    log_bound: Array
    log_typical: Array


def gradient_alignment(
    cell: Cell,
    params: Params,
    trajectory: Trajectory,
    gradient: Array,
    *,
    lags: Sequence[int] | Array | None = None,
    dtype: DType | None = None,
) -> GradientAlignment:
    """Compares what a gradient at the end of a sequence keeps on its way back with what it could keep.

        ‖Pᵀ δ‖² = Σ_i σ_i² (u_i · δ)²,        P = ∂s_T/∂s_{T−lag}

    Args:
      cell: any cell.
      params: its weights.
      trajectory: the states and inputs, T steps.
      gradient: δ = ∂L/∂s_T ``[..., S]``, finite and nowhere all zero; its length does not matter.
      lags: lags ≥ 1, ascending; 1, 2, 4, … and T by default.
      dtype: as for ``factor_product``.

    Returns:
      The ``GradientAlignment``, in the dtype of the states.

    Raises:
      ValueError: lags out of range, a gradient of another shape, not finite or zero, a Jacobian that is not finite.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> cell = rnnjax.VanillaCell(4)
      >>> params = cell.init(jax.random.key(0), input_size=2)
      >>> path = rnnjax.trajectory(cell, params, jnp.ones((20, 2)))
      >>> found = gradient_alignment(cell, params, path, jnp.ones(4), lags=[5, 20])
      >>> found.log_realised.shape, bool(jnp.all(found.log_realised <= found.log_bound))
      ((2,), True)

    Source: R. Pascanu et al., On the difficulty of training recurrent neural networks, ICML 2013, section 2.2.
    """
    jacobians = jacobian_operator(cell, params, trajectory)
    num_steps, *batch_shape, size, _ = jacobians.shape
    validation.shape("gradient", gradient, (*batch_shape, size))
    validation.finite("gradient", gradient)
    if validation.is_concrete(gradient) and not np.any(np.asarray(gradient) != 0, axis=-1).all():
        raise ValueError("gradient must not be all zero: it has no direction then")
    powers = [2**i for i in range(num_steps.bit_length()) if 2**i < num_steps]
    chosen = checked_lags([*powers, num_steps] if lags is None else lags, num_steps)
    with products.factorization_precision(jacobians.dtype, dtype) as wide:
        return _alignment(jacobians, jnp.asarray(gradient), chosen, wide)


@functools.partial(jax.jit, static_argnames="wide")
def _alignment(jacobians: Jacobians, gradient: Array, lags: Array, wide: DType) -> GradientAlignment:
    own, num_axes = jacobians.dtype, gradient.ndim - 1
    unit = _unit(gradient.astype(wide))

    def single(sequence: Jacobians) -> tuple[Array, Array]:
        # P(T, T − lag)ᵀ grows on the left, one step a lag; its right singular vectors are the left ones of P.
        chain = Chain(sheared(sequence, wide), True, products.condition_limit(own, wide))

        def at_lag(steps: Steps, lag: Array) -> tuple[Steps, tuple[Array, Array]]:
            steps = chain.advanced(steps, lag - 1)
            factored = graded.orthogonalized(chain.last_columns(steps), steps.factors.log_scales)
            values, _, directions = graded_svd(graded.regraded(factored, steps.factors))
            return steps, (values, directions)

        return jax.lax.scan(at_lag, chain.start(), lags)[1]

    values, directions = (jnp.moveaxis(x, num_axes, 0) for x in over_sequences(single, jacobians))
    cosines = jnp.sum(directions * unit[None, ..., None], axis=-2)
    live = values > -jnp.inf
    alignment = jnp.where(live, cosines**2, 0)
    results = (
        values,
        alignment,
        jax.nn.logsumexp(2 * values, axis=-1, b=alignment) / 2,
        values[..., 0],
        (jax.nn.logsumexp(2 * values, axis=-1) - jnp.log(jnp.asarray(values.shape[-1], wide))) / 2,
    )
    return GradientAlignment(lags, *(result.astype(own) for result in results))


def _unit(vectors: Array) -> Array:
    scaled = vectors / jnp.abs(vectors).max(axis=-1, keepdims=True)
    return scaled / jnp.linalg.norm(scaled, axis=-1, keepdims=True)
