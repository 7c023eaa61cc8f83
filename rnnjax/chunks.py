"""Scans that go chunk by chunk."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

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


def scan_prepared(
    prepare: Callable[[Any], Any],
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
    size: int,
    *,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """Scans over the leading axis of ``xs``, which is prepared for ``size`` steps at a time.

    Results go straight to where they stay. A scan inside a scan would gather those of a chunk first, and copy them.

    Args:
      prepare: takes a chunk of ``xs``, returns what its steps take.
      step: takes the carry and one entry of that; returns the next carry, and ``y``.
      carry: what the first step starts from.
      xs: pytree of arrays that share their leading axis, of length T.
      size: entries a chunk; the last one processed is shorter where T is not a multiple.
      reverse: from the last entry to the first.

    Returns:
      The last carry, and the ``y`` of every step in the order of ``xs``, leading axis T.

    Example:
      >>> import jax.numpy as jnp
      >>> total, sums = scan_prepared(lambda x: 2 * x, lambda c, x: (c + x, c + x), 0, jnp.arange(5), 2)
      >>> print(total, sums)
      20 [ 0  2  6 12 20]
    """
    length = jax.tree.leaves(xs)[0].shape[0]
    if length <= size:
        return jax.lax.scan(step, carry, prepare(xs), reverse=reverse)

    def first(carry: Any, xs: Any) -> Any:
        return step(carry, jax.tree.map(lambda x: x[0], prepare(jax.tree.map(lambda x: x[:1], xs))))[1]

    def one(state: tuple[Any, Any], entry: tuple[Array, Any]) -> tuple[tuple[Any, Any], None]:
        (carry, results), (index, x) = state, entry
        carry, y = step(carry, x)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
        return (carry, jax.tree.map(put, results, y)), None

    def chunk(state: tuple[Any, Any], entries: tuple[Array, Any]) -> tuple[tuple[Any, Any], None]:
        indices, xs = entries
        return jax.lax.scan(one, state, (indices, prepare(xs)), reverse=reverse)

    shapes = jax.eval_shape(first, carry, xs)
    results = jax.tree.map(lambda y: jnp.zeros((length, *y.shape), y.dtype), shapes)
    state, _ = scan_chunks(chunk, (carry, results), (jnp.arange(length), xs), size, reverse=reverse)
    return state
