"""Scans that go chunk by chunk."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rnnjax.typing import Array


def scan_chunks(
    function: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, size: int, *, reverse: bool = False
) -> tuple[Any, Any]:
    """Scans over the leading axis of ``xs``, ``size`` entries at a time.

    Args:
      function: takes the carry and one chunk of ``xs``; returns the next carry, and ``ys`` as long as the chunk.
      carry: what the first chunk starts from.
      xs: pytree of arrays that share their leading axis, of length T.
      size: entries a chunk; the last one processed is shorter where T is not a multiple.
      reverse: process the chunks from last to first.

    Returns:
      The last carry, and the ``ys`` of all chunks in the order of ``xs``, leading axis T.

    Example:
      >>> import jax.numpy as jnp
      >>> total, sums = scan_chunks(lambda c, x: (c + x.sum(), c + jnp.cumsum(x)), 0, jnp.arange(5), 2)
      >>> print(total, sums)
      10 [ 0  1  3  6 10]
    """
    length = jax.tree.leaves(xs)[0].shape[0]
    number, rest = divmod(length, size)
    if length <= size:
        return function(carry, xs)
    even, remaining = (slice(rest, None), slice(0, rest)) if reverse else (slice(0, length - rest), slice(-rest, None))
    chunks = jax.tree.map(lambda x: x[even].reshape(number, size, *x.shape[1:]), xs)
    carry, ys = jax.lax.scan(function, carry, chunks, reverse=reverse)
    ys = jax.tree.map(lambda y: y.reshape(number * size, *y.shape[2:]), ys)
    if not rest:
        return carry, ys
    carry, last = function(carry, jax.tree.map(lambda x: x[remaining], xs))
    parts = (last, ys) if reverse else (ys, last)
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *parts)


def unseen_false(arrays: Any) -> Array:
    """Returns false, which XLA takes to depend on each of the floating arrays that are not empty."""
    numbers = [_first(x) for x in jax.tree.leaves(arrays) if x.size and jnp.issubdtype(x.dtype, jnp.floating)]
    # Never true, and for numbers that may be NaN not left out.
    return functools.reduce(lax.bitwise_or, [lax.lt(x, x) for x in numbers]) if numbers else jnp.zeros((), bool)


def _first(array: Array) -> Array:
    return lax.slice(array, (0,) * array.ndim, (1,) * array.ndim).reshape(())
