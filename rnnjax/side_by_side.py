"""Loops that XLA runs side by side on a CPU, each on a core of its own.

XLA goes through the steps of a loop on one core, and begins two loops at a time where neither waits for the other. But
it lets the later one wait wherever both write to the same memory, and it gives what a step holds for a while, and no
other step reads, the same place in all loops of a program. A loop here holds nothing for a while: whatever XLA would
keep in memory is carried from step to step. Results and derivatives are those of ``scan_in_place``.
"""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from rnnjax.chunks import at_row, row_at, scan_in_place, unseen_false

_CORE: Any = core
"""Untyped: JAX versions differ in what of it they declare."""
_FEWEST, _MOST = 2**21, 2**24
"""Multiplications a step for which two loops on two cores are faster than one. XLA uses both for larger products; with
smaller steps the gain is lost where the second core has to wake up first."""
_FEWEST_IN_ALL = 2**24
"""Multiplications of a scan below which it is not worth a longer compilation."""
_COMPUTED_ONCE = {"concatenate", "custom_jvp_call", "div", "dot_general", "jit", "pjit", "pow", "rsqrt", "sqrt"}
_COMPUTED_ONCE |= {"cos", "erf", "exp", "exp2", "expm1", "log", "log1p", "logistic", "sin", "tan", "tanh"}
"""Primitives whose results XLA keeps in memory, where it would compute others again for each use."""
_NEVER_HELD = {"broadcast_in_dim", "convert_element_type", "reshape", "select_n", "slice", "squeeze", "transpose"}
"""Primitives that XLA always makes part of what uses their results."""


def number_of_loops(carry_shape: tuple[int, ...], num_gates: int, num_steps: int) -> int:
    """Returns into how many loops, each over a part of the batch, the scan of an affine cell is best split.

    Args:
      carry_shape: of one leaf of the carry, ``[..., H]``.
      num_gates: G; the recurrent product of a step is ``[..., G·H]``.
      num_steps: T.

    Returns:
      2 on a CPU with cores to spare, where steps are neither too small nor too large; 1 elsewhere.
    """
    per_step = math.prod(carry_shape) * carry_shape[-1] * num_gates
    is_worth_it = _FEWEST <= per_step <= _MOST and per_step * num_steps >= _FEWEST_IN_ALL
    can_be_split = len(carry_shape) > 1 and carry_shape[0] > 1
    # With more devices, the batch may be spread over them.
    has_cores = jax.default_backend() == "cpu" and jax.device_count() == 1 and _number_of_cores() > 1
    return 2 if is_worth_it and can_be_split and has_cores else 1


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
        held, is_kept = self._held(carry, rows)
        debug_info = self.jaxpr.debug_info.with_unknown_names()
        wider = self.jaxpr.replace(outvars=[*self.jaxpr.outvars, *held], debug_info=debug_info)
        run = _CORE.jaxpr_as_fun(_CORE.ClosedJaxpr(wider, consts))
        nothing = unseen_false(jax.tree.leaves((rows, xs))[:1])
        ones = jax.tree.map(lambda x: jnp.ones_like(x) + nothing.astype(x.dtype), carry)

        def kept(carry: Any) -> list[Any]:
            return [x for x, again in zip(jax.tree.leaves(carry), jax.tree.leaves(is_kept), strict=True) if again]

        def one(state: Any) -> Any:
            index, _, carry, rows, _ = state
            # The remainder is computed once; XLA would compute i + 1 for each use anew, from an i that has to stay.
            index = jax.lax.rem(index + 1, 2 * self.length + 1)
            # So is the quotient: new values may take the place of the old ones, which only it reads.
            carry = jax.tree.map(lambda x, y, again: x / y if again else x, carry, ones, is_kept)
            at = self.length - index if self.reverse else index - 1
            found = run(*jax.tree.leaves((carry, row_at((xs, rows), at))))
            number = self.results.num_leaves
            after, row = jax.tree.unflatten(self.results, found[:number])
            return index, index < self.length, after, at_row(rows, at, row), [*found[number:], *kept(carry)]

        results = [jnp.zeros(x.shape, x.dtype) for x in [*(variable.aval for variable in held), *kept(carry)]]
        start = (jnp.zeros((), int), jnp.ones((), bool), carry, rows, results)
        _, _, carry, rows, results = jax.lax.while_loop(lambda state: state[1], one, start)
        # XLA would not carry what is of no use, and would have another loop take the place of a carry that is not.
        nothing = unseen_false((results, carry))
        return jax.tree.leaves((jax.tree.map(lambda x: x + nothing.astype(x.dtype), carry), rows))

    def _held(self, carry: Any, rows: Any) -> tuple[list[Any], Any]:
        """Returns the variables that XLA would hold in memory, new carries aside, and which old carries it would."""
        leaves, structure = jax.tree.flatten(carry)
        num_rows, eqns = len(jax.tree.leaves(rows)), self._eqns()
        used = Counter(id(v) for variables in [*(eqn.invars for eqn in eqns), self.jaxpr.outvars] for v in variables)
        carries = {id(v) for v in self.jaxpr.outvars[: len(leaves)]}
        old, new = ({id(v) for v in vs[len(vs) - num_rows :]} for vs in (self.jaxpr.invars, self.jaxpr.outvars))
        held = []
        for eqn in eqns:
            name, from_row = eqn.primitive.name, any(id(v) in old for v in eqn.invars)
            for out in (v for v in eqn.outvars if id(v) not in carries and v.aval.shape and _is_floating(v)):
                again = used[id(out)] > 1 and name not in _NEVER_HELD
                if again or name in _COMPUTED_ONCE or (id(out) in new and from_row):
                    held.append(out)

        def reads(variable: Any) -> int:
            users = [eqn for eqn in eqns for v in eqn.invars if v is variable]
            return sum(v is variable for v in self.jaxpr.outvars) + sum(
                reads(eqn.outvars[0]) if eqn.primitive.name in _NEVER_HELD else 1 for eqn in users
            )

        return held, jax.tree.unflatten(structure, [reads(v) > 1 for v in self.jaxpr.invars[: len(leaves)]])

    def _eqns(self) -> list[Any]:
        """Returns the equations that the results need."""
        needed, eqns = {id(v) for v in self.jaxpr.outvars}, []
        for eqn in reversed(self.jaxpr.eqns):
            if any(id(v) in needed for v in eqn.outvars):
                eqns.append(eqn)
                needed |= {id(v) for v in eqn.invars}
        return eqns[::-1]


def _is_floating(variable: Any) -> bool:
    return jnp.issubdtype(variable.aval.dtype, jnp.floating)


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
