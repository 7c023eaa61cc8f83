"""Time: the only place where a sequence is scanned for states."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from rnnjax import validation
from rnnjax.affine_scan import ScanSettings, scan_affine
from rnnjax.cells import AffineCell, Cell, CellParams
from rnnjax.chunks import scan_chunks
from rnnjax.controls import Controls, make_controls, where, without_padding
from rnnjax.cotangents import clip_cotangent
from rnnjax.linearisation import Sequence
from rnnjax.meshes import on_any_mesh
from rnnjax.typing import Array, Carry, DType, Params


@flax.struct.dataclass
class Trajectory:
    """The states a sequence passed through, and what drove them.

    Attributes:
      carries: pytree of ``[T+1, ..., H]``; entry 0 is the carry before the first step.
      inputs: ``[T, ..., D]``.
      active: bool ``[T, ...]``; where false, the carry stands still. None where every step counts.
      resets: bool ``[T, ...]``; where true, a step starts from the initial carry, not from the last one. None for none.
    """

    carries: Carry
    inputs: Any
    active: Array | None = None
    resets: Array | None = None

    def starts(self, cell: Cell) -> Carry:
        """Returns the carries that the steps start from, leaves ``[T, ..., H]``."""
        before = jax.tree.map(lambda leaf: leaf[:-1], self.carries)
        if self.resets is None:
            return before
        dtype = jax.tree.leaves(before)[0].dtype if isinstance(cell, AffineCell) else None
        initial = cell.initialize_carry(self.resets.shape[1:], dtype)
        return where(
            self.resets,
            jax.tree.map(lambda new, old: jnp.broadcast_to(new.astype(old.dtype), old.shape), initial, before),
            before,
        )


def unroll(
    cell: Cell,
    params: Params,
    inputs: Any,
    carry: Carry | None = None,
    *,
    lengths: Array | None = None,
    resets: Array | None = None,
    truncation: int | None = None,
    reverse: bool = False,
    perturbations: Any = None,
    max_carry_gradient: float | None = None,
    checkpoint_every: int | None = None,
    compute_dtype: DType | None = None,
    side_by_side: bool = False,
) -> tuple[Carry, Any]:
    """Runs a cell over a sequence.

    Whatever does not depend on the carry (for affine cells the input projection of all T steps) is done in one go
    before the scan.

    Args:
      cell: any cell.
      params: its weights.
      inputs: ``[T, ..., D]``, time-major.
      carry: the carry before the first step; ``cell.initialize_carry`` by default.
      lengths: whole numbers ``[...]`` in [0, T]. From its length on a sequence's carry stands still, its outputs are
        zero and its gradients exactly zero, whatever its padding holds: the cell is given the sequence's first input
        in place of padding (zeros where the length is 0).
      resets: bool ``[T, ...]``. Where true, the carry is initialised again before that step.
      truncation: window length n of truncated backpropagation through time. Windows are [0, n), [n, 2n), … in the
        order of processing of each sequence, and no gradient crosses the start of a window, the first included; the
        states are unchanged.
      reverse: process the steps from last to first; output t still belongs to input t. A sequence shorter than T starts
        at its own last step.
      perturbations: ``[T, ..., H]``, added to each new hidden state, or a pytree like the carry with leaves
        ``[T, ..., H]``, added to each new carry. Zeros leave everything as it is, and the gradient with respect to them
        is the hidden gradient ∂L/∂h_t, or ∂L/∂s_t, from the same backward pass. The output of an affine cell is its
        perturbed hidden state; a ``StepCell`` has its carry perturbed alone, after its output.
      max_carry_gradient: clipping inside backpropagation through time: the largest norm of the gradient ∂L/∂s_t that
        the steps after t may hand back to step t, for each sequence on its own; None for no bound. What a loss sends
        into the output of step t itself is not clipped. Reverse mode only.
      checkpoint_every: keep the carry of every n-th step alone for the backward pass, which computes all else again: a
        forward pass more, for memory that grows with T/n + n states instead of T. None to keep every step.
      compute_dtype: dtype of the factors of matrix products, for affine cells: with ``bfloat16`` and float32 weights,
        sums, states and gradients stay float32. None for that of the weights.
      side_by_side: take gradients of a batch through time in two loops, a half of the batch in each, which XLA runs on
        two cores: faster from about the hundredth call on, since it compiles longer. For affine cells, on a CPU with
        cores to spare, where a step takes 2¹⁹ to 2²⁴ multiplications; elsewhere nothing changes.

    Returns:
      The carry after the last processed step, and the outputs ``[T, ..., H]``.

    Raises:
      ValueError: shapes that do not fit the cell, T = 0, lengths out of range, a truncation below 1, non-finite inputs,
        weights or carry, a ``max_carry_gradient`` that is not a positive finite number, a ``checkpoint_every`` below 1,
        a ``compute_dtype`` that is not floating or given for a cell that is not affine.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> cell = rnnjax.GRUCell(4)
      >>> params = cell.init(jax.random.key(0), input_size=2)
      >>> carry, outputs = unroll(cell, params, jnp.ones((7, 3, 2)), lengths=jnp.array([7, 5, 0]))
      >>> outputs.shape, bool(jnp.all(outputs[5:, 1] == 0)), bool(jnp.all(carry[2] == 0))
      ((7, 3, 4), True, True)
    """
    cell.check(params, inputs, carry)
    lengths, resets, inputs = _checked_controls(cell, inputs, lengths, resets)
    if truncation is not None:
        validation.positive_integer("truncation", truncation)
    if perturbations is not None:
        leading = (jax.tree.leaves(inputs)[0].shape[0], *cell.batch_shape(inputs))
        _check_perturbations(cell, perturbations, leading)
    if max_carry_gradient is not None:
        max_carry_gradient = validation.positive_number("max_carry_gradient", max_carry_gradient)
    if checkpoint_every is not None:
        validation.positive_integer("checkpoint_every", checkpoint_every)
    if compute_dtype is not None:
        compute_dtype = _checked_compute_dtype(cell, compute_dtype)
    for name, value in (("params", params), ("inputs", inputs), ("carry", carry)):
        validation.finite(name, value)
    arrays = (params, inputs, carry, lengths, resets, perturbations)
    scan = _Scan(ScanSettings(reverse, compute_dtype, side_by_side), truncation, max_carry_gradient, checkpoint_every)
    run = on_any_mesh(_unroll, jax.tree.leaves(inputs)[0], len(cell.batch_shape(inputs)), (False, True))
    return run(cell, *arrays, scan=scan)


def trajectory(
    cell: Cell,
    params: Params,
    inputs: Any,
    carry: Carry | None = None,
    *,
    lengths: Array | None = None,
    resets: Array | None = None,
) -> Trajectory:
    """Runs a cell over a sequence and keeps every carry, at the highest matmul precision.

    Args:
      cell: any cell.
      params: its weights.
      inputs: ``[T, ..., D]``, time-major.
      carry: the carry before the first step; ``cell.initialize_carry`` by default.
      lengths: as for ``unroll``: from its length on a sequence's carry stands still, and ∂s_t/∂s_{t−1} is the identity.
      resets: as for ``unroll``: where true, a step does not depend on the carry before it, and ∂s_t/∂s_{t−1} is zero.

    Returns:
      The ``Trajectory``, with T + 1 carries.

    Raises:
      ValueError: shapes that do not fit the cell, T = 0, lengths out of range, non-finite inputs, weights or carry; a
        state that becomes non-finite, with the step of the inputs, counted from 0, at which it does.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> cell = rnnjax.LSTMCell(4)
      >>> params = cell.init(jax.random.key(0), input_size=2)
      >>> hidden, memory = trajectory(cell, params, jnp.ones((7, 3, 2))).carries
      >>> hidden.shape
      (8, 3, 4)
    """
    cell.check(params, inputs, carry)
    lengths, resets, inputs = _checked_controls(cell, inputs, lengths, resets)
    for name, value in (("params", params), ("inputs", inputs), ("carry", carry)):
        validation.finite(name, value)
    run = on_any_mesh(_carries, jax.tree.leaves(inputs)[0], len(cell.batch_shape(inputs)), (True, True))
    carries, controls = run(cell, params, inputs, carry, lengths, resets)
    # Without the carry before the first step, so that the index is that of the input that led to the state.
    validation.finite_steps("state", jax.tree.map(lambda leaf: leaf[1:], carries))
    return Trajectory(carries, inputs, controls.active, controls.reset)


@jax.jit
def _carries(
    cell: Cell, params: Params, inputs: Any, carry: Carry | None, lengths: Array | None, resets: Array | None
) -> tuple[Carry, Controls]:
    with jax.default_matmul_precision("highest"):
        reset_carry, initial = (_initial_carry(cell, params, inputs, start) for start in (None, carry))
        controls = make_controls(jax.tree.leaves(inputs)[0].shape[0], lengths, resets, None, False)

        def step(carry: Carry, xs: tuple[Any, Controls]) -> tuple[Carry, Carry]:
            prepared, control = xs
            after, output = cell.step(params, control.enter(carry, reset_carry), prepared)
            after, _ = control.leave(carry, after, output)
            return after, after

        _, carries = jax.lax.scan(step, initial, (cell.prepare_inputs(params, inputs), controls))
    carries = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), initial, carries)
    return carries, controls


@dataclasses.dataclass(frozen=True)
class _Scan:
    """How ``unroll`` goes through time."""

    settings: ScanSettings
    truncation: int | None
    max_carry_gradient: float | None
    checkpoint_every: int | None


@functools.partial(jax.jit, static_argnames="scan")
def _unroll(
    cell: Cell,
    params: Params,
    inputs: Any,
    carry: Carry | None,
    lengths: Array | None,
    resets: Array | None,
    perturbations: Any,
    scan: _Scan,
) -> tuple[Carry, Any]:
    carry = _initial_carry(cell, params, inputs, carry)
    num_steps = jax.tree.leaves(inputs)[0].shape[0]
    controls = make_controls(num_steps, lengths, resets, scan.truncation, scan.settings.reverse)
    steps: Any = functools.partial(_unroll_steps, cell, scan, params)
    if isinstance(cell, AffineCell) and scan.max_carry_gradient is None:
        steps = functools.partial(_unroll_affine, cell, scan, params)
    xs = (inputs, controls, perturbations)
    if scan.checkpoint_every is None:
        return steps(carry, xs)
    kept = jax.checkpoint(steps, prevent_cse=False)
    return scan_chunks(kept, carry, xs, scan.checkpoint_every, reverse=scan.settings.reverse)


def _unroll_affine(
    cell: AffineCell, scan: _Scan, params: CellParams, carry: Carry, xs: tuple[Array, Controls, Any]
) -> tuple[Carry, Array]:
    inputs, controls, perturbations = xs
    leaves, structure = jax.tree.flatten(carry)
    # An array alone is for h, the first leaf.
    added = [p.astype(leaf.dtype) for p, leaf in zip(jax.tree.leaves(perturbations), leaves, strict=False)]
    sequence = Sequence(params, inputs.astype(params.input_kernel.dtype), leaves, added)
    last, hidden = scan_affine(cell, scan.settings, sequence, controls)
    if controls.active is not None:
        hidden = where(controls.active, hidden, jnp.zeros_like(hidden))
    return jax.tree.unflatten(structure, last), hidden


def _unroll_steps(
    cell: Cell, scan: _Scan, params: Params, carry: Carry, xs: tuple[Any, Controls, Any]
) -> tuple[Carry, Any]:
    inputs, controls, perturbations = xs
    reset_carry = _initial_carry(cell, params, inputs, None)
    if isinstance(cell, AffineCell):
        params = scan.settings.rounded(params)
    num_batch_axes = len(cell.batch_shape(inputs))

    def step(carry: Carry, xs: tuple[Any, Controls, Any]) -> tuple[Carry, Any]:
        prepared, control, perturbation = xs
        if scan.max_carry_gradient is not None:
            carry = clip_cotangent(carry, scan.max_carry_gradient, num_batch_axes)
        after, output = cell.step(params, control.enter(carry, reset_carry), prepared)
        if perturbation is not None:
            after, output = _perturb(cell, after, output, perturbation)
        return control.leave(carry, after, output)

    prepared = cell.prepare_inputs(params, inputs)
    return jax.lax.scan(step, carry, (prepared, controls, perturbations), reverse=scan.settings.reverse)


def _checked_compute_dtype(cell: Cell, dtype: DType) -> Any:
    if not isinstance(cell, AffineCell):
        raise ValueError(f"compute_dtype must be None for a cell that is not affine, got {dtype!r}")
    validation.floating_dtype("compute_dtype", dtype)
    return jnp.dtype(dtype)


def _checked_controls(
    cell: Cell, inputs: Any, lengths: Array | None, resets: Array | None
) -> tuple[Array | None, Array | None, Any]:
    """Checks lengths and resets, and returns them as arrays, with inputs whose padding no step has to fear."""
    num_steps, batch_shape = jax.tree.leaves(inputs)[0].shape[0], cell.batch_shape(inputs)
    if lengths is not None:
        lengths = jnp.asarray(lengths)
        validation.lengths("lengths", lengths, batch_shape, num_steps)
        inputs = without_padding(inputs, lengths)
    if resets is not None:
        validation.shape("resets", resets, (num_steps, *batch_shape))
        resets = jnp.asarray(resets, bool)
    return lengths, resets, inputs


def _initial_carry(cell: Cell, params: Params, inputs: Any, carry: Carry | None) -> Carry:
    initial = cell.initialize_carry(cell.batch_shape(inputs), cell.carry_dtype(params))
    if carry is None:
        return initial
    return jax.tree.map(lambda leaf, like: jnp.asarray(leaf).astype(like.dtype), carry, initial)


def _perturb(cell: Cell, carry: Carry, output: Any, perturbation: Any) -> tuple[Carry, Any]:
    leaves, structure = jax.tree.flatten(carry)
    # An array alone is for h, the first leaf.
    added = [a + b.astype(a.dtype) for a, b in zip(leaves, jax.tree.leaves(perturbation), strict=False)]
    carry = jax.tree.unflatten(structure, added + leaves[len(added) :])
    return carry, cell.hidden(carry) if isinstance(cell, AffineCell) else output


def _check_perturbations(cell: Cell, perturbations: Any, leading: tuple[int, ...]) -> None:
    if isinstance(cell, AffineCell) and hasattr(perturbations, "shape"):
        validation.shape("perturbations", perturbations, (*leading, cell.hidden_size))
    else:
        validation.same_shapes("perturbations", perturbations, jax.eval_shape(lambda: cell.initialize_carry(leading)))
