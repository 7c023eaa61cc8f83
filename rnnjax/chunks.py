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


def scan_in_place(
    step: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, xs: Any, rows: Any, *, reverse: bool = False
) -> tuple[Any, Any]:
    """Scans over the leading axis of ``xs`` and ``rows``, and writes what each step returns over its row.

    ``lax.scan`` would set memory of its own to zero first, which on CPU costs as much as writing to it does.

    Args:
      step: takes the carry, one entry of ``xs`` and one of ``rows``; returns the next carry and the new row.
      carry: what the first step starts from.
      xs: pytree of arrays that share their leading axis, of length T.
      rows: pytree of arrays with that leading axis too.
      reverse: from the last entry to the first.

    Returns:
      The last carry, and the new rows.

    Example:
      >>> import jax.numpy as jnp
      >>> total, sums = scan_in_place(lambda c, x, row: (c + x, c + x * row), 0, jnp.arange(5), 10 * jnp.arange(5))
      >>> print(total, sums)
      10 [  0  10  41  93 166]
    """
    length = jax.tree.leaves((xs, rows))[0].shape[0]

    def one(index: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        (carry, rows), at = state, length - 1 - index if reverse else index
        carry, new = step(carry, *row_at((xs, rows), at))
        return carry, at_row(rows, at, new)

    return jax.lax.fori_loop(0, length, one, (carry, rows))


def row_at(arrays: Any, index: Array) -> Any:
    """Returns a row of each array; the index counts from 0."""
    read = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False, allow_negative_indices=False)
    return jax.tree.map(read, arrays)


def at_row(arrays: Any, index: Array, row: Any) -> Any:
    """Returns the arrays with a row of each replaced; the index counts from 0."""
    write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0, allow_negative_indices=False)
    return jax.tree.map(write, arrays, row)


def to_be_filled(length: int, like: Any, after: Array) -> Any:
    """Returns a pytree of arrays ``[length, ...]`` for ``scan_in_place`` to write to.

    Args:
      length: T.
      like: pytree of arrays or shapes, those of a row.
      after: what XLA is to compute before. Of the loops that wait for such arrays only, each then begins on the core
        that has filled the last of its own, and so two of them on two cores.

    Returns:
      Arrays of no particular content.
    """
    leaves, structure = jax.tree.flatten(like)
    nothing = unseen_false(after)
    # Each of another number: XLA would make equal ones once and copy them.
    filled = [
        jnp.full((length, *leaf.shape), number + nothing.astype(leaf.dtype), leaf.dtype)
        for number, leaf in enumerate(leaves, start=1)
    ]
    return jax.tree.unflatten(structure, filled)


def unseen_false(arrays: Any) -> Array:
    """Returns false, which XLA takes to depend on each of the floating arrays that are not empty."""
    numbers = [x.reshape(-1)[0] for x in jax.tree.leaves(arrays) if x.size and jnp.issubdtype(x.dtype, jnp.floating)]
    return functools.reduce(jnp.logical_or, [(x != x) & (x == x) for x in numbers], jnp.zeros((), bool))
