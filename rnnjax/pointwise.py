"""The pointwise function of a cell, taken apart into the factors that backpropagation needs.

The pointwise function is written once, for arrays of one gate each. Traced, it says which pre-activations it only ever
adds up, which sums go straight into a tanh or a sigmoid, and which new carry is computed from another. With these, the
value and all derivatives of a step cost one tanh over all gates and a few products, both in the scan that trains and,
for all steps at once, in the Jacobians.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from rnnjax import activations
from rnnjax.cells import AffineCell
from rnnjax.local_derivatives import LocalDerivatives
from rnnjax.typing import Array, Carry

_CORE: Any = core
"""Untyped: JAX versions differ in what of it they declare."""
_GATE_ACTIVATIONS = {"tanh": 1.0, "logistic": 0.5}
"""Primitives φ(a) = s tanh(s a) + 1 − s, by name, with s."""


class PointwiseProgram:
    """The pointwise function of a cell, traced.

    Args:
      cell: an affine cell.
      shape: of the arrays of one gate, ``[..., H]``.
      dtype: their dtype.
      exact: take the cell's activations as they are, with derivatives that stay true where a unit saturates; otherwise
        tanh and sigmoid are computed from one tanh over all gates, and their derivatives from their values.
    """

    def __init__(self, cell: AffineCell, shape: tuple[int, ...], dtype: Any, *, exact: bool) -> None:
        # With the axis of gates kept, at length 1: XLA's loops over slices that lose it are not vectorised.
        like = jax.ShapeDtypeStruct((*shape[:-1], 1, shape[-1]), dtype)
        carry: Carry = like if cell.num_carries == 1 else (like,) * cell.num_carries
        gates = (like,) * cell.num_gates

        def run(carry: Carry, inputs: tuple[Array, ...], recurrent: tuple[Array, ...]) -> list[Array]:
            return jax.tree.leaves(cell.pointwise(carry, inputs, recurrent))

        traced = jax.make_jaxpr(run)(carry, gates, gates)
        if len(traced.out_avals) != cell.num_carries:
            raise ValueError(
                f"pointwise of {type(cell).__name__} must return {cell.num_carries} new carries, "
                f"got {len(traced.out_avals)}"
            )
        for place, result in enumerate(traced.out_avals):
            if (result.shape, result.dtype) != (like.shape, like.dtype):
                raise ValueError(
                    f"pointwise of {type(cell).__name__} must return arrays as it is given them, unit by unit, "
                    f"{like.dtype}{list(like.shape)}, got {result.dtype}{list(result.shape)} for carry {place}"
                )
        self.cell, self.dtype, self.exact = cell, dtype, exact
        self.jaxpr = traced.jaxpr
        self.constants = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
        variables = traced.jaxpr.invars
        self.carry: list[Any] = variables[: cell.num_carries]
        self.inputs: list[Any] = variables[cell.num_carries :][: cell.num_gates]
        self.recurrent = variables[-cell.num_gates :]
        self.results: list[Any] = traced.jaxpr.outvars
        self.producers = {out: eqn for eqn in traced.jaxpr.eqns for out in eqn.outvars}
        self.sums = [self._sum(u, r) for u, r in zip(self.inputs, self.recurrent, strict=True)]
        self.activated = {} if exact else self._activated()

    def _uses(self, variable: Any) -> list[Any]:
        eqns = [eqn for eqn in self.jaxpr.eqns for used in eqn.invars if used is variable]
        return eqns + [None for result in self.results if result is variable]

    def _sum(self, u: Any, r: Any) -> Any:
        """Returns the variable u + r if the two are used in no other way, else None."""
        first, second = self._uses(u), self._uses(r)
        same = len(first) == 1 and len(second) == 1 and first[0] is second[0] and first[0] is not None
        return first[0].outvars[0] if same and first[0].primitive.name in ("add", "add_any") else None

    def _activated(self) -> dict[int, tuple[Any, float]]:
        """Returns, by gate, the activated sum and its s, where tanh or sigmoid is all that becomes of the sum."""
        found = {}
        for gate, variable in enumerate(self.sums):
            uses = [] if variable is None else self._uses(variable)
            scale = _activation(uses[0]) if len(uses) == 1 and uses[0] is not None else None
            if scale is not None:
                found[gate] = (uses[0].outvars[0], scale)
        return found

    def sums_inputs(self) -> bool:
        """Whether u and r are only ever added up, in every gate."""
        return all(variable is not None for variable in self.sums)

    def reads_inputs_once(self) -> bool:
        """Whether each u is only ever part of a sum, and that of one tanh or sigmoid.

        XLA computes those once, and anything less once for each use; where it reads a row twice and writes over it, it
        copies all of the rows.
        """
        return all(map(self._read_once, self.inputs))

    def _read_once(self, variable: Any) -> bool:
        uses = self._uses(variable)
        if len(uses) != 1 or uses[0] is None:
            return not uses
        if _activation(uses[0]) is not None:
            return not self.exact
        return uses[0].primitive.name in ("add", "add_any", "sub", "neg") and self._read_once(uses[0].outvars[0])

    def _bound(self, carry: list[Array], inputs: Array, recurrent: Array) -> tuple[dict[Any, Array], Array | None]:
        """Returns the variables that are given, by name, and (s tanh)' of the activated gates."""
        known = self.constants | {name: leaf[..., None, :] for name, leaf in zip(self.carry, carry, strict=True)}
        total = inputs + recurrent
        for gate, variable in enumerate(self.sums):
            if variable is None:
                known |= {self.inputs[gate]: _gates(inputs, gate), self.recurrent[gate]: _gates(recurrent, gate)}
            elif gate not in self.activated:
                known[variable] = _gates(total, gate)
        if not self.activated:
            return known, None
        before, scale = _gates(total, *self.activated), self._scale(total)
        value = jnp.tanh(before if scale is None else before * scale)
        shifted = value if scale is None else value * scale + (1 - scale)
        for index, (variable, _) in enumerate(self.activated.values()):
            known[variable] = _gates(shifted, index)
        slopes = 1 - value * value
        return known, slopes if scale is None else jnp.asarray(scale**2) * slopes

    def _scale(self, like: Array) -> np.ndarray | None:
        """Returns s of each activated gate ``[1, …, G, 1]``, to be multiplied with ``[..., G, H]``; None for ones."""
        scales = [s for _, s in self.activated.values()]
        shape = (1,) * (like.ndim - 2) + (-1, 1)
        return None if set(scales) == {1} else np.array(scales, like.dtype).reshape(shape)

    def value(self, carry: list[Array], inputs: Array, recurrent: Array) -> list[Array]:
        """Returns the new carry, each ``[..., H]``, from u and r ``[..., G, H]``."""
        known, _ = self._bound(carry, inputs, recurrent)
        return [self._evaluate(result, known)[..., 0, :] for result in self.results]

    def value_and_derivatives(
        self, carry: list[Array], inputs: Array, recurrent: Array
    ) -> tuple[list[Array], LocalDerivatives]:
        """Returns the new carry and its derivatives.

        Raises:
          ValueError: units that depend on one another within a step, in a cell of a user's own.
        """
        if not type(self.cell).__module__.startswith("rnnjax.") and not _units_are_apart(self.cell, self.dtype):
            raise ValueError(
                f"pointwise of {type(self.cell).__name__} must treat each unit on its own: no mean, softmax or product "
                "over units, which a StepCell may have"
            )
        known, slopes = self._bound(carry, inputs, recurrent)
        rows: dict[int, dict[Any, Array]] = {}
        order = self._order()
        for i in order:
            # What is known already, earlier new carries among it, is held as a quantity of its own.
            leaves = self._leaves(self.results[i], known)

            def row(values: list[Array], i: int = i, leaves: list[Any] = leaves) -> Array:
                return self._evaluate(self.results[i], self.constants | dict(zip(leaves, values, strict=True)))

            value, pull_back = jax.vjp(row, [known[leaf] for leaf in leaves])
            rows[i] = dict(zip(leaves, pull_back(jnp.ones_like(value))[0], strict=True))
            known[self.results[i]] = value
        values = [known[result][..., 0, :] for result in self.results]
        return values, self._assembled(rows, slopes, order, inputs)

    def _order(self) -> tuple[int, ...]:
        """Returns the new carries so that each comes after those that it is computed from."""
        needs = [self._ancestors(result) for result in self.results]
        return tuple(
            sorted(range(len(needs)), key=lambda i: sum(self.results[k] in needs[i] for k in range(len(needs))))
        )

    def _ancestors(self, variable: Any) -> set[Any]:
        if isinstance(variable, core.Literal) or variable not in self.producers:
            return set()
        own = [used for used in self.producers[variable].invars if not isinstance(used, core.Literal)]
        return set(own).union(*(self._ancestors(used) for used in own))

    def _leaves(self, variable: Any, known: dict[Any, Array]) -> list[Any]:
        """Returns the known variables, constants aside, that ``variable`` is computed from, in order of use."""
        if isinstance(variable, core.Literal) or variable in self.constants:
            return []
        if variable in known:
            return [variable]
        found = [leaf for used in self.producers[variable].invars for leaf in self._leaves(used, known)]
        return list(dict.fromkeys(found))

    def _evaluate(self, variable: Any, known: dict[Any, Array]) -> Array:
        if isinstance(variable, core.Literal):
            return variable.val
        if variable not in known:
            eqn = self.producers[variable]
            values = [self._evaluate(used, known) for used in eqn.invars]
            known.update(zip(eqn.outvars, self._apply(eqn, values), strict=True))
        return known[variable]

    def _apply(self, eqn: Any, values: list[Array]) -> list[Array]:
        scale = None if self.exact else _activation(eqn)
        if scale is not None:
            return [jnp.tanh(values[0] * scale) * scale + (1 - scale)] if scale != 1 else [jnp.tanh(values[0])]
        free = [(used, value) for used, value in zip(eqn.invars, values, strict=True) if isinstance(used, core.Var)]
        distinct = dict(free)
        alone = self.jaxpr.replace(
            constvars=[],
            invars=list(distinct),
            outvars=eqn.outvars,
            eqns=[eqn],
            debug_info=self.jaxpr.debug_info.with_unknown_names(),
        )
        return _CORE.jaxpr_as_fun(_CORE.ClosedJaxpr(alone, ()))(*distinct.values())

    def _assembled(
        self, rows: dict[int, dict[Any, Array]], slopes: Array | None, order: tuple[int, ...], like: Array
    ) -> LocalDerivatives:
        by_gate: list[list[tuple[int, Array]]] = [[] for _ in self.recurrent]
        by_input, by_carry, by_result, copies = {}, {}, {}, []
        for i, row in rows.items():
            for leaf, derivative in row.items():
                earlier = [k for k in order[: order.index(i)] if self.results[k] is leaf]
                if leaf in self.carry and leaf is self.results[i]:
                    copies.append((i, self.carry.index(leaf)))
                elif leaf in self.carry:
                    by_carry[i, self.carry.index(leaf)] = derivative[..., 0, :]
                elif leaf in self.inputs:
                    by_input[i, self.inputs.index(leaf)] = derivative[..., 0, :]
                elif earlier:
                    by_result[i, earlier[0]] = derivative[..., 0, :]
                else:
                    by_gate[self._gate(leaf)].append((i, derivative))
        depth = max(1, *(len(found) for found in by_gate))
        zero = jnp.zeros_like(like[..., :1, :])
        padded = [found + [(-1, zero)] * (depth - len(found)) for found in by_gate]
        arrays = tuple(self._stacked([found[n][1] for found in padded], slopes) for n in range(depth))
        receivers = tuple(tuple(found[n][0] for found in padded) for n in range(depth))
        summed = tuple(variable is not None for variable in self.sums)
        return LocalDerivatives(arrays, by_input, by_carry, by_result, receivers, summed, tuple(copies), order)

    def _gate(self, leaf: Any) -> int:
        for gate, variable in enumerate(self.sums):
            activated = self.activated.get(gate, (None,))[0]
            if leaf is activated or leaf is variable or leaf is self.recurrent[gate]:
                return gate
        raise AssertionError(leaf)

    def _stacked(self, arrays: list[Array], slopes: Array | None) -> Array:
        """Returns ``[..., G, H]``, the activated gates times the slope of their activation."""
        if slopes is not None and len(self.activated) < len(arrays):
            for index, gate in enumerate(self.activated):
                arrays[gate] = arrays[gate] * _gates(slopes, index)
        stacked = jnp.concatenate(arrays, axis=-2)
        return stacked * slopes if slopes is not None and len(self.activated) == len(arrays) else stacked


@functools.lru_cache(maxsize=256)
def _units_are_apart(cell: AffineCell, dtype: Any) -> bool:
    """Whether cotangents of the new carry come back unit by unit, at random arguments: whether ∂s'/∂s, … are diagonal.

    Where they are, turning the sign of some units' cotangents turns the sign of what those units get, and no more.
    """
    rng, shape = np.random.default_rng(0), (1, cell.hidden_size)
    with jax.ensure_compile_time_eval():
        carry, inputs, recurrent = (
            [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(number)]
            for number in (cell.num_carries, cell.num_gates, cell.num_gates)
        )

        def run(carry: list[Array], inputs: list[Array], recurrent: list[Array]) -> list[Array]:
            given = carry[0] if cell.num_carries == 1 else tuple(carry)
            return jax.tree.leaves(cell.pointwise(given, tuple(inputs), tuple(recurrent)))

        results, pull_back = jax.vjp(run, carry, inputs, recurrent)
        plain = jax.tree.leaves(pull_back([jnp.ones_like(x) for x in results]))
        for _ in range(4):
            signs = jnp.asarray(rng.choice([-1.0, 1.0], shape), dtype)
            for ours, theirs in zip(plain, jax.tree.leaves(pull_back([signs] * len(results))), strict=True):
                expected, found = (np.asarray(x, np.float64) for x in (ours * signs, theirs))
                if not np.allclose(found, expected, rtol=1e-2, atol=1e-6, equal_nan=True):
                    return False
    return True


def _activation(eqn: Any) -> float | None:
    """Returns s of the table above if all that an equation does is tanh or sigmoid, with their own derivatives."""
    name, inner = eqn.primitive.name, eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if name in ("jit", "pjit") and len(inner.jaxpr.eqns) == 1:
        (alone,) = inner.jaxpr.eqns
        passes_on = inner.jaxpr.invars == alone.invars and inner.jaxpr.outvars == alone.outvars
        return _activation(alone) if passes_on else None
    if name == "custom_jvp_call":
        # A derivative of the user's own, such as a surrogate gradient, is not ours to replace.
        ours = {f"{name} at {activations.__file__}": kind for name, kind in (("tanh", "tanh"), ("sigmoid", "logistic"))}
        name = ours.get(inner.jaxpr.debug_info.func_src_info.rpartition(":")[0], "")
    return _GATE_ACTIVATIONS.get(name)


def _gates(array: Array, *chosen: int) -> Array:
    """Returns the chosen gates of ``[..., G, H]``."""
    first, last = chosen[0], chosen[-1] + 1
    if last - first == len(chosen):
        return array[..., first:last, :]
    return array[..., jnp.array(chosen), :]
