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
      step_fn: the step; params and carry are any pytrees of arrays.
      example_carry: the carry of one sequence before its first step; also what ``resets`` go back to.

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
        """Raises ValueError if inputs have no time steps, or a carry is not shaped like ``example_carry``."""
        for leaf in jax.tree.leaves(inputs):
            validation.time_major("inputs", leaf, None)
        if carry is not None:
            expected = jax.eval_shape(lambda: self.initialize_carry(self.batch_shape(inputs)))
            validation.same_shapes("carry", carry, expected)
