"""Exact per-step Jacobians J_t = ∂s_t/∂s_{t−1}, and their products with vectors.

For an affine cell the state of unit j depends on the other units only through its recurrent pre-activations
r_t = h_{t−1} U, so that with the derivatives of one unit, P_t = ∂s'/∂s and D_t = ∂s'/∂r,

    J_t = P_t + D_t Uᵀ,

for all steps at once, outside the scan. Reverse-mode derivatives of the pointwise function give both.
"""

from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp

from rnnjax import validation
from rnnjax.cells import AffineCell, Cell, CellParams
from rnnjax.meshes import check_not_spread
from rnnjax.operators import Jacobians, LinearizedJacobians, check_finite
from rnnjax.pointwise import PointwiseProgram
from rnnjax.structured import StructuredJacobians
from rnnjax.typing import Array, Carry, Params
from rnnjax.unroll import Trajectory


def jacobian_operator(cell: Cell, params: Params, trajectory: Trajectory) -> Jacobians:
    """Returns every step Jacobian in the cheapest form: the factors of an affine cell, or a linearised step.

    Args:
      cell: any cell.
      params: its weights.
      trajectory: the states and inputs at which to differentiate, T steps.

    Returns:
      ``StructuredJacobians`` or ``LinearizedJacobians``: an object with ``times``, ``transpose_times``, ``dense`` and
      ``at_step``, in the dtype of the states (float32 for narrower ones). No matrix is formed.

    Raises:
      ValueError: a state or a Jacobian that is not finite, with its step; arrays spread over explicit axes of a mesh.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> cell = rnnjax.GRUCell(4)
      >>> params = cell.init(jax.random.key(0), input_size=2)
      >>> jacobians = jacobian_operator(cell, params, rnnjax.trajectory(cell, params, jnp.ones((7, 2))))
      >>> jacobians.shape, jacobians.at_step(6).times(jnp.ones((4, 1))).shape
      ((7, 4, 4), (4, 1))
    """
    check_not_spread("trajectory", trajectory)
    # Not every derivative at NaN is NaN: a ReLU's may be 0.
    validation.finite_steps("state", jax.tree.map(lambda leaf: leaf[1:], trajectory.carries))
    params, trajectory = _at_least_float32((params, trajectory))
    if isinstance(cell, AffineCell):
        jacobians: Jacobians = structured_jacobians(cell, params, trajectory)
    else:
        jacobians = linearized_jacobians(cell, params, trajectory)
    check_finite(jacobians)
    return jacobians


def linearized_jacobians(cell: Cell, params: Params, trajectory: Trajectory) -> LinearizedJacobians:
    """Returns every step Jacobian as a linearised step: products with vectors by ``jax.jvp`` and ``jax.vjp``.

    Args:
      cell: any cell.
      params: its weights.
      trajectory: the states and inputs at which to differentiate, T steps.

    Returns:
      ``LinearizedJacobians`` with leading axes ``[T, ...]``, in the dtype of the states.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> cell = rnnjax.StepCell(lambda params, h, x: (jnp.sin(params * h) + x, h), example_carry=jnp.zeros(2))
      >>> steps = linearized_jacobians(cell, 0.5, rnnjax.trajectory(cell, 0.5, jnp.ones((3, 2))))
      >>> print(steps.at_step(0).times(jnp.ones((2, 1))))  # ½ cos 0
      [[0.5]
       [0.5]]
    """
    _check_real(trajectory.carries)
    before = jax.tree.map(lambda leaf: leaf[:-1], trajectory.carries)
    batch_shape = cell.batch_shape(trajectory.inputs)
    stepped, inputs = cell, trajectory.inputs
    if trajectory.active is not None or trajectory.resets is not None:
        shape = (jax.tree.leaves(before)[0].shape[0], *batch_shape)
        active = jnp.ones(shape, bool) if trajectory.active is None else trajectory.active
        resets = jnp.zeros(shape, bool) if trajectory.resets is None else trajectory.resets
        stepped, inputs = cast(Cell, _Controlled(cell)), (inputs, active, resets)
    return LinearizedJacobians(stepped, params, before, inputs, 1 + len(batch_shape), validation.float64_enabled())


def _check_real(carries: Carry) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(carries):
        if not any(jnp.issubdtype(leaf.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
            name = f"carry{jax.tree_util.keystr(path)}"
            raise ValueError(f"{name} must hold real numbers (a complex one as two), got {leaf.dtype}")


@flax.struct.dataclass
class _Controlled:
    """A cell whose inputs say too whether a step counts, and whether it starts from the initial carry."""

    cell: Any

    def initialize_carry(self) -> Carry:
        return self.cell.initialize_carry()

    def apply(self, params: Params, carry: Carry, inputs: tuple[Any, Array, Array]) -> tuple[Carry, Any]:
        own, active, reset = inputs
        initial = jax.tree.map(lambda new, old: new.astype(old.dtype), self.cell.initialize_carry(), carry)
        start = jax.tree.map(lambda new, old: jnp.where(reset, new, old), initial, carry)
        after, output = self.cell.apply(params, start, own)
        return jax.tree.map(lambda new, old: jnp.where(active, new, old), after, carry), output


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
        before = trajectory.starts(cell)
        from_inputs = cell.prepare_inputs(params, trajectory.inputs)
        recurrent = cell.recurrent_preactivation(params, cell.hidden(before))
    leaves = jax.tree.leaves(before)
    program = PointwiseProgram(cell, leaves[0].shape, leaves[0].dtype, exact=True)
    _, local = program.value_and_derivatives(leaves, from_inputs, recurrent)
    by_carry, by_gate = _controlled(trajectory, local.by_old_carry(), local.by_recurrent())
    gates_alone = cell.num_carries == 1 and trajectory.active is None and not (local.by_carry or local.copies)
    return StructuredJacobians.from_factors(by_carry, by_gate, params.recurrent_kernel, gates_alone=gates_alone)


def _controlled(trajectory: Trajectory, by_carry: Array, by_gate: Array) -> tuple[Array, Array]:
    """Returns the factors of P = 0, D = 0 at resets, and of P = I, D = 0 where a carry stands still."""

    def where(condition: Array, on_true: Array, on_false: Array) -> Array:
        return jnp.where(condition[..., None, None, None], on_true, on_false)

    if trajectory.resets is not None:
        by_carry, by_gate = (where(trajectory.resets, jnp.zeros_like(d), d) for d in (by_carry, by_gate))
    if trajectory.active is not None:
        same = jnp.broadcast_to(jnp.eye(by_carry.shape[-3], dtype=by_carry.dtype)[..., None], by_carry.shape[-3:])
        same = jnp.broadcast_to(same.reshape((1,) * (by_carry.ndim - 3) + same.shape), by_carry.shape)
        by_carry = where(trajectory.active, by_carry, same)
        by_gate = where(trajectory.active, by_gate, jnp.zeros_like(by_gate))
    return by_carry, by_gate


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
    check_not_spread("trajectory", trajectory)
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
    return linearized_jacobians(cell, params, trajectory).dense()


def _at_least_float32(tree: Any) -> Any:
    """Widens bfloat16 and float16 leaves: eight bits are too few for a product of hundreds of matrices."""

    def widen(leaf: Any) -> Any:
        dtype = jnp.result_type(leaf)
        narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
        return jnp.asarray(leaf, jnp.float32) if narrow else leaf

    return jax.tree.map(widen, tree)
