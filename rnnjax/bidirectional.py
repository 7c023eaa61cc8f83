"""A layer that reads a sequence in both directions, and layers that take the batch first."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rnnjax import validation
from rnnjax.cells import AffineCell, CellParams
from rnnjax.typing import Array, Carry
from rnnjax.unroll import unroll

Pair = tuple[Any, Any]


def unroll_bidirectional(
    cell: AffineCell,
    params: tuple[CellParams, CellParams],
    inputs: Array,
    carry: tuple[Carry, Carry] | None = None,
    *,
    lengths: Array | None = None,
    resets: Array | None = None,
    perturbations: Pair | None = None,
    **options: Any,
) -> tuple[tuple[Carry, Carry], Array]:
    """Runs a cell over a sequence forwards and, with weights of its own, backwards, both in one scan.

    Args:
      cell: an affine cell.
      params: the weights forwards and backwards.
      inputs: ``[T, ..., D]``, time-major.
      carry: the carries before the first step and after the last; ``cell.initialize_carry`` by default.
      lengths: as for ``unroll``; backwards, a sequence starts at its own last step.
      resets: as for ``unroll``, for both directions: before step t, in the order of processing.
      perturbations: as for ``unroll``, one for each direction, time in the order of processing.
      **options: those of ``unroll``, without ``reverse``.

    Returns:
      The carry after the last step forwards and the carry after the first step backwards; the hidden states of both,
      ``[T, ..., 2H]``, forwards first, each at the step of its input.

    Raises:
      ValueError: what ``unroll`` refuses, a cell that is not affine, weights that are not a pair of the same shapes,
        ``reverse``.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> cell = rnnjax.GRUCell(4)
      >>> params = tuple(cell.init(jax.random.key(seed), input_size=2) for seed in (0, 1))
      >>> carries, outputs = unroll_bidirectional(cell, params, jnp.ones((7, 3, 2)))
      >>> outputs.shape, bool(jnp.allclose(outputs[0, :, 4:], carries[1]))
      ((7, 3, 8), True)

    Source: M. Schuster & K. K. Paliwal, Bidirectional recurrent neural networks, IEEE Transactions on Signal Processing
    45, 1997.
    """
    if not isinstance(cell, AffineCell):
        raise ValueError(f"cell must be an affine cell, such as a GRUCell, got {type(cell).__name__}")
    for name, value in (("params", params), ("carry", carry), ("perturbations", perturbations)):
        if value is not None and (not isinstance(value, (tuple, list)) or len(value) != 2):
            raise ValueError(f"{name} must be a pair, forwards and backwards, got {type(value).__name__}")
    if "reverse" in options:
        raise ValueError(f"reverse must be left out, both directions are run, got {options['reverse']!r}")
    for index, direction in enumerate(("forwards", "backwards")):
        cell.check(params[index], inputs, None if carry is None else carry[index])
        validation.finite(f"params {direction}", params[index])
    validation.same_shapes("params backwards", params[1], params[0])
    validation.finite("inputs", inputs)
    turn = functools.partial(_reversed_in_time, lengths=lengths)
    stacked: list[Any] = [_stacked(pair) for pair in (params, (inputs, turn(inputs)), carry, perturbations)]
    both_resets = None if resets is None else jnp.stack([jnp.asarray(resets, bool), turn(jnp.asarray(resets, bool))])

    def run(params: CellParams, inputs: Array, carry: Carry, perturbations: Any, resets: Any) -> tuple[Carry, Array]:
        own: dict[str, Any] = {"lengths": lengths, "resets": resets, "perturbations": perturbations}
        return unroll(cell, params, inputs, carry, **own, **options)

    stacked.append(both_resets)
    last, outputs = jax.vmap(run)(*stacked)
    forwards, backwards = (jax.tree.map(lambda leaf, i=i: leaf[i], last) for i in (0, 1))
    return (forwards, backwards), jnp.concatenate([outputs[0], turn(outputs[1])], axis=-1)


def _stacked(pair: Pair | None) -> Any:
    if pair is None:
        return None
    return jax.tree.map(lambda a, b: jnp.stack([jnp.asarray(a), jnp.asarray(b)]), *pair)


def _reversed_in_time(array: Array, lengths: Array | None) -> Array:
    """Turns the time axis around, for each sequence up to its own length."""
    if lengths is None:
        return array[::-1]
    steps = jnp.arange(array.shape[0]).reshape(-1, *(1,) * jnp.ndim(lengths))
    last = jnp.asarray(lengths)[None] - 1
    index = jnp.where(
        steps <= last, last - steps, jnp.broadcast_to(steps, jnp.broadcast_shapes(steps.shape, last.shape))
    )
    return jnp.take_along_axis(array, index.reshape(index.shape + (1,) * (array.ndim - index.ndim)), axis=0)


def batch_major(run: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Returns ``unroll`` or ``unroll_bidirectional`` for arrays whose batch axis comes first, ``[B, T, ...]``.

    Args:
      run: one of the two.

    Returns:
      The function that takes ``inputs``, ``resets`` and ``perturbations`` and returns the outputs with the batch axis
      first and time second; all else is as it was.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> cell = rnnjax.GRUCell(4)
      >>> params = cell.init(jax.random.key(0), input_size=2)
      >>> carry, outputs = batch_major(rnnjax.unroll)(cell, params, jnp.ones((3, 7, 2)))
      >>> carry.shape, outputs.shape
      ((3, 4), (3, 7, 4))
    """

    def swapped(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), tree)

    @functools.wraps(run)
    def function(cell: Any, params: Any, inputs: Any, *rest: Any, **options: Any) -> tuple[Any, Any]:
        for leaf in jax.tree.leaves(inputs):
            if jnp.ndim(leaf) < 3:
                raise ValueError(f"inputs must have a batch axis and a time axis, [B, T, ...], got {jnp.shape(leaf)}")
        if options.get("resets") is not None:
            options["resets"] = jnp.asarray(options["resets"], bool)
        options |= {name: swapped(options[name]) for name in ("resets", "perturbations") if name in options}
        carry, outputs = run(cell, params, swapped(inputs), *rest, **options)
        return carry, swapped(outputs)

    return function
