"""The leading singular values of a long Jacobian product from products J v and vᵀ J alone."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rnnjax import lapack, validation
from rnnjax.cells import Cell
from rnnjax.frames import block_growth, frame_growth, random_frame
from rnnjax.graded import Factors
from rnnjax.jacobi import graded_svd
from rnnjax.jacobians import jacobian_operator
from rnnjax.operators import Jacobians, first_non_finite_step, over_sequences
from rnnjax.products import Chain
from rnnjax.typing import Array, Key, Params
from rnnjax.unroll import Trajectory

_EXTRA_DIRECTIONS = 8
_ERROR_OF_A_BLOCK = {"float32": 2e-5, "float64": 1e-9}
"""Nats of error that the steps between two factorisations may add on the way forward, which gives the values."""
_SHARE_OF_TOLERANCE = 1 / 30
"""The same on the way back, which gives directions and residuals, as a share of the largest residual allowed."""
_VISIBLE = 1e-5
"""Share of a unit vector above which rounding would be taken for a residual."""


@flax.struct.dataclass
class LeadingSingularValues:
    """The k leading singular values of ∂s_T/∂s_0 and how far they have converged.

    Attributes:
      log_singular_values: log σ_i in nats, ``[..., k]``, descending; −inf where rank is lost.
      residuals: ‖Pᵀu_i − σ_i v_i‖ / σ_i of each pair of singular vectors, relative, ``[..., k]``: a singular value lies
        within this share of σ_i, and the error of log σ_i is of the order of its square. Left out are the directions
        that are longer than σ_i by so much that the rounding of u_i drowns what there is to compare (5 nats in
        float32, 24 in float64).
      right_vectors: v_i, unit columns ``[..., S, k]``: the perturbations of s_0 that grow most.
      num_passes: passes over the sequence, int32 ``[...]``.
      converged: whether every residual came below the tolerance, bool ``[...]``.
      first_non_finite_step: the first step whose Jacobian has a NaN or an infinity, int32 ``[...]``, −1 where there is
        none; values are NaN then. Outside ``jax.jit`` such a step is an error instead.
    """

    log_singular_values: Array
    residuals: Array
    right_vectors: Array
    num_passes: Array
    converged: Array
    first_non_finite_step: Array


def leading_log_singular_values(
    cell: Cell,
    params: Params,
    trajectory: Trajectory,
    k: int,
    *,
    key: Key | None = None,
    tolerance: float = 1e-2,
    max_passes: int = 41,
) -> LeadingSingularValues:
    """Returns the leading singular values of ∂s_T/∂s_0 without forming a Jacobian.

    Block subspace iteration: k + 8 random directions are carried back through the sequence by vᵀJ and forward by J v,
    columns kept well conditioned and their scales in logs, until every residual is below ``tolerance``. Time is linear
    in T, and memory O(S k) beyond the states. Values can be differentiated once, in forward or reverse mode, with
    respect to whatever ``params`` and ``trajectory`` depend on: ∂ log σ_i = u_iᵀ ∂P v_i / σ_i. That derivative exists
    where σ_i is no multiple singular value; near one it depends on rounding.

    Args:
      cell: any cell.
      params: its weights.
      trajectory: the states and inputs of the sequence, T steps.
      k: how many singular values, in [1, S].
      key: random key of the first directions; a fixed one by default.
      tolerance: largest residual at which to stop; its square is about the error of log σ in nats.
      max_passes: passes over the sequence after which to stop in any case, at least 3.

    Returns:
      The ``LeadingSingularValues``, in the dtype of the states.

    Raises:
      ValueError: a k outside [1, S], a tolerance that is not positive, fewer than 3 passes; a Jacobian that is not
        finite, with its step.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> halving = rnnjax.initializers.Orthogonal(0.5)
      >>> cell = rnnjax.VanillaCell(64, activation="identity", recurrent_initializer=halving)
      >>> params = cell.init(jax.random.key(0), input_size=1)
      >>> path = rnnjax.trajectory(cell, params, jnp.ones((8, 1)))
      >>> leading = leading_log_singular_values(cell, params, path, 2)
      >>> print(leading.log_singular_values.round(3), leading.converged)  # 8 ln ½
      [-5.545 -5.545] True

    Source: H. Rutishauser, Simultaneous iteration method for symmetric matrices, Numerische Mathematik 16, 1970;
    N. Halko, P.-G. Martinsson & J. A. Tropp, Finding structure with randomness, SIAM Review 53, 2011.
    """
    count = validation.integer_between("k", k, 1, cell.state_size)
    validation.positive_number("tolerance", tolerance)
    validation.integer_at_least("max_passes", max_passes, 3)
    jacobians = jacobian_operator(cell, params, trajectory)
    fixed = jax.lax.stop_gradient(jacobians)
    start = jax.random.key(0) if key is None else key
    leading = _leading(fixed, start, count, float(tolerance), max_passes)
    values = _differentiable(jacobians, leading.right_vectors, leading.log_singular_values)
    return dataclasses.replace(leading, log_singular_values=values)


@functools.partial(jax.jit, static_argnames=("count", "tolerance", "max_passes"))
def _leading(jacobians: Jacobians, key: Key, count: int, tolerance: float, max_passes: int) -> LeadingSingularValues:
    width = min(count + _EXTRA_DIRECTIONS, jacobians.shape[-1])
    error, epsilon = _ERROR_OF_A_BLOCK[jacobians.dtype.name], float(jnp.finfo(jacobians.dtype).eps)
    limit, limit_back = error / epsilon, max(error, _SHARE_OF_TOLERANCE * tolerance) / epsilon

    def single(sequence: Jacobians) -> LeadingSingularValues:
        forward = Chain(sequence, False, limit, scaled=False)
        backward = Chain(sequence, True, limit_back, scaled=False)
        first_bad = first_non_finite_step(sequence)
        start, _ = block_growth(sequence, random_frame(key, sequence, width), (0, sequence.shape[0]), True)

        def unfinished(state: tuple[LeadingSingularValues, Array]) -> Array:
            found, _ = state
            return ~found.converged & (found.num_passes + 2 <= max_passes)

        def both_ways(state: tuple[LeadingSingularValues, Array]) -> tuple[LeadingSingularValues, Array]:
            found, frame = state
            log_sigma, left, right = graded_svd(forward.multiplied(frame))
            vectors, back = lapack.matmul(frame, right), backward.multiplied(left)
            residuals = _residuals(back, vectors, log_sigma)
            converged = (residuals[:count] <= tolerance).all()
            passes = found.num_passes + 2
            return LeadingSingularValues(log_sigma, residuals, vectors, passes, converged, first_bad), back.left

        unknown, one = jnp.full(width, jnp.nan, sequence.dtype), jnp.ones((), jnp.int32)
        nothing = LeadingSingularValues(unknown, unknown, start, one, first_bad >= 0, first_bad)
        result, _ = jax.lax.while_loop(unfinished, both_ways, (nothing, start))
        return dataclasses.replace(
            result,
            log_singular_values=result.log_singular_values[:count],
            residuals=result.residuals[:count],
            right_vectors=result.right_vectors[:, :count],
            converged=result.converged & (first_bad < 0),
        )

    return over_sequences(single, jacobians)


def _residuals(back: Factors, right: Array, log_sigma: Array) -> Array:
    """Returns ‖Pᵀu_i − σ_i v_i‖ / σ_i for Pᵀ U in factors and V = ``right``; 0 where σ_i is lost.

    Along directions so much longer than σ_i that the rounding of u_i alone shows there, nothing is compared.
    """
    lost = ~jnp.isfinite(log_sigma)
    scales = back.log_scales + back.remainder
    exponent = scales[:, None] - jnp.where(lost, 0, log_sigma)[None, :]
    hidden = exponent > np.log(_VISIBLE / jnp.finfo(right.dtype).eps)
    coordinates = jnp.exp(jnp.where(hidden | ~jnp.isfinite(exponent), -jnp.inf, exponent)) * back.right
    expected = lapack.matmul(back.left.T, right)
    outside = right - lapack.matmul(back.left, expected)
    differences = jnp.where(hidden, 0, coordinates - expected)
    return jnp.where(lost, 0, jnp.sqrt(jnp.sum(differences**2, axis=0) + jnp.sum(outside**2, axis=0)))


@jax.custom_jvp
def _differentiable(jacobians: Jacobians, right_vectors: Array, values: Array) -> Array:
    """Returns ``values``, with the derivative that Σ_t log|R_ii| has when the frame starts from the right vectors."""
    return values


@_differentiable.defjvp
def _differentiable_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    jacobians, right_vectors, values = primals
    _, tangent = jax.jvp(lambda own: frame_growth(own, right_vectors)[1].sum(axis=0), (jacobians,), tangents[:1])
    return values, tangent
