"""Loops of which nothing lies in memory that another loop writes to.

XLA goes through the steps of a loop on one core, and begins two loops at a time where neither waits for the other. But
it lets the later one wait wherever both write to the same memory, and it gives what a step holds for a while, and no
other step reads, the same place in all loops of a program. A loop here holds nothing for a while: whatever XLA would
keep in memory is carried from step to step.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from rnnjax.chunks import unseen_false
from rnnjax.typing import Array

_CORE: Any = core
"""Untyped: JAX versions differ in what of it they declare."""
_COMPUTED_ONCE = {"concatenate", "custom_jvp_call", "div", "dot_general", "jit", "pjit", "pow", "rsqrt", "sqrt"}
_COMPUTED_ONCE |= {"cos", "erf", "exp", "exp2", "expm1", "log", "log1p", "logistic", "sin", "tan", "tanh"}
"""Primitives whose results XLA keeps in memory, where it would compute others again for each use."""
_NEVER_HELD = {"broadcast_in_dim", "convert_element_type", "reshape", "select_n", "slice", "squeeze", "transpose"}
"""Primitives that XLA always makes part of what uses their results."""
_ENOUGH = 10
"""XLA hands half of what can be computed next to another thread where that is more than eight computations."""


def independent_loop(
    jaxpr: Any,
    bounds: tuple[Any, Any],
    carry: list[Array],
    rows: list[Array],
    read: Callable[[Array, list[Array]], list[Any]],
    write: Callable[[Array, list[Array], list[Array]], list[Array]],
    late: Array,
    used: Sequence[Array] = (),
    num_read: int = 0,
) -> tuple[list[Array], list[Array]]:
    """Runs a loop of one step at least.

    Args:
      jaxpr: of a step, closed: from the carry and what is read to the new carry and the new row.
      bounds: the first index, and the one after the last.
      carry: what the first step starts from.
      rows: arrays that steps read from and write to.
      read: from index and rows, what a step takes beside the carry; entries of ``rows`` come last.
      write: from index, rows and the new row, the new rows.
      late: false, and what the loop is to wait for.
      used: what XLA is to keep until the loop has ended.
      num_read: how many of ``rows``, the first ones, a step reads from.

    Returns:
      The last carry and the rows.
    """
    first, stop = bounds
    held, is_kept = _held(jaxpr.jaxpr, len(carry), num_read)
    outvars, debug_info = [*jaxpr.jaxpr.outvars, *held], jaxpr.jaxpr.debug_info.with_unknown_names()
    run = _CORE.jaxpr_as_fun(jaxpr.replace(jaxpr=jaxpr.jaxpr.replace(outvars=outvars, debug_info=debug_info)))
    ones = [jnp.ones_like(x) + late.astype(x.dtype) for x in carry]

    def kept(carry: list[Array]) -> list[Array]:
        return [x for x, again in zip(carry, is_kept, strict=True) if again]

    def one(state: Any) -> Any:
        index, _, carry, rows, _ = state
        # The remainder is computed once; XLA would compute i + 1 for each use anew, from an i that has to stay.
        index = jax.lax.rem(index + 1, jnp.full((), jnp.iinfo(index.dtype).max, index.dtype))
        # So is the quotient: new values may take the place of the old ones, which only it reads.
        carry = [x / y if again else x for x, y, again in zip(carry, ones, is_kept, strict=True)]
        found = run(*carry, *read(index - 1, rows))
        after, row, results = (
            found[: len(carry)],
            found[len(carry) : -len(held) or None],
            found[len(found) - len(held) :],
        )
        return index, index < stop, after, write(index - 1, rows, row), [*results, *kept(carry)]

    results = [jnp.zeros(x.shape, x.dtype) for x in [*(variable.aval for variable in held), *kept(carry)]]
    index = jnp.asarray(first) + late.astype(jnp.asarray(first).dtype)
    start = (index, jnp.ones((), bool), carry, rows, results)
    _, _, carry, rows, results = jax.lax.while_loop(lambda state: state[1], one, start)
    # XLA would not carry what is of no use, and would have another loop take the place of a carry that is not.
    nothing = unseen_false((results, carry, used))
    return [x + nothing.astype(x.dtype) for x in carry], rows


def starts_apart(arrays: Any) -> tuple[tuple[Array, Array], list[Array]]:
    """Returns for each of two loops what to wait for so that they begin on two threads, and what they have to use.

    What follows one computation is taken up by one thread. Here many small ones follow, of which XLA hands the later
    half to another thread; the first loop waits for the first of them, the second for the rest.

    Args:
      arrays: pytree of what both loops need, some of it floating.
    """
    leaves = jax.tree.leaves(arrays)
    dtype = jnp.result_type(*(x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)))
    numbers = [x.reshape(-1)[0].astype(dtype) for x in leaves]
    # XLA computes tanh once for all uses, and never as part of what uses it.
    before = jnp.tanh(sum(numbers[1:], numbers[0]))
    after = [jnp.tanh(before + number) for number in range(1, _ENOUGH + 1)]
    return (unseen_false(after[0]), unseen_false(after[1:])), [before, *after]


def _held(jaxpr: Any, num_carries: int, num_read: int) -> tuple[list[Any], list[bool]]:
    """Returns the variables that XLA would hold in memory, new carries aside, and which old carries it would."""
    eqns = _needed(jaxpr)
    used = Counter(id(v) for variables in [*(eqn.invars for eqn in eqns), jaxpr.outvars] for v in variables)
    carries = {id(v) for v in jaxpr.outvars[:num_carries]}
    old = {id(v) for v in jaxpr.invars[len(jaxpr.invars) - num_read :]}
    new = {id(v) for v in jaxpr.outvars[num_carries:]}
    held = []
    for eqn in eqns:
        name, from_row = eqn.primitive.name, any(id(v) in old for v in eqn.invars)
        for out in (v for v in eqn.outvars if id(v) not in carries and v.aval.shape and _is_floating(v)):
            again = used[id(out)] > 1 and name not in _NEVER_HELD
            if again or name in _COMPUTED_ONCE or (id(out) in new and from_row):
                held.append(out)

    def reads(variable: Any) -> int:
        users = [eqn for eqn in eqns for v in eqn.invars if v is variable]
        return sum(v is variable for v in jaxpr.outvars) + sum(
            reads(eqn.outvars[0]) if eqn.primitive.name in _NEVER_HELD else 1 for eqn in users
        )

    return held, [reads(v) > 1 for v in jaxpr.invars[:num_carries]]


def _needed(jaxpr: Any) -> list[Any]:
    """Returns the equations that the results need."""
    needed, eqns = {id(v) for v in jaxpr.outvars}, []
    for eqn in reversed(jaxpr.eqns):
        if any(id(v) in needed for v in eqn.outvars):
            eqns.append(eqn)
            needed |= {id(v) for v in eqn.invars}
    return eqns[::-1]


def _is_floating(variable: Any) -> bool:
    return jnp.issubdtype(variable.aval.dtype, jnp.floating)
