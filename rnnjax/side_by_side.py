"""Loops that XLA runs side by side on a CPU, each on a core of its own: see ``independent_loops``.

Results and derivatives are those of ``scan_in_place`` and ``fori_loop``.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from rnnjax.chunks import at_row, row_at, scan_in_place, unseen_false
from rnnjax.independent_loops import independent_loop, starts_apart
from rnnjax.typing import Array

_CORE: Any = core
"""Untyped: JAX versions differ in what of it they declare."""
_FEWEST, _MOST = 2**19, 2**24
"""Multiplications a step for which two loops on two cores are faster than one. XLA uses both cores for larger products;
below, steps cost less than what it does around them."""
_FEWEST_IN_ALL = 2**24
"""Multiplications of a scan below which it is not worth a longer compilation."""


def number_of_loops(per_step: int, num_steps: int, num_parts: int) -> int:
    """Returns into how many loops, each over some parts of what steps multiply, a loop is best split.

    Args:
      per_step: multiplications of a step, all parts together.
      num_steps: T, about.
      num_parts: how many parts there are, such as sequences of a batch.

    Returns:
      2 on a CPU with cores to spare, where steps are neither too small nor too large; 1 elsewhere.
    """
    is_worth_it = _FEWEST <= per_step <= _MOST and per_step * num_steps >= _FEWEST_IN_ALL
    # With more devices, the parts may be spread over them.
    has_cores = jax.default_backend() == "cpu" and jax.device_count() == 1 and _number_of_cores() > 1
    return 2 if is_worth_it and num_parts > 1 and has_cores else 1


def _number_of_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_halves(arrays: Any, axes: Any) -> tuple[Any, Any]:
    """Returns two pytrees of the halves of arrays along the given axes, −1 for what both have whole."""

    def half(second: bool) -> Any:
        return jax.tree.map(lambda x, axis: x if axis < 0 else jnp.array_split(x, 2, axis)[second], arrays, axes)

    return half(False), half(True)


def scan_side_by_side(
    step: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, xs: Any, rows: Any, *, reverse: bool = False
) -> tuple[Any, Any]:
    """Does what ``scan_in_place`` does, in a loop that waits for no other one of its kind.

    Example:
      >>> import jax.numpy as jnp
      >>> step = lambda c, x, row: (c + x, c + x * row)
      >>> total, sums = scan_side_by_side(step, jnp.zeros(()), jnp.arange(5.0), 10 * jnp.arange(5.0))
      >>> print(total, sums)
      10.0 [  0.  10.  41.  93. 166.]
    """
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (xs, rows))
    traced, like = jax.make_jaxpr(step, return_shape=True)(carry, *first)
    leaves, structure = jax.tree.flatten((traced.consts, carry, xs, rows))
    length = jax.tree.leaves((xs, rows))[0].shape[0]
    loop = _Loop(traced.jaxpr, jax.tree.structure(like), structure, length, reverse)
    return jax.tree.unflatten(loop.results, _loop_p.bind(*leaves, loop=loop))


def fori_side_by_side(
    first: Array, stop: Array, step: Callable[[Array, Any], Any], carries: Sequence[Any]
) -> list[Any]:
    """Does for each of two carries what ``fori_loop`` does, in loops that XLA runs side by side; not differentiable.

    Args:
      first: the first index.
      stop: the index after the last, more than ``first``.
      step: from index and carry to the next carry.
      carries: what the first steps start from.

    Returns:
      The last carries.

    Example:
      >>> import jax.numpy as jnp
      >>> add = lambda index, carry: carry + index
      >>> [float(x) for x in fori_side_by_side(jnp.array(0), jnp.array(4), add, [jnp.zeros(()), jnp.ones(())])]
      [6.0, 7.0]
    """
    lates, used = starts_apart((carries, first, stop))
    results = []
    for carry, late in zip(carries, lates, strict=True):
        leaves, structure = jax.tree.flatten(carry)
        jaxpr = jax.make_jaxpr(lambda carry, index: step(index, carry))(carry, first)

        def read(index: Array, _: list[Array]) -> list[Array]:
            return [index]

        last, _ = independent_loop(jaxpr, (first, stop), leaves, [], read, lambda *_: [], late, used)
        results.append(jax.tree.unflatten(structure, last))
    return results


@dataclasses.dataclass(frozen=True, eq=False)
class _Loop:
    """A loop over rows.

    Attributes:
      jaxpr: of a step: from the leaves of carry, xs and row to those of the new carry and the new row.
      results: the structure of the new carry and row.
      given: that of what the step closes over, the carry, xs and rows.
      length: number of steps.
      reverse: from the last row to the first.
    """

    jaxpr: Any
    results: Any
    given: Any
    length: int
    reverse: bool

    def plain(self, *leaves: Any) -> list[Any]:
        """Returns the leaves of what ``scan_in_place`` does."""
        consts, carry, xs, rows = jax.tree.unflatten(self.given, leaves)
        run = _CORE.jaxpr_as_fun(_CORE.ClosedJaxpr(self.jaxpr, consts))

        def step(*args: Any) -> Any:
            return jax.tree.unflatten(self.results, run(*jax.tree.leaves(args)))

        return jax.tree.leaves(scan_in_place(step, carry, xs, rows, reverse=self.reverse))

    def carrying_all(self, *leaves: Any) -> list[Any]:
        """Returns the same, by a loop that holds nothing for a while."""
        consts, carry, xs, rows = jax.tree.unflatten(self.given, leaves)
        jaxpr, structure = _CORE.ClosedJaxpr(self.jaxpr, consts), jax.tree.structure(rows)

        def at(index: Array) -> Array:
            return self.length - 1 - index if self.reverse else index

        def read(index: Array, rows: list[Array]) -> list[Array]:
            return jax.tree.leaves(row_at((xs, rows), at(index)))

        def write(index: Array, rows: list[Array], row: list[Array]) -> list[Array]:
            return at_row(rows, at(index), row)

        late = unseen_false(jax.tree.leaves((rows, xs))[:1])
        carried, written = jax.tree.leaves(carry), jax.tree.leaves(rows)
        carried, written = independent_loop(jaxpr, (0, self.length), carried, written, read, write, late)
        return [*carried, *jax.tree.leaves(jax.tree.unflatten(structure, written))]


_loop_p = core.Primitive("loop_side_by_side")
_loop_p.multiple_results = True


def _called(*leaves: Any, loop: _Loop) -> list[Any]:
    return loop.carrying_all(*leaves)


def _abstract(*leaves: Any, loop: _Loop) -> list[Any]:
    _, carry, _, rows = jax.tree.unflatten(loop.given, leaves)
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in jax.tree.leaves((carry, rows))]


def _jvp(primals: Any, tangents: Any, *, loop: _Loop) -> Any:
    """A loop that computes its own condition has no reverse mode: derivatives are those of the plain one."""
    moved = {index: tangent for index, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)}

    def run(changed: dict[int, Any]) -> list[Any]:
        return loop.plain(*(changed.get(index, leaf) for index, leaf in enumerate(primals)))

    return jax.jvp(run, [{index: primals[index] for index in moved}], [moved])


def _batch(leaves: Any, dims: Any, *, loop: _Loop) -> Any:
    results = jax.vmap(loop.carrying_all, in_axes=tuple(dims))(*leaves)
    return results, [0] * len(results)


_loop_p.def_impl(_called)
_loop_p.def_abstract_eval(_abstract)
ad.primitive_jvps[_loop_p] = _jvp
batching.primitive_batchers[_loop_p] = _batch
mlir.register_lowering(_loop_p, mlir.lower_fun(_called, multiple_results=True))
