"""The gradients of the weights of a cell, a product of matrices each, from the cotangents of its pre-activations."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rnnjax.cells import CellParams
from rnnjax.typing import Array

_NARROW = 256
"""How many features inputs may have for one product with the cotangents of all r, where only some gates' are of u."""


def of_weights(
    wanted: Any,
    params: CellParams,
    inputs: Array,
    before: Array,
    of_recurrent: Array,
    by_input: dict[tuple[int, int], Array],
    summed: tuple[bool, ...],
) -> tuple[Any, Array | None]:
    """Returns the cotangents of the weights and inputs from that of r and, where it differs, of u_g.

    Args:
      wanted: has ``params`` and ``inputs``, None for those to leave out.
      params: the weights.
      inputs: ``[T, ..., D]``.
      before: the hidden state that each step started from ``[T, ..., H]``.
      of_recurrent: the cotangent of r ``[T, ..., G·H]``.
      by_input: for gates whose u and r are not just added up, that of u_g ``[T, ..., H]`` in the first place (i, g).
      summed: whether they are, for each gate; a gate with neither has no use for its u.
    """
    dz = of_recurrent.reshape(*of_recurrent.shape[:-1], *params.recurrent_kernel.shape[1:])
    by_gate = {gate: jnp.zeros_like(dz[..., gate, :]) for gate, both in enumerate(summed) if not both}
    by_gate |= {gate: of_gate for (_, gate), of_gate in sorted(by_input.items(), reverse=True)}
    inputs, before = (x.astype(params.input_kernel.dtype).astype(dz.dtype) for x in (inputs, before))
    # Where inputs are narrow, a product for a gate too many costs less than an array of the cotangents of all u.
    narrow = wanted.inputs is None and inputs.shape[-1] <= _NARROW
    du = None if narrow else _with_gates(dz, by_gate)
    gradients: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(params))
    if wanted.params.input_kernel is not None:
        gradients["input_kernel"] = _of_input_kernel(inputs, dz, by_gate) if du is None else _outer(inputs, du)
    if wanted.params.bias is not None or wanted.params.recurrent_bias is not None:
        gradients["recurrent_bias"] = _over_all(dz, 2)
        gradients["bias"] = _replaced(_over_all(dz, 2), {gate: _over_all(x, 1) for gate, x in by_gate.items()})
    if wanted.params.recurrent_kernel is not None:
        gradients["recurrent_kernel"] = _outer(before, dz)
    chosen: Any = {name: None if getattr(wanted.params, name) is None else x for name, x in gradients.items()}
    if wanted.inputs is None or du is None:
        return CellParams(**chosen), None
    to_inputs = jnp.transpose(params.input_kernel, (1, 2, 0))
    return CellParams(**chosen), jnp.tensordot(du, to_inputs, 2, preferred_element_type=dz.dtype)


def _of_input_kernel(inputs: Array, dz: Array, by_gate: dict[int, Array]) -> Array:
    return _replaced(_outer(inputs, dz), {gate: _outer(inputs, x[..., None, :])[:, 0] for gate, x in by_gate.items()})


def _with_gates(dz: Array, by_gate: dict[int, Array]) -> Array:
    """Returns ``[..., G, H]`` with some gates replaced."""
    gates = [by_gate[g][..., None, :] if g in by_gate else dz[..., g : g + 1, :] for g in range(dz.shape[-2])]
    return jnp.concatenate(gates, axis=-2) if by_gate else dz


def _replaced(array: Array, by_gate: dict[int, Array]) -> Array:
    """Returns what ``_with_gates`` does, in the place of an array that nothing else reads."""
    for gate, own in by_gate.items():
        array = jax.lax.dynamic_update_slice_in_dim(array, own[..., None, :], gate, axis=-2)
    return array


def _over_all(array: Array, num_own_axes: int) -> Array:
    """Returns the sum over the axes before the last ones."""
    return array.sum(axis=tuple(range(array.ndim - num_own_axes)))


def _outer(factor: Array, dz: Array) -> Array:
    """Returns Σ x dz ``[n, G, H]`` over all leading axes, for x ``[..., n]``."""
    columns = jax.lax.collapse(dz, -2)
    if jax.default_backend() == "cpu":  # over several axes XLA would transpose the factor first
        factor, columns = (jax.lax.collapse(x, 0, -1) for x in (factor, columns))
    axes = tuple(range(factor.ndim - 1))
    return jnp.tensordot(factor, columns, axes=(axes, axes)).reshape(-1, *dz.shape[-2:])
