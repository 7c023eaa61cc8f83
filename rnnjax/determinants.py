"""Σ_t log|det J_t| of a chain, each determinant computed on its own: evidence beside the singular values of a product.

XLA goes through a loop on one core of a CPU. Where another is free, it computes the determinants of a batch while the
first multiplies: in one loop over all steps of all sequences, of which nothing lies in memory that the loop over
sequences writes to (see ``independent_loops``).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rnnjax import graded, lapack
from rnnjax.chunks import unseen_false
from rnnjax.independent_loops import independent_loop, starts_apart
from rnnjax.operators import DenseJacobians, Jacobians, LinearizedJacobians, first_non_finite_step, over_sequences
from rnnjax.side_by_side import has_spare_core
from rnnjax.structured import StructuredJacobians
from rnnjax.typing import Array, DType


def with_log_abs_dets(
    function: Callable[[Jacobians], Any], jacobians: Jacobians, dtype: DType, *, reverse: bool = False
) -> tuple[Any, Array]:
    """Applies a function to the Jacobians of each sequence of a batch, and computes their determinants beside it.

    Args:
      function: takes Jacobians ``[T, S, S]``.
      jacobians: ``[T, ..., S, S]``.
      dtype: to compute determinants in.
      reverse: from the last to the first.

    Returns:
      What the function returns, batch axes leading; and log|det J_i … J_1| in nats for every i, or log|det J_T … J_i|
      for i from T to 1, ``[T, ...]``.

    Example:
      >>> import jax.numpy as jnp
      >>> chains = DenseJacobians(2 * jnp.ones((3, 2, 1, 1)))
      >>> sizes, totals = with_log_abs_dets(lambda chain: chain.dense().sum(), chains, jnp.float32)
      >>> print(sizes, totals[-1])
      [6. 6.] [2.0794415 2.0794415]
    """
    if isinstance(jacobians, LinearizedJacobians) or _is_one(jacobians) or not has_spare_core():

        def both(sequence: Jacobians) -> tuple[Any, Array]:
            return function(sequence), log_abs_dets(sequence, dtype, reverse=reverse)

        results, totals = over_sequences(both, jacobians)
        return results, jnp.moveaxis(totals, -1, 0)
    (late, later), used = starts_apart((jacobians, first_non_finite_step(jacobians)))
    logs, kept = _logs_of_all_steps(jacobians, dtype, later, used)
    results = over_sequences(function, jacobians, late)
    # What the one loop writes to would otherwise be free for the other, which would wait.
    logs += unseen_false((results, kept)).astype(dtype)
    zero = jnp.zeros_like(logs[0])
    return results, jax.lax.scan(_plus, (zero, zero), logs[::-1] if reverse else logs)[1]


def log_abs_dets(jacobians: Jacobians, dtype: DType, *, reverse: bool = False) -> Array:
    """Returns log|det J_i … J_1| in nats for every i of one sequence, ``[T]``; log|det J_T … J_i| if reverse."""
    zero, indices = jnp.zeros((), dtype), jnp.arange(jacobians.shape[0], dtype=jnp.int32)

    def step(total: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], Array]:
        return _plus(total, jacobians.at_step(index).astype(dtype).log_abs_det())

    return jax.lax.scan(step, (zero, zero), indices[::-1] if reverse else indices)[1]


def _plus(total: tuple[Array, Array], term: Array) -> tuple[tuple[Array, Array], Array]:
    """Adds to a compensated sum, and returns it and what it amounts to."""
    total = graded.add(*total, term)
    return total, total[0] + total[1]


def _is_one(jacobians: Jacobians) -> bool:
    """Whether there is a single sequence, or none: XLA does not go through its parts on two threads."""
    return math.prod(jacobians.shape[1:-2]) <= 1


def _logs_of_all_steps(
    jacobians: StructuredJacobians | DenseJacobians, dtype: DType, late: Array, used: list[Array]
) -> tuple[Array, list[Array]]:
    """Returns log|det J_t| in nats, ``[T, ...]``, and what must not be overwritten before the loop has ended."""
    steps = jacobians.flattened()
    _, rest = jax.eval_shape(steps.astype(dtype).schur_complement)
    number, size = rest.shape[:2]

    def step(_: list[Array], index: Array) -> tuple[list[Array], Array]:
        rest = steps.at_step(index).astype(dtype).schur_complement()[1]
        eliminated = lapack.lu_of_transpose_in_place(rest)
        pivots = jnp.diagonal(eliminated[0])
        return [*eliminated, pivots], pivots[None]

    def read(index: Array, _: list[Array]) -> list[Array]:
        return [index]

    def write(index: Array, rows: list[Array], row: list[Array]) -> list[Array]:
        return [jax.lax.dynamic_update_slice(rows[0], row[0], (index, jnp.zeros_like(index)))]

    # Whether an index of another type is negative would be looked up, and held in memory.
    zero, end = jnp.zeros((), jnp.uint32), jnp.asarray(number, jnp.uint32)
    shapes = [((size, size), dtype), ((size,), jnp.int32), ((), jnp.int32), ((size,), dtype)]
    carry, rows = [jnp.zeros(*shape) for shape in shapes], [jnp.zeros((number, size), dtype)]
    jaxpr = jax.make_jaxpr(step)(carry, zero)
    last, (pivots,) = independent_loop(jaxpr, (zero, end), carry, rows, read, write, late, used)
    logs = jnp.log(jnp.abs(pivots)).sum(axis=-1) + steps.astype(dtype).schur_complement()[0]
    return logs.reshape(jacobians.shape[:-2]), [x.astype(dtype) for x in last]
