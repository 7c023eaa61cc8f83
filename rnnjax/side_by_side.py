"""Loops that XLA runs side by side on a CPU, each on a core of its own: see ``independent_loops``."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rnnjax.independent_loops import independent_loop, starts_apart
from rnnjax.typing import Array

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
    return 2 if is_worth_it and num_parts > 1 and has_spare_core() else 1


def has_spare_core() -> bool:
    """Whether two loops have a core each: on one CPU device; over more of them, work may be spread already."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1 and _number_of_cores() > 1


def _number_of_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_halves(arrays: Any, axes: Any) -> tuple[Any, Any]:
    """Returns two pytrees of the halves of arrays along the given axes, −1 for what both have whole."""

    def half(second: bool) -> Any:
        return jax.tree.map(lambda x, axis: x if axis < 0 else jnp.array_split(x, 2, axis)[second], arrays, axes)

    return half(False), half(True)


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
