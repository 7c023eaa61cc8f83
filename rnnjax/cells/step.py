"""Any recurrence, as one step function."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from rnnjax import validation
from rnnjax.cells.base import Cell
from rnnjax.typing import Carry, DType, Params, StepFunction


@flax.struct.dataclass
class StepCell(Cell):
    """Any recurrence ``step_fn(params, carry, inputs) -> (carry, output)``, such as another library's module.

    ``step_fn`` is written for one sequence, without batch axes; batch axes are added by ``jax.vmap``. Its Jacobian is
    ``jax.jacrev`` of the whole flattened carry.

    Attributes:
      step_fn: the step; params and carry are any pytrees of arrays or numbers, inputs one time step ``[D]`` of each
        array ``[T, ..., D]`` in the inputs: its last axis alone holds the features, those between are batch axes.
      example_carry: the carry of one sequence before its first step; also what ``resets`` go back to. ``step_fn`` must
        return a carry of the same structure, shapes and dtypes.

    Raises:
      ValueError: when the cell is used: an ``example_carry`` that is empty or not finite, or a ``step_fn`` that does
        not return a carry like it, and an output.

    Example:
      >>> import jax.numpy as jnp, rnnjax
      >>> def step(params, carry, inputs):  # a tanh unit with its own decay
      ...     carry = params["decay"] * carry + jnp.tanh(params["weight"] @ carry + inputs)
      ...     return carry, carry
      >>> cell = StepCell(step, example_carry=jnp.zeros(2))
      >>> params = {"decay": jnp.array(0.5), "weight": 0.1 * jnp.ones((2, 2))}
      >>> carry, outputs = rnnjax.unroll(cell, params, jnp.ones((5, 2)))
      >>> outputs.shape
      (5, 2)
    """

    step_fn: StepFunction = flax.struct.field(pytree_node=False)
    example_carry: Carry = dataclasses.field()

    def initialize_carry(self, batch_shape: tuple[int, ...] = (), dtype: DType = None) -> Carry:
        """Returns ``example_carry`` repeated over ``batch_shape``; its dtypes are kept unless ``dtype`` is given."""

        def repeat(leaf: Any) -> jax.Array:
            leaf = jnp.asarray(leaf, dtype)
            return jnp.broadcast_to(leaf, (*batch_shape, *leaf.shape))

        return jax.tree.map(repeat, self.example_carry)

    def batch_shape(self, inputs: Any) -> tuple[int, ...]:
        """Returns the batch axes of the first leaf of time-major ``inputs`` ``[T, ..., D]``."""
        return jax.tree.leaves(inputs)[0].shape[1:-1]

    def carry_dtype(self, params: Params) -> DType:
        """Returns None: the carry keeps the dtypes of ``example_carry``."""
        return None

    def prepare_inputs(self, params: Params, inputs: Any) -> Any:
        """Returns ``inputs``: nothing is known about what a step function could do ahead of time."""
        return inputs

    def step(self, params: Params, carry: Carry, prepared: Any) -> tuple[Carry, Any]:
        """Runs ``step_fn``, over batch axes by ``jax.vmap``."""
        first, example = jax.tree.leaves(carry)[0], jax.tree.leaves(self.example_carry)[0]
        step = self.step_fn
        for _ in range(first.ndim - jnp.ndim(example)):
            step = jax.vmap(step, in_axes=(None, 0, 0))
        return step(params, carry, prepared)

    def check(self, params: Params, inputs: Any, carry: Carry | None = None) -> None:
        """Raises ValueError if inputs have no time steps, or a carry, new or old, is not like ``example_carry``."""
        self._check_example()
        if not jax.tree.leaves(inputs):
            raise ValueError(f"inputs must hold an array [T, ..., D], got {validation.in_words(inputs)}")
        for leaf in jax.tree.leaves(inputs):
            validation.time_major("inputs", leaf, None)
        batch_shape = self.batch_shape(inputs)
        if carry is not None:
            self._check_carry(carry, batch_shape)
        self._check_new_carry(params, inputs, 1 + len(batch_shape))

    def check_step(self, params: Params, carry: Carry, inputs: Any) -> None:
        """Raises ValueError if a carry, new or old, is not like ``example_carry``."""
        self._check_example()
        leaves, examples = jax.tree.leaves(carry), jax.tree.leaves(self.example_carry)
        batch_axes = jnp.ndim(leaves[0]) - jnp.ndim(examples[0]) if leaves else 0
        batch_shape = jnp.shape(leaves[0])[: max(batch_axes, 0)] if leaves else ()
        self._check_carry(carry, batch_shape)
        self._check_new_carry(params, inputs, len(batch_shape))

    def _check_example(self) -> None:
        if not jax.tree.leaves(self.example_carry):
            raise ValueError(f"example_carry must hold an array, got {validation.in_words(self.example_carry)}")
        validation.finite("example_carry", self.example_carry)

    def _check_carry(self, carry: Carry, batch_shape: tuple[int, ...]) -> None:
        validation.same_shapes("carry", carry, jax.eval_shape(lambda: self.initialize_carry(batch_shape)))

    def _check_new_carry(self, params: Params, inputs: Any, num_leading: int) -> None:
        """Runs ``step_fn`` on shapes alone, for one sequence: ``num_leading`` axes of the inputs are left out."""
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[num_leading:], jnp.result_type(x)), inputs)
        old = jax.eval_shape(self.initialize_carry)
        result = jax.eval_shape(self.step_fn, params, old, one)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise ValueError(f"step_fn must return a pair (carry, output), got {validation.in_words(result)}")
        if not _alike(result[0], old):
            like, got = validation.in_words(old), validation.in_words(result[0])
            raise ValueError(f"step_fn must return a carry like example_carry, {like}, got {got}")


def _alike(new: Carry, old: Carry) -> bool:
    """Whether a scan can hand ``new`` on in place of ``old``; a number without a dtype of its own takes the new one."""
    if str(jax.tree.structure(new)) != str(jax.tree.structure(old)):
        return False
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    return all(a.shape == b.shape and (b.weak_type or a.dtype == b.dtype) for a, b in pairs)
