"""Exact per-step Jacobians J_t = ∂s_t/∂s_{t−1}, and their products with vectors.

For an affine cell the state of unit j depends on the other units only through its recurrent pre-activations
r_t = h_{t−1} U, so that with the derivatives of one unit, P_t = ∂s'/∂s and D_t = ∂s'/∂r,

    J_t = P_t + D_t Uᵀ,

for all steps at once, outside the scan. ``jax.jacrev`` of the pointwise function gives both.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from rnnjax import validation
from rnnjax.cells import AffineCell, Cell, CellParams
from rnnjax.cells.base import split_gates
from rnnjax.typing import Array, Carry, DType, Params
from rnnjax.unroll import Trajectory


@flax.struct.dataclass
class StructuredJacobians:
    """Step Jacobians of an affine cell, kept as the factors of J = P + D Uᵀ.

    C is the number of values a unit carries: 1, or 2 for the LSTM. States are ordered by carry, then by unit.

    Attributes:
      carry_derivatives: P, ``[..., C, C, H]``: entry (a, b, j) is ∂(carry a of unit j)' / ∂(carry b of unit j).
      recurrent_derivatives: D, ``[..., C, G, H]``: entry (a, g, j) is ∂(carry a of unit j)' / ∂(gate g's r of unit j).
      recurrent_kernel: U, ``[H, G, H]``.
    """

    carry_derivatives: Array
    recurrent_derivatives: Array
    recurrent_kernel: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense Jacobians, ``[T, ..., S, S]`` with S = C · H."""
        *leading, num_carries, _, hidden = self.carry_derivatives.shape
        return (*leading, num_carries * hidden, num_carries * hidden)

    @property
    def dtype(self) -> DType:
        """Dtype of the Jacobians."""
        return self.carry_derivatives.dtype

    def at_step(self, step: Array | int) -> "StructuredJacobians":
        """Returns the Jacobian of one step, without the time axis."""
        return StructuredJacobians(
            self.carry_derivatives[step], self.recurrent_derivatives[step], self.recurrent_kernel
        )

    def dense(self) -> Array:
        """Returns J, ``[..., S, S]``."""
        diagonal, gates = self.carry_derivatives, self.recurrent_derivatives
        hidden = diagonal.shape[-1]
        through_gates = jnp.einsum("...agj,igj->...aji", gates, self.recurrent_kernel, precision="highest")
        same_unit = _rank_to(jnp.eye(hidden, dtype=self.dtype)[:, None], diagonal.ndim + 1)
        unit_to_unit = jnp.moveaxis(diagonal, -2, -1)[..., None] * same_unit
        from_hidden = unit_to_unit[..., 0, :] + through_gates
        blocks = jnp.concatenate([from_hidden[..., None, :], unit_to_unit[..., 1:, :]], axis=-2)
        return blocks.reshape(self.shape)

    def times(self, columns: Array) -> Array:
        """Returns J V for V ``[..., S, m]``, whose leading axes are those of J, at the cost of U V."""
        parts = self._by_carry(columns)
        through_gates = jnp.einsum("igj,...im->...gjm", self.recurrent_kernel, parts[..., 0, :, :], precision="highest")
        result = jnp.einsum("...abj,...bjm->...ajm", self.carry_derivatives, parts, precision="highest")
        result += jnp.einsum("...agj,...gjm->...ajm", self.recurrent_derivatives, through_gates, precision="highest")
        return result.reshape(columns.shape)

    def transpose_times(self, columns: Array) -> Array:
        """Returns Jᵀ V for V ``[..., S, m]``, whose leading axes are those of J, at the cost of Uᵀ V."""
        parts = self._by_carry(columns)
        result = jnp.einsum("...abj,...ajm->...bjm", self.carry_derivatives, parts, precision="highest")
        at_gates = jnp.einsum("...agj,...ajm->...gjm", self.recurrent_derivatives, parts, precision="highest")
        to_hidden = jnp.einsum("igj,...gjm->...im", self.recurrent_kernel, at_gates, precision="highest")
        return result.at[..., 0, :, :].add(to_hidden).reshape(columns.shape)

    def _by_carry(self, columns: Array) -> Array:
        num_carries, hidden = self.carry_derivatives.shape[-2:]
        return columns.reshape(*columns.shape[:-2], num_carries, hidden, columns.shape[-1])


@flax.struct.dataclass
class DenseJacobians:
    """Step Jacobians kept as matrices, with the methods of ``StructuredJacobians``.

    Attributes:
      matrices: ``[T, ..., S, S]``.
    """

    matrices: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """``[T, ..., S, S]``."""
        return self.matrices.shape

    @property
    def dtype(self) -> DType:
        """Dtype of the Jacobians."""
        return self.matrices.dtype

    def at_step(self, step: Array | int) -> "DenseJacobians":
        """Returns the Jacobian of one step, without the time axis."""
        return DenseJacobians(self.matrices[step])

    def dense(self) -> Array:
        """Returns J, ``[..., S, S]``."""
        return self.matrices

    def times(self, columns: Array) -> Array:
        """Returns J V for V ``[..., S, m]``."""
        return jnp.matmul(self.matrices, columns, precision="highest")

    def transpose_times(self, columns: Array) -> Array:
        """Returns Jᵀ V for V ``[..., S, m]``."""
        return jnp.matmul(jnp.swapaxes(self.matrices, -1, -2), columns, precision="highest")


Jacobians = StructuredJacobians | DenseJacobians


def jacobian_operator(cell: Cell, params: Params, trajectory: Trajectory) -> Jacobians:
    """Returns every step Jacobian in the cheapest form the cell allows: factors for affine cells, else matrices.

    Args:
      cell: any cell.
      params: its weights.
      trajectory: the states and inputs at which to differentiate, T steps.

    Returns:
      ``StructuredJacobians`` or ``DenseJacobians``: an object with ``times``, ``transpose_times``, ``dense`` and
      ``at_step``, in the dtype of the states (float32 for narrower ones).

    Raises:
      ValueError: a Jacobian that is not finite, with its step.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> cell = rnnjax.GRUCell(4)
      >>> params = cell.init(jax.random.key(0), input_size=2)
      >>> jacobians = jacobian_operator(cell, params, rnnjax.trajectory(cell, params, jnp.ones((7, 2))))
      >>> jacobians.shape, jacobians.at_step(6).times(jnp.ones((4, 1))).shape
      ((7, 4, 4), (4, 1))
    """
    params, trajectory = _at_least_float32((params, trajectory))
    if isinstance(cell, AffineCell):
        jacobians: Jacobians = structured_jacobians(cell, params, trajectory)
    else:
        jacobians = DenseJacobians(_autodiff_step_jacobians(cell, params, trajectory))
    check_finite(jacobians)
    return jacobians


def check_finite(jacobians: Jacobians) -> None:
    """Raises ValueError that names the first step whose Jacobian is not finite, where it has values."""
    if isinstance(jacobians, DenseJacobians):
        validation.finite_steps("step Jacobian", jacobians.matrices)
    else:
        validation.finite_steps("step Jacobian", (jacobians.carry_derivatives, jacobians.recurrent_derivatives))
        validation.finite("jacobians.recurrent_kernel", jacobians.recurrent_kernel)


def structured_jacobians(cell: AffineCell, params: CellParams, trajectory: Trajectory) -> StructuredJacobians:
    """Returns the factors of every step Jacobian of an affine cell.

    Args:
      cell: an affine cell.
      params: its weights, float32 or float64.
      trajectory: the states and inputs at which to differentiate, T steps, in the dtype of the weights.

    Returns:
      ``StructuredJacobians`` with leading axes ``[T, ...]``, in that dtype.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> cell = rnnjax.LSTMCell(4)
      >>> params = cell.init(jax.random.key(0), input_size=2)
      >>> factors = structured_jacobians(cell, params, rnnjax.trajectory(cell, params, jnp.ones((7, 2))))
      >>> factors.carry_derivatives.shape, factors.recurrent_derivatives.shape  # [T, C, C, H] and [T, C, G, H]
      ((7, 2, 2, 4), (7, 2, 4, 4))
    """
    with jax.default_matmul_precision("highest"):
        before = jax.tree.map(lambda leaf: leaf[:-1], trajectory.carries)
        from_inputs = split_gates(cell.prepare_inputs(params, trajectory.inputs))
        recurrent = split_gates(cell.recurrent_preactivation(params, cell.hidden(before)))
    by_carry, by_gate = _unit_derivatives(cell, before, from_inputs, recurrent)
    return StructuredJacobians(by_carry, by_gate, params.recurrent_kernel)


def step_jacobians(cell: Cell, params: Params, trajectory: Trajectory) -> Array:
    """Returns every step Jacobian J_t = ∂s_t/∂s_{t−1} of a sequence.

    Affine cells take the structured route, all others ``autodiff_step_jacobians``; the two agree to rounding.

    Args:
      cell: any cell.
      params: its weights.
      trajectory: the states and inputs at which to differentiate, T steps.

    Returns:
      ``[T, ..., S, S]``, in the dtype of the states (float32 for bfloat16 states).

    Raises:
      ValueError: a Jacobian that is not finite, with the step of the inputs, counted from 0, whose Jacobian it is.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> cell = rnnjax.VanillaCell(2, activation="identity")
      >>> params = cell.init(jax.random.key(0), input_size=1)
      >>> path = rnnjax.trajectory(cell, params, jnp.ones((3, 1)))
      >>> jacobians = step_jacobians(cell, params, path)
      >>> bool(jnp.allclose(jacobians[1], params.recurrent_kernel[:, 0].T))
      True

    Source: R. Pascanu et al., On the difficulty of training recurrent neural networks, ICML 2013, equation 5.
    """
    params, trajectory = _at_least_float32((params, trajectory))
    if isinstance(cell, AffineCell):
        jacobians = _structured_step_jacobians(cell, params, trajectory)
    else:
        jacobians = _autodiff_step_jacobians(cell, params, trajectory)
    validation.finite_steps("step Jacobian", jacobians)
    return jacobians


def autodiff_step_jacobians(cell: Cell, params: Params, trajectory: Trajectory) -> Array:
    """Returns every step Jacobian by ``jax.jacrev`` of the whole flattened carry; works for any cell.

    Args:
      cell: any cell.
      params: its weights.
      trajectory: the states and inputs at which to differentiate, T steps.

    Returns:
      ``[T, ..., S, S]``, in the dtype of the states (float32 for bfloat16 states). Nothing is checked: an entry that
      is not finite comes back as it is.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> cell = rnnjax.StepCell(lambda params, h, x: (jnp.sin(params * h) + x, h), example_carry=jnp.zeros(2))
      >>> path = rnnjax.trajectory(cell, 0.5, jnp.ones((3, 2)))
      >>> print(autodiff_step_jacobians(cell, 0.5, path)[0])  # ½ cos 0 on the diagonal
      [[0.5 0. ]
       [0.  0.5]]
    """
    params, trajectory = _at_least_float32((params, trajectory))
    return _autodiff_step_jacobians(cell, params, trajectory)


@jax.jit
def _structured_step_jacobians(cell: AffineCell, params: CellParams, trajectory: Trajectory) -> Array:
    return structured_jacobians(cell, params, trajectory).dense()


@jax.jit
def _autodiff_step_jacobians(cell: Cell, params: Params, trajectory: Trajectory) -> Array:
    template = jax.eval_shape(cell.initialize_carry)
    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), template))

    def jacobian(carry: Carry, inputs: Any) -> Array:
        def next_state(state: Array) -> Array:
            like = jax.tree.map(lambda new, old: new.astype(old.dtype), unravel(state), carry)
            return ravel_pytree(cell.apply(params, like, inputs)[0])[0]

        return jax.jacrev(next_state)(ravel_pytree(carry)[0])

    before = jax.tree.map(lambda leaf: leaf[:-1], trajectory.carries)
    for _ in range(1 + len(cell.batch_shape(trajectory.inputs))):
        jacobian = jax.vmap(jacobian)
    with jax.default_matmul_precision("highest"):
        return jacobian(before, trajectory.inputs)


def _unit_derivatives(
    cell: AffineCell, carry: Carry, from_inputs: tuple[Array, ...], recurrent: tuple[Array, ...]
) -> tuple[Array, Array]:
    """Returns P ``[..., C, C, H]`` and D ``[..., C, G, H]``, by ``jax.jacrev`` of one unit, over all units at once."""
    shape = cell.hidden(carry).shape
    arguments = jax.tree.map(jnp.ravel, (carry, from_inputs, recurrent))
    derivatives = jax.vmap(jax.jacrev(cell.pointwise, argnums=(0, 2)))(*arguments)

    def stacked(rows: list[list[Array]]) -> Array:
        matrix = jnp.stack([jnp.stack([leaf.reshape(shape) for leaf in row]) for row in rows])
        return jnp.moveaxis(matrix, (0, 1), (-3, -2))

    rows = derivatives if cell.num_carries > 1 else (derivatives,)
    return stacked([jax.tree.leaves(row[0]) for row in rows]), stacked([jax.tree.leaves(row[1]) for row in rows])


def _at_least_float32(tree: Any) -> Any:
    """Widens bfloat16 and float16 leaves: eight bits are too few for a product of hundreds of matrices."""

    def widen(leaf: Any) -> Any:
        dtype = jnp.result_type(leaf)
        narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
        return jnp.asarray(leaf, jnp.float32) if narrow else leaf

    return jax.tree.map(widen, tree)


def _rank_to(array: Array, rank: int) -> Array:
    return array.reshape((1,) * (rank - array.ndim) + array.shape)
