"""The scan of an affine cell, with a derivative of its own.

The input projections of many steps are one matmul, the steps follow one by one, and when the scan is differentiated
each step leaves its local derivatives behind, K for the pre-activations and P for the carry. The tangent of step t is
then linear,

    ds_t = P_t ds_{t−1} + K_t (dh_{t−1} U + dz_t),        dz_t = x_t dW + dx_t W + db + h_{t−1} dU,

so that dz is matmuls for many steps. Its transpose carries the cotangent of the state alone, and leaves dz where K was:
the gradients of the weights are one matmul each. It is written out (``linear_map``), since the one that JAX derives
sets memory to zero before it writes there, and copies it. Forward mode, higher derivatives, ``vmap`` and
``jax.checkpoint`` hold as they do elsewhere.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rnnjax import linearisation
from rnnjax.cells import AffineCell, CellParams
from rnnjax.cells.base import input_product, with_bias
from rnnjax.chunks import scan_chunks, unseen_false
from rnnjax.controls import Controls, where
from rnnjax.deferred import call_with_jvp
from rnnjax.in_place import scan_in_place
from rnnjax.linear_maps import linear_map
from rnnjax.linearisation import Linearisation, Sequence, chunk_size, perturbed
from rnnjax.local_derivatives import LocalDerivatives
from rnnjax.pointwise import PointwiseProgram
from rnnjax.side_by_side import in_halves, number_of_loops
from rnnjax.typing import Array

_KERNELS = ("input_kernel", "recurrent_kernel")


@dataclasses.dataclass(frozen=True)
class ScanSettings:
    """How to scan.

    Attributes:
      reverse: from the last step to the first.
      compute_dtype: dtype in which the factors of matrix products are taken; the products, the state, everything
        pointwise and the gradients of the weights stay in the dtype of the weights.
      in_halves: differentiate a batch by halves, in loops side by side, where that is faster.
      side_by_side: in loops that others need not wait for.
    """

    reverse: bool = False
    compute_dtype: Any = None
    in_halves: bool = False
    side_by_side: bool = False

    @property
    def loop(self) -> dict[str, bool]:
        """How to scan in place."""
        return {"reverse": self.reverse, "side_by_side": self.side_by_side}

    def rounded(self, params: CellParams) -> CellParams:
        """Returns the weights with kernels in the dtype to multiply in."""
        if self.compute_dtype is None:
            return params
        kernels = {name: getattr(params, name).astype(self.compute_dtype) for name in _KERNELS}
        return dataclasses.replace(params, **kernels)


def scan_affine(
    cell: AffineCell, settings: ScanSettings, sequence: Sequence, controls: Controls
) -> tuple[list[Array], Array]:
    """Returns the last carry, leaf by leaf, and the hidden state of every step ``[T, ..., H]``."""
    hidden = sequence.carry[0]
    like = sequence.carry, jax.ShapeDtypeStruct((len(sequence.inputs), *hidden.shape), hidden.dtype)
    value, derivative = (functools.partial(function, cell, settings) for function in (_plain, _jvp))
    return call_with_jvp(value, derivative, (sequence, controls), like)


def _plain(
    cell: AffineCell, settings: ScanSettings, sequence: Sequence, controls: Controls
) -> tuple[list[Array], Array]:
    prepare, step, _ = _recurrence(cell, settings, sequence, derivatives=False)

    def chunk(carry: list[Array], xs: Any) -> Any:
        inputs, *others = xs
        return jax.lax.scan(step, carry, (prepare(inputs), *others), reverse=settings.reverse)

    xs, size = (sequence.inputs, controls, sequence.perturbations), chunk_size(sequence.params, sequence.inputs)
    last, (hidden, _) = scan_chunks(chunk, sequence.carry, xs, size, reverse=settings.reverse)
    return last, hidden


def _recurrence(
    cell: AffineCell, settings: ScanSettings, sequence: Sequence, *, derivatives: bool
) -> tuple[Callable[[Array], Array], Any, bool]:
    """Returns what gives x W for all steps before the scan, the step, and whether it may write over x W.

    The step takes the carry with x W, controls and perturbations, and returns the new carry, the hidden state and its
    local derivatives, or None for those.
    """
    params, shape, dtype = settings.rounded(sequence.params), sequence.carry[0].shape, sequence.carry[0].dtype
    program = PointwiseProgram(cell, shape, dtype, exact=False)
    initial = jax.tree.leaves(cell.initialize_carry(shape[:-1], dtype))
    prepare, bias, together = functools.partial(input_product, params), params.bias, program.sums_inputs()
    if together and params.recurrent_bias is not None:
        bias += params.recurrent_bias
    params = dataclasses.replace(params, recurrent_bias=bias if together else params.recurrent_bias)

    def step(carry: list[Array], xs: Any) -> tuple[list[Array], Any]:
        from_inputs, control, perturbations = xs
        # Biases are added here, in the cache, and where they can be to r: rows are better read by one computation.
        from_inputs = from_inputs if together else with_bias(from_inputs, bias)
        start, local = control.enter(carry, initial), None
        recurrent = cell.recurrent_preactivation(params, start[0])
        if derivatives:
            after, local = program.value_and_derivatives(start, from_inputs, recurrent)
        else:
            after = program.value(start, from_inputs, recurrent)
        after = perturbed(after, perturbations)
        if control.active is not None:
            after = where(control.active, after, carry)
        return after, (after[0], local)

    return prepare, step, program.reads_inputs_once()


def _forward(
    cell: AffineCell, settings: ScanSettings, sequence: Sequence, controls: Controls
) -> tuple[list[Array], tuple[Array, LocalDerivatives]]:
    """Returns the last carry, and of every step the hidden state and the derivatives.

    K takes the place of x W, which no later step reads, where a step reads it once.
    """
    prepare, step, in_place = _recurrence(cell, settings, sequence, derivatives=True)
    single = cell.num_gates == 1  # an axis of one gate would have XLA copy the rows that the loop starts from

    def one(carry: list[Array], xs: Any, row: Array | None) -> tuple[list[Array], Array | None, Any]:
        from_inputs, others = xs
        from_inputs = from_inputs if row is None else row
        carry, (hidden, local) = step(carry, (_with_gate(from_inputs, single), *others))
        first, *by_gate = local.by_gate
        first, local = _without_gate(first, single), dataclasses.replace(local, by_gate=tuple(by_gate))
        return carry, first if in_place else None, (None if in_place else first, hidden, local)

    prepared, others = _without_gate(prepare(sequence.inputs), single), (controls, sequence.perturbations)
    rows, xs = (prepared, (None, others)) if in_place else (None, (prepared, others))
    last, rows, (first, hidden, local) = scan_in_place(
        one, sequence.carry, xs, rows, prepared, flat=single, **settings.loop
    )
    first = _with_gate(rows if in_place else first, single)
    return last, (hidden, dataclasses.replace(local, by_gate=(first, *local.by_gate)))


def _without_gate(array: Array, single: bool) -> Array:
    return array.squeeze(-2) if single else array


def _with_gate(array: Array, single: bool) -> Array:
    return array[..., None, :] if single else array


def _jvp(
    cell: AffineCell, settings: ScanSettings, primals: tuple[Sequence, Controls], tangents: tuple[Sequence, Controls]
) -> tuple[tuple[list[Array], Array], tuple[list[Array], Array]]:
    hidden = primals[0].carry[0]
    per_step, num_sequences = hidden.size * hidden.shape[-1] * cell.num_gates, len(hidden) if hidden.ndim > 1 else 1
    if settings.in_halves and number_of_loops(per_step, len(primals[0].inputs), num_sequences) > 1:
        return _jvp_in_parts(cell, settings, primals, tangents)
    (sequence, controls), (moved, _) = primals, tangents
    last, (hidden, local) = _forward(cell, settings, sequence, controls)
    carry = [jnp.zeros_like(p) if t is None else t for p, t in zip(sequence.carry, moved.carry, strict=True)]
    moved = dataclasses.replace(moved, carry=carry)
    wanted = jax.tree.map(lambda _: True, moved)
    first = sequence.carry[0]
    if settings.side_by_side:  # XLA is to take the last carry as used, even if nobody does
        first += unseen_false(last).astype(hidden.dtype)
    residuals = Linearisation(
        settings.rounded(sequence.params),
        sequence.inputs,
        first,
        jax.tree.leaves(cell.initialize_carry(hidden.shape[1:-1], hidden.dtype))[0],
        hidden,
        local,
        controls,
        _severed(controls),
    )
    moved_results = linear_map(
        functools.partial(linearisation.tangents, settings.reverse),
        functools.partial(linearisation.cotangents, settings.loop, wanted),
        residuals,
        moved,
        (last, hidden),
        (residuals.batch_axes(), moved.batch_axes(), ([0] * len(last), 1)),
    )
    return (last, hidden), moved_results


def _jvp_in_parts(
    cell: AffineCell, settings: ScanSettings, primals: tuple[Sequence, Controls], tangents: tuple[Sequence, Controls]
) -> tuple[tuple[list[Array], Array], tuple[list[Array], Array]]:
    """Returns what ``_jvp`` does, from two halves of the batch, each in loops of its own."""
    structure: Any = jax.tree.structure(primals)
    leaves, every = jax.tree.leaves(primals), enumerate(structure.flatten_up_to(tangents))
    moved = {index: tangent for index, tangent in every if tangent is not None}
    settings = dataclasses.replace(settings, in_halves=False, side_by_side=True)
    of_half = jax.jit(functools.partial(scan_affine, cell, settings))

    def run(changed: dict[int, Array]) -> tuple[list[Array], Array]:
        sequence, controls = jax.tree.unflatten(structure, [changed.get(i, leaf) for i, leaf in enumerate(leaves)])
        parts = zip(in_halves(sequence, sequence.batch_axes()), in_halves(controls, controls.batch_axes()), strict=True)
        last, hidden = zip(*(of_half(*part) for part in parts), strict=True)
        return [jnp.concatenate(leaf) for leaf in zip(*last, strict=True)], jnp.concatenate(hidden, axis=1)

    return jax.jvp(run, [{index: leaves[index] for index in moved}], [moved])


def _severed(controls: Controls) -> Array | None:
    """Returns where nothing passes from a step to those before it, bool ``[T, ...]``; None for nowhere."""
    reset, start = controls.reset, controls.window_start
    if reset is None or start is None:
        return start if reset is None else reset
    return reset | start.reshape(start.shape + (1,) * (reset.ndim - start.ndim))
