"""The scan of an affine cell, with a derivative of its own.

The scan goes chunk by chunk: the input projections of a chunk are one matmul, its steps follow one by one, and when it
is differentiated each step leaves its local derivatives behind, K for the pre-activations and P for the carry. The
tangent of step t is then linear,

    ds_t = P_t ds_{t−1} + K_t (dh_{t−1} U + dz_t),        dz_t = x_t dW + dx_t W + db + h_{t−1} dU,

so that dz is matmuls for a whole chunk, and the transposed scan carries the cotangent of the state alone: the gradients
of all weights are matmuls for a whole chunk too. JAX transposes the tangent for reverse mode, and since it is made of
ordinary operations, forward mode, higher derivatives, ``vmap`` and ``jax.checkpoint`` hold as they do elsewhere.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from rnnjax.cells import AffineCell, CellParams
from rnnjax.chunks import scan_chunks, scan_prepared
from rnnjax.controls import Controls, where
from rnnjax.local_derivatives import LocalDerivatives, PointwiseProgram, only_gates
from rnnjax.typing import Array

_CHUNK_BYTES = 2**20
"""Size of a chunk's pre-activations, so that they stay in a processor's cache."""
_KERNELS = ("input_kernel", "recurrent_kernel")


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


@dataclasses.dataclass(frozen=True)
class ScanSettings:
    """How to scan.

    Attributes:
      reverse: from the last step to the first.
      compute_dtype: dtype in which the factors of matrix products are taken; the products, the state, everything
        pointwise and the gradients of the weights stay in the dtype of the weights.
    """

    reverse: bool = False
    compute_dtype: Any = None

    def rounded(self, params: CellParams) -> CellParams:
        """Returns the weights with kernels in the dtype to multiply in."""
        if self.compute_dtype is None:
            return params
        kernels = {name: getattr(params, name).astype(self.compute_dtype) for name in _KERNELS}
        return dataclasses.replace(params, **kernels)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def scan_affine(
    cell: AffineCell, settings: ScanSettings, sequence: Sequence, controls: Controls
) -> tuple[list[Array], Array]:
    """Returns the last carry, leaf by leaf, and the hidden state of every step ``[T, ..., H]``."""
    last, (hidden, _) = _forward(cell, settings, sequence, controls, derivatives=False)
    return last, hidden


def _forward(
    cell: AffineCell, settings: ScanSettings, sequence: Sequence, controls: Controls, *, derivatives: bool
) -> tuple[list[Array], tuple[Array, LocalDerivatives | None]]:
    params, reverse = settings.rounded(sequence.params), settings.reverse
    shape, dtype = sequence.carry[0].shape, sequence.carry[0].dtype
    program = PointwiseProgram(cell, shape, dtype, exact=False)
    initial = jax.tree.leaves(cell.initialize_carry(shape[:-1], dtype))

    def step(carry: list[Array], xs: Any) -> tuple[list[Array], Any]:
        from_inputs, control, perturbations = xs
        start, local = control.enter(carry, initial), None
        recurrent = cell.recurrent_preactivation(params, start[0])
        if derivatives:
            after, local = program.value_and_derivatives(start, from_inputs, recurrent)
        else:
            after = program.value(start, from_inputs, recurrent)
        after = _perturbed(after, perturbations)
        if control.active is not None:
            after = where(control.active, after, carry)
        return after, (after[0], local)

    def prepare(xs: Any) -> Any:
        inputs, *others = xs
        return cell.prepare_inputs(params, inputs), *others

    xs = (sequence.inputs, controls, sequence.perturbations)
    size = _chunk_size(params, sequence.inputs)
    return scan_prepared(prepare, step, sequence.carry, xs, size, reverse=reverse)


@functools.partial(scan_affine.defjvp, symbolic_zeros=True)
def _jvp(
    cell: AffineCell, settings: ScanSettings, primals: tuple[Sequence, Controls], tangents: tuple[Sequence, Controls]
) -> tuple[tuple[list[Array], Array], tuple[list[Array], Array]]:
    (sequence, controls), moved = primals, _known(tangents[0])
    last, (hidden, local) = _forward(cell, settings, sequence, controls, derivatives=True)
    params, reverse, severed = settings.rounded(sequence.params), settings.reverse, _severed(controls)
    first = sequence.carry[0][None]
    before = jnp.concatenate([hidden[1:], first] if reverse else [first, hidden[:-1]])
    before = controls.enter(before, jnp.zeros_like(before))
    transposed = jnp.transpose(params.recurrent_kernel, (1, 2, 0))

    def step(carry: list[Array], xs: Any) -> tuple[list[Array], Array]:
        local, active, severed, projected, perturbations = xs
        start = carry if severed is None else where(severed, jax.tree.map(jnp.zeros_like, carry), carry)
        recurrent = jnp.tensordot(start[0], transposed, axes=((-1,), (2,)), preferred_element_type=start[0].dtype)
        if projected[0] is not None:
            recurrent += projected[0]
        after = local.times(start, recurrent, projected[1])
        after = _perturbed(after, perturbations)
        if active is not None:
            after = where(active, after, carry)
        return after, after[0]

    def chunk(carry: list[Array], xs: Any) -> tuple[list[Array], Array]:
        inputs, before, local, active, severed, moved_inputs, perturbations = xs
        projected = _projected(params, moved.params, inputs, moved_inputs, before, local.summed)
        return jax.lax.scan(step, carry, (local, active, severed, projected, perturbations), reverse=reverse)

    carry = [jnp.zeros_like(p) if t is None else t for p, t in zip(sequence.carry, moved.carry, strict=True)]
    xs = (sequence.inputs, before, local, controls.active, severed, moved.inputs, moved.perturbations)
    size = _chunk_size(sequence.params, sequence.inputs)
    return (last, hidden), scan_chunks(chunk, carry, xs, size, reverse=reverse)


def _known(tangents: Any) -> Any:
    """Returns the tangents with None for zeros."""
    return jax.tree.map(
        lambda leaf: None if isinstance(leaf, SymbolicZero) else leaf,
        tangents,
        is_leaf=lambda leaf: isinstance(leaf, SymbolicZero),
    )


def _severed(controls: Controls) -> Array | None:
    """Returns where nothing passes from a step to those before it, bool ``[T, ...]``; None for nowhere."""
    reset, start = controls.reset, controls.window_start
    if reset is None or start is None:
        return start if reset is None else reset
    return reset | start.reshape(start.shape + (1,) * (reset.ndim - start.ndim))


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


def _perturbed(carry: list[Array], perturbations: list[Any]) -> list[Array]:
    added = [leaf if p is None else leaf + p for leaf, p in zip(carry, perturbations, strict=False)]
    return added + carry[len(added) :]


def _chunk_size(params: CellParams, inputs: Array) -> int:
    """Returns how many steps a chunk has: all where there is one gate, with little to keep in the cache."""
    if jax.default_backend() != "cpu" or params.bias.shape[0] == 1:
        return inputs.shape[0]
    num_steps = inputs.shape[0]
    step = params.bias.size * inputs[0, ..., 0].size * params.bias.dtype.itemsize
    size = max(4, min(64, _CHUNK_BYTES // max(step, 1)))
    # A chunk that is left over has its results copied.
    even = [number for number in range(size // 2, 2 * size) if num_steps % number == 0]
    return min(even, key=lambda number: abs(number - size), default=size)
