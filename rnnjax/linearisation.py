"""The derivative of an affine cell's scan, a linear map, and its transpose."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from rnnjax.cells import CellParams
from rnnjax.chunks import scan_chunks, unseen_false
from rnnjax.controls import Controls, where
from rnnjax.in_place import scan_in_place
from rnnjax.local_derivatives import LocalDerivatives, only_gates
from rnnjax.typing import Array
from rnnjax.weight_gradients import of_weights

_CHUNK_BYTES = 2**20
"""Size of a chunk's pre-activations where they are not kept, so that they stay in a processor's cache."""


@flax.struct.dataclass
class Sequence:
    """What a scan depends on.

    Attributes:
      params: the weights.
      inputs: ``[T, ..., D]``.
      carry: the carry before the first step.
      perturbations: added to the first leaves of each new carry, leaves ``[T, ..., H]``.
    """

    params: CellParams
    inputs: Array
    carry: list[Array]
    perturbations: list[Array]

    def batch_axes(self) -> Any:
        """Returns before which axis of each array a batch axis may be put; −1 for the weights."""
        weights, carry = jax.tree.map(lambda _: -1, self.params), [0] * len(self.carry)
        return dataclasses.replace(jax.tree.map(lambda _: 1, self), params=weights, carry=carry)


@flax.struct.dataclass
class Linearisation:
    """What the tangents of a scan depend on.

    Attributes:
      params: the weights, kernels in the dtype to multiply in.
      inputs: ``[T, ..., D]``.
      first: the hidden state before the first step.
      initial: that after a reset.
      hidden: that of every step ``[T, ..., H]``.
      local: derivatives of every step.
      controls: what happens to the carry around each step.
      severed: where nothing passes from a step to those before it, bool ``[T, ...]``; None for nowhere.
    """

    params: CellParams
    inputs: Array
    first: Array
    initial: Array
    hidden: Array
    local: LocalDerivatives
    controls: Controls
    severed: Array | None

    def before(self, reverse: bool, after: Array | None = None) -> Array:
        """Returns the hidden state that each step starts from.

        Args:
          reverse: whether the last step comes first.
          after: what has to be there before it is made, on CPU. XLA would copy the states as early as it can, and hold
            two arrays of them through the backward scan. It goes by the data alone: barriers do not keep it from that.
        """
        first = self.first[None]
        start: Any = int(reverse)
        if after is not None and jax.default_backend() == "cpu":
            start += unseen_false(after).astype(int)
        others = jax.lax.dynamic_slice_in_dim(self.hidden, start, len(self.hidden) - 1, allow_negative_indices=False)
        before = jnp.concatenate([others, first] if reverse else [first, others])
        return self.controls.enter(before, jnp.broadcast_to(self.initial, before.shape))

    def batch_axes(self) -> Any:
        """Returns before which axis of each array a batch axis may be put; −1 for the weights."""
        axes = jax.tree.map(lambda _: 1, self)
        return dataclasses.replace(axes, params=jax.tree.map(lambda _: -1, self.params), first=0, initial=0)


def tangents(reverse: bool, of: Linearisation, moved: Sequence) -> tuple[list[Array], Array]:
    """Returns the tangents of the last carry and of the hidden states."""
    transposed, active = jnp.transpose(of.params.recurrent_kernel, (1, 2, 0)), of.controls.active

    def step(carry: list[Array], xs: Any) -> tuple[list[Array], Array]:
        local, active, severed, projected, perturbations = xs
        start = carry if severed is None else where(severed, jax.tree.map(jnp.zeros_like, carry), carry)
        recurrent = jnp.tensordot(start[0], transposed, axes=((-1,), (2,)), preferred_element_type=start[0].dtype)
        if projected[0] is not None:
            recurrent += projected[0]
        after = local.times(start, recurrent, projected[1])
        after = perturbed(after, perturbations)
        if active is not None:
            after = where(active, after, carry)
        return after, after[0]

    def chunk(carry: list[Array], xs: Any) -> tuple[list[Array], Array]:
        inputs, before, local, active, severed, moved_inputs, perturbations = xs
        projected = _projected(of.params, moved.params, inputs, moved_inputs, before, local.summed)
        return jax.lax.scan(step, carry, (local, active, severed, projected, perturbations), reverse=reverse)

    xs = (of.inputs, of.before(reverse), of.local, active, of.severed, moved.inputs, moved.perturbations)
    return scan_chunks(chunk, moved.carry, xs, chunk_size(of.params, of.inputs), reverse=reverse)


def cotangents(loop: dict[str, bool], wanted: Any, of: Linearisation, given: tuple[list[Array], Array]) -> Any:
    """Returns the cotangents of what ``tangents`` takes, None where ``wanted`` is; ``loop`` is how to scan in place.

    Each step leaves dz for the matmuls that give the gradients of the weights after the last; where K was, if it can.
    """
    last, of_hidden = given
    kernel = jnp.transpose(of.params.recurrent_kernel, (1, 2, 0)).reshape(-1, of.first.shape[-1])
    stored = bool(jax.tree.leaves((wanted.params, wanted.inputs)))
    # XLA multiplies in place where a row is a true matrix. Otherwise it would copy all rows at every step.
    in_place = stored and of.first.ndim == 2 and min(of.first.shape) > 1
    first, *others = (jax.lax.collapse(x, -2) for x in of.local.by_gate)
    # The cotangent of u_g takes the first place (i, g) of its derivatives.
    firsts = {gate: (i, gate) for i, gate in sorted(of.local.by_input, reverse=True)}.values()
    slopes = first, {place: of.local.by_input[place] for place in firsts}
    by_input = {place: x for place, x in of.local.by_input.items() if place not in firsts}
    local = dataclasses.replace(of.local, by_gate=(), by_input=by_input)

    def step(carry: list[Array], xs: Any, row: Any) -> tuple[list[Array], Any, Any]:
        read, (of_hidden, active, severed, local, others) = xs
        first, by_input = row if read is None else read
        local = dataclasses.replace(local, by_input=by_input | local.by_input)
        carry = [carry[0] + of_hidden, *carry[1:]]
        before, after, recurrent, inputs = _before(kernel, carry, active, severed, local, [first, *others])
        new = (recurrent, {place: inputs[place[1]] for place in by_input}) if stored else None
        of_perturbations = [x if wish else None for x, wish in zip(after, wanted.perturbations, strict=False)]
        return before, new if in_place else None, (None if in_place else new, of_perturbations)

    xs = (None if in_place else slopes, (of_hidden, of.controls.active, of.severed, local, others))
    rows, loop = slopes if in_place else None, loop | {"reverse": not loop["reverse"]}
    carry, rows, (new, perturbations) = scan_in_place(step, last, xs, rows, after=of_hidden, flat=True, **loop)
    of_others = dataclasses.replace(wanted, carry=carry, perturbations=perturbations)
    if not stored:
        return of_others
    before, (of_recurrent, by_input) = of.before(not loop["reverse"], after=carry[0]), rows if in_place else new
    params, inputs = of_weights(wanted, of.params, of.inputs, before, of_recurrent, by_input, of.local.summed)
    return dataclasses.replace(of_others, params=params, inputs=inputs)


def _before(
    kernel: Array, carry: list[Array], active: Any, severed: Any, local: LocalDerivatives, by_gate: list[Array]
) -> tuple[list[Array], list[Array], Array, dict[int, Array]]:
    """Returns the cotangents of one step: of the carry before, of what the step computed, of r ``[..., G·H]``, of u_g.

    Args:
      kernel: Uᵀ ``[G·H, H]``.
      carry: the cotangent of the carry after the step.
      active: where the step was taken; None for everywhere.
      severed: where nothing passes to the step before; None for nowhere.
      local: the derivatives of the step but for those by r.
      by_gate: those ``[..., G·H]``.
    """
    zeros = jax.tree.map(jnp.zeros_like, carry)
    after = carry if active is None else where(active, carry, zeros)
    old, recurrent, inputs = local.transpose_times(after, by_gate)
    to_hidden = jnp.tensordot(recurrent, kernel, 1, preferred_element_type=carry[0].dtype)
    old = [to_hidden if old[0] is None else old[0] + to_hidden, *old[1:]]
    before = [zero if x is None else x for x, zero in zip(old, zeros, strict=True)]
    if severed is not None:
        before = where(severed, zeros, before)
    if active is not None:
        before = where(active, before, carry)
    return before, after, recurrent, inputs


def _projected(
    params: CellParams, moved: CellParams, inputs: Array, moved_inputs: Array | None, before: Array, summed: Any
) -> tuple[Array | None, dict[int, Array]]:
    """Returns the tangent of r, with that of u where the two are summed, and that of u for every other gate."""
    inputs, before = (x.astype(params.input_kernel.dtype).astype(x.dtype) for x in (inputs, before))
    shape = (*before.shape[:-1], *params.bias.shape)
    from_inputs = [] if moved.input_kernel is None else [jnp.tensordot(inputs, moved.input_kernel, 1)]
    if moved_inputs is not None:
        from_inputs.append(jnp.tensordot(moved_inputs, params.input_kernel, 1, preferred_element_type=before.dtype))
    if moved.bias is not None:
        from_inputs.append(jnp.broadcast_to(moved.bias, shape))
    recurrent = [] if moved.recurrent_kernel is None else [jnp.tensordot(before, moved.recurrent_kernel, 1)]
    if moved.recurrent_bias is not None:
        recurrent.append(jnp.broadcast_to(moved.recurrent_bias, shape))
    if from_inputs:
        total = functools.reduce(jnp.add, from_inputs)
        recurrent.append(total if all(summed) else only_gates(total, summed))
        alone = {gate: total[..., gate, :] for gate, is_summed in enumerate(summed) if not is_summed}
    return (functools.reduce(jnp.add, recurrent) if recurrent else None), (alone if from_inputs else {})


def perturbed(carry: list[Array], perturbations: list[Any]) -> list[Array]:
    """Returns the carry with perturbations, None for zero, added to its first leaves."""
    added = [leaf if p is None else leaf + p for leaf, p in zip(carry, perturbations, strict=False)]
    return added + carry[len(added) :]


def chunk_size(params: CellParams, inputs: Array) -> int:
    """Returns how many steps a chunk has: all where there is one gate, with little to keep in the cache."""
    if jax.default_backend() != "cpu" or params.bias.shape[0] == 1:
        return inputs.shape[0]
    num_steps = inputs.shape[0]
    step = params.bias.size * inputs[0, ..., 0].size * params.bias.dtype.itemsize
    size = max(4, min(64, _CHUNK_BYTES // max(step, 1)))
    # A chunk that is left over has its results copied.
    even = [number for number in range(size // 2, 2 * size) if num_steps % number == 0]
    return min(even, key=lambda number: abs(number - size), default=size)
