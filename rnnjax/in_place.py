"""Scans that write what a step returns over what it has read, and the rest to memory that is not set to zero first.

``lax.scan`` sets memory of its own to zero, which on CPU costs as much as writing to it does. Its derivatives, and what
``vmap`` makes of it, hold here too.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from rnnjax.chunks import unseen_false
from rnnjax.independent_loops import independent_loop
from rnnjax.typing import Array

_CORE: Any = core
"""Untyped: JAX versions differ in what of it they declare."""


def scan_in_place(
    step: Callable[[Any, Any, Any], tuple[Any, Any, Any]],
    carry: Any,
    xs: Any,
    rows: Any,
    after: Array,
    *,
    flat: bool = False,
    reverse: bool = False,
    side_by_side: bool = False,
) -> tuple[Any, Any, Any]:
    """Scans over the leading axis of ``xs`` and ``rows``, and writes the new row of each step over the old one.

    Args:
      step: takes the carry, one entry of ``xs`` and one of ``rows``; returns the next carry, the new row, and whatever
        else is to be kept of the step.
      carry: what the first step starts from.
      xs: pytree of arrays that share their leading axis, of length T.
      rows: pytree of arrays with that leading axis too.
      after: what XLA is to compute before it fills memory for what is kept. Of the loops that wait for such memory
        only, each then begins on the core that has filled the last of its own, and so two of them on two cores.
      flat: each number of a row is computed from those at the same place, in arrays of the same shape. On a CPU one
        loop over all of a row is then as fast as nested ones, and compiled sooner.
      reverse: from the last entry to the first.
      side_by_side: in a loop that waits for no other one of its kind: see ``independent_loops``.

    Returns:
      The last carry, the new rows, and what is kept of all steps, leading axis T.

    Example:
      >>> import jax.numpy as jnp
      >>> step = lambda c, x, row: (c + x, c + x * row, c)
      >>> xs = jnp.arange(5.0)
      >>> total, rows, before = scan_in_place(step, jnp.zeros(()), xs, 10 * xs, xs)
      >>> print(total, rows, before)
      10.0 [  0.  10.  41.  93. 166.] [0. 0. 1. 3. 6.]
    """
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (xs, rows))
    traced, like = jax.make_jaxpr(step, return_shape=True)(carry, *first)
    groups = [traced.consts, *(jax.tree.leaves(tree) for tree in (carry, xs, rows))]
    length = jax.tree.leaves((xs, rows))[0].shape[0]
    memory = _to_be_filled(length, jax.tree.leaves(like[2]), after, apart=side_by_side)
    sizes = tuple(len(group) for group in [*groups, memory])
    # What is spread over devices keeps its axes.
    flat = flat and jax.default_backend() == "cpu" and jax.device_count() == 1
    loop = _Loop(traced.jaxpr, sizes, length, flat, reverse, side_by_side)
    results = _loop_p.bind(*itertools.chain(*groups, memory), loop=loop)
    return jax.tree.unflatten(jax.tree.structure(like), results)


def _to_be_filled(length: int, like: list[Any], after: Array, *, apart: bool) -> list[Array]:
    """Returns arrays ``[length, ...]`` of no particular content, each filled on its own if ``apart``.

    XLA fills equal ones once and copies them, which takes a little longer, and less time to compile.
    """
    nothing = unseen_false(after)
    return [
        jnp.full((length, *leaf.shape), apart * number + nothing.astype(leaf.dtype), leaf.dtype)
        for number, leaf in enumerate(like, start=1)
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class _Loop:
    """A loop over rows, on lists of arrays.

    Attributes:
      jaxpr: of a step: from what it closes over, the carry, an entry of xs and an old row to the new carry, the new row
        and what is kept.
      sizes: how many arrays there are of each of these four, and to be kept.
      length: number of steps.
      flat: rows are vectors while they are read and written.
      reverse: from the last row to the first.
      side_by_side: holding nothing that another loop writes to.
    """

    jaxpr: Any
    sizes: tuple[int, ...]
    length: int
    flat: bool
    reverse: bool
    side_by_side: bool

    def split(self, arrays: Any) -> list[list[Any]]:
        """Returns what steps close over, the carry, xs, rows and the memory to fill, each a list."""
        left = list(arrays)
        return [[left.pop(0) for _ in range(size)] for size in self.sizes]

    def place(self, index: Array) -> Array:
        """Returns the row that the step of an index, counted from the first one taken, reads and writes."""
        return self.length - 1 - index if self.reverse else index

    def run(self, consts: Any) -> Callable[..., list[Any]]:
        """Returns the step."""
        return _CORE.jaxpr_as_fun(_CORE.ClosedJaxpr(self.jaxpr, consts))

    def plain(self, *arrays: Any) -> list[Any]:
        """Returns the results by a scan, for derivatives."""
        consts, carry, xs, rows, _ = self.split(arrays)
        run = self.run(consts)

        def step(carry: list[Any], entries: list[Any]) -> tuple[list[Any], list[Any]]:
            results = run(*carry, *entries)
            return results[: len(carry)], results[len(carry) :]

        last, kept = lax.scan(step, carry, [*xs, *rows], length=self.length, reverse=self.reverse)
        return [*last, *kept]

    def in_place(self, *arrays: Any) -> list[Any]:
        """Returns the results by a loop that writes over rows."""
        consts, carry, xs, rows, memory = self.split(arrays)
        written, shapes = [*rows, *memory], [x.shape[1:] for x in [*xs, *rows]]
        source, into = ([x.reshape(self.length, -1) if self.flat else x for x in group] for group in (xs, written))

        def read(index: Array, written: list[Array]) -> list[Array]:
            at = self.place(index)
            return [_row(x, at, shape) for x, shape in zip([*source, *written], shapes, strict=False)]

        def write(index: Array, written: list[Array], row: list[Array]) -> list[Array]:
            at = self.place(index)
            return [_with_row(x, at, new) for x, new in zip(written, row, strict=True)]

        jaxpr, bounds = _CORE.ClosedJaxpr(self.jaxpr, consts), (0, self.length)
        if self.side_by_side:
            late = unseen_false([*rows, *memory, *xs][:1])
            carry, into = independent_loop(jaxpr, bounds, carry, into, read, write, late, num_read=len(rows))
        else:
            carry, into = _loop_in_order(jaxpr, bounds, carry, into, read, write)
        return [*carry, *(x.reshape(like.shape) for x, like in zip(into, written, strict=True))]


def _loop_in_order(
    jaxpr: Any, bounds: tuple[int, int], carry: list[Array], rows: list[Array], read: Any, write: Any
) -> tuple[list[Array], list[Array]]:
    run, num_carries = _CORE.jaxpr_as_fun(jaxpr), len(carry)

    def one(state: Any) -> Any:
        index, carry, rows = state
        results = run(*carry, *read(index, rows))
        return index + 1, results[:num_carries], write(index, rows, results[num_carries:])

    first, stop = (jnp.int32(bound) for bound in bounds)
    _, carry, rows = lax.while_loop(lambda state: state[0] < stop, one, (first, carry, rows))
    return carry, rows


def _row(array: Array, index: Array, shape: tuple[int, ...]) -> Array:
    """Returns a row in the given shape."""
    at = (index, *(index.dtype.type(0),) * (array.ndim - 1))
    return lax.dynamic_slice(array, at, (1, *array.shape[1:]), allow_negative_indices=False).reshape(shape)


def _with_row(array: Array, index: Array, row: Array) -> Array:
    """Returns the array with a row replaced."""
    at = (index, *(index.dtype.type(0),) * (array.ndim - 1))
    return lax.dynamic_update_slice(array, row.reshape(1, *array.shape[1:]), at, allow_negative_indices=False)


_loop_p = core.Primitive("scan_in_place")
_loop_p.multiple_results = True


def _called(*arrays: Any, loop: _Loop) -> list[Any]:
    return loop.in_place(*arrays)


def _abstract(*arrays: Any, loop: _Loop) -> list[Any]:
    _, carry, _, rows, memory = loop.split(arrays)
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in [*carry, *rows, *memory]]


def _jvp(primals: Any, tangents: Any, *, loop: _Loop) -> Any:
    moved = {index: tangent for index, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)}

    def run(changed: dict[int, Any]) -> list[Any]:
        return loop.plain(*(changed.get(index, array) for index, array in enumerate(primals)))

    return jax.jvp(run, [{index: primals[index] for index in moved}], [moved])


def _batch(arrays: Any, dims: Any, *, loop: _Loop) -> Any:
    """Mapped axes of all but what steps close over come to stand after time, and first in the carry."""
    size = next(x.shape[dim] for x, dim in zip(arrays, dims, strict=True) if dim is not None)
    consts, *others = loop.split(arrays)
    const_dims, *other_dims = loop.split(dims)
    carry, *along_time = (
        [batching.bdim_at_front(x, dim, size) for x, dim in zip(group, own, strict=True)]
        for group, own in zip(others, other_dims, strict=True)
    )
    along_time = [[jnp.moveaxis(x, 0, 1) for x in group] for group in along_time]
    given = [*carry, *(x[0] for group in along_time[:2] for x in group)]

    def step(consts: list[Any], *entries: Any) -> list[Any]:
        return loop.run(consts)(*entries)

    over_all = jax.vmap(step, in_axes=(const_dims, *(0,) * len(given)))
    traced = jax.make_jaxpr(over_all)(consts, *given)
    num_consts, (jaxpr, own) = len(consts), (traced.jaxpr, traced.consts)
    closed_over, invars = jaxpr.invars[:num_consts], jaxpr.invars[num_consts:]
    jaxpr = jaxpr.replace(constvars=[*jaxpr.constvars, *closed_over], invars=invars)
    wider = dataclasses.replace(loop, jaxpr=jaxpr, sizes=(len(own) + num_consts, *loop.sizes[1:]))
    results = _loop_p.bind(*own, *consts, *carry, *itertools.chain(*along_time), loop=wider)
    return results, [0] * len(carry) + [1] * (len(results) - len(carry))


_loop_p.def_impl(_called)
_loop_p.def_abstract_eval(_abstract)
ad.primitive_jvps[_loop_p] = _jvp
batching.primitive_batchers[_loop_p] = _batch
mlir.register_lowering(_loop_p, mlir.lower_fun(_called, multiple_results=True))
