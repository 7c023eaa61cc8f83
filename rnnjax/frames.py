"""Frames of orthonormal columns carried along by a sequence's Jacobians, and how much each column grows.

Between two QR factorisations any triangular one serves. With J_{t+m} … J_{t+1} L = Πᵀ L' U (Gaussian elimination with
partial pivoting) the columns of Πᵀ L' span what QR's would, in the same order, and triangular factors multiply: Σ
log|U_ii|, with log|R_ii| of the last Πᵀ L' added and that of the first subtracted, is Σ log|R_ii| of a QR at every
step. A stretch of m steps is as long as its columns stay independent enough; each one is checked, and redone if they
did not.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnnjax import lapack
from rnnjax.operators import Jacobians
from rnnjax.side_by_side import fori_side_by_side, number_of_loops
from rnnjax.structured import StructuredJacobians
from rnnjax.typing import Array, Key

_Progress = tuple[Array, Array, Array, Array]
"""Time, frame, logs since the block began, and the length of stretch to try next."""
_CONDITION = {"float32": 10.0, "float64": 1e6}
"""Condition number that a stretch is made for; ten times as much is accepted. Its error is about ε times it."""


def random_frame(key: Key, jacobians: Jacobians, count: int) -> Array:
    """Returns random orthonormal columns, the same for every sequence.

    Args:
      key: random key.
      jacobians: the step Jacobians the frame is for, ``[T, ..., S, S]``; its shape and dtype are used.
      count: number of columns k, at most S.

    Returns:
      ``[..., S, k]``, uniformly distributed over the k-frames of the space but for the signs of columns.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnnjax.operators import DenseJacobians
      >>> frame = random_frame(jax.random.key(0), DenseJacobians(jnp.ones((5, 3, 4, 4))), 2)
      >>> frame.shape, bool(jnp.allclose(frame[0].T @ frame[0], jnp.eye(2), atol=1e-6))
      ((3, 4, 2), True)
    """
    *batch_shape, size, _ = jacobians.shape[1:]
    columns = jnp.linalg.qr(jax.random.normal(key, (size, count), jacobians.dtype))[0]
    return jnp.broadcast_to(columns.reshape((1,) * len(batch_shape) + columns.shape), (*batch_shape, *columns.shape))


def frame_growth(jacobians: Jacobians, frame: Array, *, backward: bool = False) -> tuple[Array, Array]:
    """Carries an orthonormal frame along, by J_t forward in time or by J_tᵀ backward: J_t Q_{t−1} = Q_t R_t.

    Args:
      jacobians: the step Jacobians, from ``jacobian_operator``.
      frame: orthonormal columns ``[..., S, k]``.
      backward: from the last step to the first, with transposed Jacobians.

    Returns:
      The last frame ``[..., S, k]``, and log|R_ii| of each step in nats, ``[T, ..., k]``, entry t that of J_t.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnnjax.operators import DenseJacobians
      >>> steps = DenseJacobians(jnp.stack([jnp.diag(jnp.array([2.0, 0.5]))] * 3))
      >>> _, growth = frame_growth(steps, jnp.eye(2))
      >>> print(growth.sum(axis=0).round(3))  # 3 ln 2 and 3 ln ½
      [ 2.079 -2.079]

    Source: G. Benettin et al., Lyapunov characteristic exponents for smooth dynamical systems, Meccanica 15, 1980.
    """
    return _frame_growth(jacobians, frame, jnp.arange(jacobians.shape[0]), backward)


@functools.partial(jax.jit, static_argnames="backward")
def _frame_growth(jacobians: Jacobians, frame: Array, times: Array, backward: bool = False) -> tuple[Array, Array]:
    def step(frame: Array, time: Array) -> tuple[Array, Array]:
        jacobian = jacobians.at_step(time)
        return _orthonormal(jacobian.transpose_times(frame) if backward else jacobian.times(frame))

    return jax.lax.scan(step, frame, times, reverse=backward)


def certainly_lost(columns: Array) -> Array:
    """Returns which columns ``[..., S, k]`` depend on those before for want of rows that are not zero, ``[..., k]``.

    A QR factorisation leaves rounding on the diagonal there, not zero.
    """
    rank = jnp.any(columns != 0, axis=-1).sum(axis=-1, dtype=jnp.int32)
    indices = jnp.arange(columns.shape[-1], dtype=jnp.int32)
    return indices.reshape((1,) * rank.ndim + (-1,)) >= rank[..., None]


def _orthonormal(columns: Array) -> tuple[Array, Array]:
    frame, triangle = lapack.qr(columns)
    return frame, jnp.where(certainly_lost(columns), -jnp.inf, _log_diagonal(triangle))


def _log_diagonal(triangle: Array) -> Array:
    return jnp.log(jnp.abs(jnp.diagonal(triangle, axis1=-2, axis2=-1)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
@functools.partial(jax.jit, static_argnums=(2, 3))
def block_growth(
    jacobians: Jacobians, frame: Array, boundaries: tuple[int, ...], backward: bool = False
) -> tuple[Array, Array]:
    """Carries an orthonormal frame along, and sums how much its columns grow between boundaries.

    Args:
      jacobians: the step Jacobians, from ``jacobian_operator``.
      frame: orthonormal columns ``[..., S, k]``, before the step of the first boundary.
      boundaries: M + 1 numbers of steps taken, ascending.
      backward: from the last step to the first, with transposed Jacobians.

    Returns:
      The frame at the last boundary, and Σ log|R_ii| of each block of steps in nats, ``[M, ..., k]``: those of a QR at
      every step, to rounding. Derivatives are those of a QR at every step too.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnnjax.operators import DenseJacobians
      >>> steps = DenseJacobians(jnp.stack([jnp.diag(jnp.array([2.0, 0.5]))] * 5))
      >>> print(block_growth(steps, jnp.eye(2), (0, 2, 5))[1].round(3))  # 2 and 3 times ln 2 and ln ½
      [[ 1.386 -1.386]
       [ 2.079 -2.079]]
    """
    if np.diff(boundaries).max() <= 1:
        return _growth_of_steps(jacobians, frame, boundaries, backward)

    zeros = jnp.zeros((*frame.shape[:-2], frame.shape[-1]), frame.dtype)

    def block(start: tuple[Array, Array, Array], ends: Array) -> tuple[tuple[Array, Array, Array], Array]:
        columns, before, length = start
        stretch = functools.partial(_stretch, functools.partial(_taken, jacobians, backward), ends[1])
        initial = (ends[0], columns, zeros, length)
        _, columns, logs, length = jax.lax.while_loop(lambda state: state[0] < ends[1], stretch, initial)
        after = _log_diagonal(lapack.triangle(columns))
        return (columns, after, length), logs + (after - before)

    ends = jnp.stack([jnp.asarray(boundaries[:-1], jnp.int32), jnp.asarray(boundaries[1:], jnp.int32)], axis=1)
    (columns, *_), logs = jax.lax.scan(block, (frame, zeros, jnp.ones((), jnp.int32)), ends)
    return lapack.qr(columns)[0], logs


@block_growth.defjvp
def _block_growth_jvp(boundaries: tuple[int, ...], backward: bool, primals: Any, tangents: Any) -> Any:
    """Derivatives of a QR at every step: a loop of unknown length has none in reverse."""

    def growth(jacobians: Jacobians, frame: Array) -> tuple[Array, Array]:
        frame, logs = _growth_of_steps(jacobians, frame, boundaries, backward)
        blocks = np.repeat(np.arange(len(boundaries) - 1), np.diff(boundaries))
        return frame, jax.ops.segment_sum(logs, blocks, len(boundaries) - 1)

    return jax.jvp(growth, primals, tangents)


def _growth_of_steps(
    jacobians: Jacobians, frame: Array, boundaries: tuple[int, ...], backward: bool
) -> tuple[Array, Array]:
    """Returns the last frame, and log|R_ii| of each step between the first boundary and the last, as they are taken."""
    times = jnp.arange(boundaries[0], boundaries[-1])
    if not backward:
        return _frame_growth(jacobians, frame, times)
    frame, logs = _frame_growth(jacobians, frame, jacobians.shape[0] - 1 - times[::-1], backward=True)
    return frame, logs[::-1]


def _taken(jacobians: Jacobians, backward: bool, first: Array, stop: Array, columns: Array) -> Array:
    """Returns the columns after the steps from the first to that before ``stop``."""
    halves = _halves(jacobians, columns)
    by_rows = isinstance(jacobians, StructuredJacobians) and jacobians.takes_rows(halves[0].shape[-1])

    def take(step: Array, columns: Array) -> Array:
        jacobian = jacobians.at_step(jacobians.shape[0] - 1 - step if backward else step)
        if isinstance(jacobian, StructuredJacobians) and by_rows:
            return jacobian.times_rows(columns, transposed=backward)
        return jacobian.transpose_times(columns) if backward else jacobian.times(columns)

    if by_rows:
        halves = [jnp.swapaxes(half, -1, -2) for half in halves]
    if len(halves) > 1:
        halves = fori_side_by_side(first, stop, take, halves)
    else:
        halves = [jax.lax.fori_loop(first, stop, take, halves[0])]
    return jnp.concatenate([jnp.swapaxes(half, -1, -2) if by_rows else half for half in halves], axis=-1)


def _halves(jacobians: Jacobians, columns: Array) -> list[Array]:
    """Returns the columns, or each half of them where two loops are faster.

    With more columns stretches are shorter, and what is between them takes longer.
    """
    count, size = columns.shape[-1], jacobians.shape[-1]
    if not isinstance(jacobians, StructuredJacobians) or columns.ndim > 2 or 2 * count > size:
        return [columns]
    return jnp.array_split(columns, number_of_loops(size * size * count, jacobians.shape[0], count), axis=-1)


def _stretch(take: Callable[[Array, Array, Array], Array], stop: Array, state: _Progress) -> _Progress:
    """Takes several steps, then one triangular factorisation; gives half of them up where columns became dependent."""
    time, frame, logs, length = state
    left = stop - time
    steps = -(-left // -(-left // length))  # stretches of like length
    columns = take(time, time + steps, frame)
    lower, pivots = lapack.over_batch(_unit_lower, columns, columns.ndim - 2)
    info = jnp.finfo(frame.dtype)
    # A pivot this far above underflow has all its digits; a column without rank has none to lose.
    sound = pivots > info.tiny / info.eps
    ratios = jnp.where(sound, jnp.abs(columns).max(axis=-2) / jnp.where(sound, pivots, 1), jnp.inf)
    condition = jnp.where(jnp.isneginf(logs), 1, ratios).max()
    aim = _CONDITION[frame.dtype.name]
    accepted = (steps == 1) | (condition <= 10 * aim)
    per_step = jnp.maximum(jnp.log(condition), 1e-3) / steps.astype(frame.dtype)
    wanted = math.log(aim) / per_step
    wanted = jnp.clip(wanted, 1, 2 * steps.astype(frame.dtype)).astype(jnp.int32)
    wanted = jnp.where(steps < length, jnp.maximum(wanted, length), wanted)
    taken = (time + steps, lower, logs + jnp.log(pivots), wanted)
    return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), taken, (time, frame, logs, steps // 2))


def _unit_lower(columns: Array) -> tuple[Array, Array]:
    """L' with its rows put back, and |U_ii|, of the factorisation with partial pivoting."""
    rows, unit, triangle = lapack.lu(columns)
    return jnp.zeros_like(unit).at[rows].set(unit, unique_indices=True), jnp.abs(jnp.diagonal(triangle))
