"""What happens to the carry around a step: sequences that end, resets, and windows that no gradient leaves."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from rnnjax.typing import Array, Carry


@flax.struct.dataclass
class Controls:
    """What happens to the carry around each step; None where nothing does.

    Attributes:
      active: bool ``[T, ...]``; where false, the carry stands still and the output is zero.
      reset: bool ``[T, ...]``; where true, the carry is initialised again before the step.
      window_start: bool ``[T]`` or ``[T, ...]``; where true, no gradient passes from the step to those before it.
    """

    active: Array | None
    reset: Array | None
    window_start: Array | None

    def batch_axes(self) -> Any:
        """Returns which axis of each array is the first of the batch; −1 for none."""
        return jax.tree.map(lambda x: 1 if x.ndim > 1 else -1, self)

    def enter(self, carry: Carry, initial: Carry) -> Carry:
        """Returns the carry that a step starts from."""
        if self.reset is not None:
            carry = where(self.reset, initial, carry)
        if self.window_start is not None:
            carry = where(self.window_start, jax.lax.stop_gradient(carry), carry)
        return carry

    def leave(self, before: Carry, after: Carry, output: Any) -> tuple[Carry, Any]:
        """Returns the carry and output that a step ends with."""
        if self.active is None:
            return after, output
        return where(self.active, after, before), where(self.active, output, jax.tree.map(jnp.zeros_like, output))


def make_controls(
    num_steps: int, lengths: Array | None, resets: Array | None, truncation: int | None, reverse: bool
) -> Controls:
    """Returns the controls of T steps, in the words of ``unroll``."""
    active = None if lengths is None else before_length(num_steps, lengths)
    processed = jnp.arange(num_steps)
    if reverse:  # a sequence that is shorter starts, and counts its windows from, its own last step
        processed = processed[::-1] if lengths is None else lengths[None] - 1 - _time_axis(num_steps, lengths)
    window_start = None if truncation is None else processed % truncation == 0
    return Controls(active, resets, window_start)


def before_length(num_steps: int, lengths: Array) -> Array:
    """Returns the bool mask ``[T, ...]`` of the steps before each sequence's length."""
    return _time_axis(num_steps, lengths) < lengths[None]


def _time_axis(num_steps: int, lengths: Array) -> Array:
    return jnp.arange(num_steps).reshape(-1, *(1,) * lengths.ndim)


def without_padding(inputs: Any, lengths: Array) -> Any:
    """Replaces inputs past each length by the sequence's first: a NaN there would make the masked gradients NaN.

    Zeros would not do, since a step of the user's own, such as x/‖x‖, may have no derivative there.
    """

    def filled(x: Array) -> Array:
        first = jax.lax.stop_gradient(jnp.asarray(x[:1]))
        filler = where(lengths[None] > 0, first, jnp.zeros_like(first))
        return where(before_length(x.shape[0], lengths), x, filler)

    return jax.tree.map(filled, inputs)


def where(condition: Array, on_true: Any, on_false: Any) -> Any:
    """Selects whole pytrees by a condition over their leading axes."""

    def select(a: Array, b: Array) -> Array:
        return jnp.where(jnp.reshape(condition, condition.shape + (1,) * (a.ndim - condition.ndim)), a, b)

    return jax.tree.map(select, on_true, on_false)
