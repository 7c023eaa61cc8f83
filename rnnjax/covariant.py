"""Covariant Lyapunov vectors: the directions that grow at each exponent's own rate, and the angles between them.

Forward in time J_t Q_{t−1} = Q_t R_t. Vectors V_t = Q_t C_t with triangular coefficients C_t stay covariant if
C_{t−1} ∝ R_t^{−1} C_t; backward in time any start turns to them, as the frame turns to the Oseledets flags forward.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rnnjax import lapack, validation
from rnnjax.cells import Cell
from rnnjax.frames import certainly_lost, random_frame
from rnnjax.jacobians import jacobian_operator
from rnnjax.operators import Jacobians
from rnnjax.typing import Array, Carry, Key, Params
from rnnjax.unroll import trajectory


@flax.struct.dataclass
class CovariantVectors:
    """Covariant Lyapunov vectors of the states s_t after each of the T' steps between the two transients.

    Attributes:
      vectors: ``[T', ..., S, k]``, unit columns v_i, each up to its sign, in the order of the frame that led to them:
        descending exponents, once it has settled.
      coefficients: ``[T', ..., k, k]``, upper triangular: the same vectors in the orthonormal basis of the frame.
      local_exponents: ``[T', ..., k]`` nats, log‖J_t v_i‖ of the step that leads to s_t, v_i those of s_{t−1}.
      exponents: ``[..., k]`` nats per step, the averages of these.
    """

    vectors: Array
    coefficients: Array
    local_exponents: Array
    exponents: Array

    def cosines(self) -> Array:
        """Returns |v_i · v_j| of every pair at each step, ``[T', ..., k, k]``."""
        transposed = jnp.swapaxes(self.coefficients, -1, -2)
        return jnp.minimum(jnp.abs(jnp.matmul(transposed, self.coefficients, precision="highest")), 1)

    def angles(self) -> Array:
        """Returns the angle between the lines of every pair at each step, ``[T', ..., k, k]`` radians in [0, π/2].

        By the sine where it is small, θ = atan2(‖v_j − (v_i·v_j) v_i‖, |v_i·v_j|): the cosine of a small angle has lost
        half its digits.
        """
        first, second = self.coefficients[..., :, :, None], self.coefficients[..., :, None, :]
        cosine = (first * second).sum(axis=-3)
        rest = second - cosine[..., None, :, :] * first
        return jnp.arctan2(jnp.sqrt(jnp.square(rest).sum(axis=-3)), jnp.abs(cosine))

    def smallest_angle(self, num_expanding: int) -> Array:
        """Returns the angle between the span of the first vectors and that of the others at each step.

        Near 0 the expanding and the contracting directions are tangent: the dynamics is not hyperbolic. The sine is the
        smallest singular value of what the others have outside the first columns of the frame, which span what the
        first vectors do.

        Args:
          num_expanding: number of vectors in the first span, such as that of positive exponents; in [1, k).

        Returns:
          ``[T', ...]`` radians in [0, π/2].

        Raises:
          ValueError: ``num_expanding`` not in [1, k).
        """
        count = self.coefficients.shape[-1]
        first = validation.integer_between("num_expanding", num_expanding, 1, count - 1)
        others, _ = lapack.qr(self.coefficients[..., first:])

        def angle(basis: Array) -> Array:
            largest_cosine = jnp.linalg.svd(basis[:first], compute_uv=False)[0]
            return jnp.arctan2(jnp.linalg.svd(basis[first:], compute_uv=False)[-1], largest_cosine)

        return lapack.over_batch(angle, others, others.ndim - 2)


def covariant_vectors(
    cell: Cell,
    params: Params,
    inputs: Any,
    carry: Carry | None = None,
    *,
    num_exponents: int | None = None,
    num_transient: int = 0,
    num_backward_transient: int = 0,
    key: Key | None = None,
) -> CovariantVectors:
    """Returns the covariant Lyapunov vectors v_i(t), J_t v_i(t−1) ∝ v_i(t), along a trajectory.

    Memory is T (S k + k²): the frame of every step is kept.

    Args:
      cell: any cell.
      params: its weights.
      inputs: ``[T, ..., D]``, time-major; zeros for an autonomous network.
      carry: the carry before the first step; ``cell.initialize_carry`` by default.
      num_exponents: k, at most the state size S; all S by default.
      num_transient: steps at the start in which state and frame settle; no vectors are returned for them.
      num_backward_transient: steps at the end in which the vectors settle, backward; none are returned for them.
      key: random key of both starts; a fixed one by default.

    Returns:
      The ``CovariantVectors``, for T' = T − num_transient − num_backward_transient steps.

    Raises:
      ValueError: inputs or weights that ``unroll`` would refuse; ``num_exponents`` not in [1, S]; transients that leave
        no step; a state or Jacobian that is not finite, or one whose rank is lost, with its step.

    Example:
      >>> import jax.numpy as jnp, rnnjax
      >>> matrix = jnp.array([[2.0, 1.0], [0.0, 0.5]])  # eigenvectors (1, 0) and (2, −3)
      >>> cell = rnnjax.StepCell(lambda matrix, h, x: (matrix @ h, h), example_carry=jnp.zeros(2))
      >>> options = dict(num_transient=20, num_backward_transient=20)
      >>> result = covariant_vectors(cell, matrix, jnp.zeros((50, 1)), **options)
      >>> print(jnp.abs(result.vectors[0]).round(3))
      [[1.    0.555]
       [0.    0.832]]

    Source: F. Ginelli et al., Characterizing dynamics with covariant Lyapunov vectors, Phys. Rev. Letters 99, 2007.
    """
    cell.check(params, inputs, carry)
    length = jax.tree.leaves(inputs)[0].shape[0]
    size = cell.state_size
    count = size if num_exponents is None else validation.integer_between("num_exponents", num_exponents, 1, size)
    start = validation.integer_between("num_transient", num_transient, 0, length - 1)
    last = length - 1 - start
    settle = validation.integer_between("num_backward_transient", num_backward_transient, 0, last)
    jacobians = jacobian_operator(cell, params, trajectory(cell, params, inputs, carry))
    frame_key, start_key = jax.random.split(jax.random.key(0) if key is None else key)
    frame = random_frame(frame_key, jacobians, count)
    end = jnp.triu(jax.random.normal(start_key, (count, count), frame.dtype))
    frames, triangles = _frames(jacobians, frame)
    _check_rank(triangles)
    coefficients, growth = _turned_back(triangles[start:], end)
    kept = slice(0, length - start - settle)
    vectors = jnp.matmul(frames[start:][kept], coefficients[kept], precision="highest")
    return CovariantVectors(vectors, coefficients[kept], growth[kept], growth[kept].mean(axis=0))


@jax.jit
def _frames(jacobians: Jacobians, frame: Array) -> tuple[Array, Array]:
    """Q_t ``[T, ..., S, k]`` and R_t ``[T, ..., k, k]`` of every step."""

    def step(frame: Array, time: Array) -> tuple[Array, tuple[Array, Array]]:
        columns = jacobians.at_step(time).times(frame)
        frame, triangle = lapack.qr(columns)
        return frame, (frame, jnp.where(certainly_lost(columns)[..., None, :], 0, triangle))

    return jax.lax.scan(step, frame, jnp.arange(jacobians.shape[0]))[1]


@jax.jit
def _turned_back(triangles: Array, end: Array) -> tuple[Array, Array]:
    """C_t with unit columns, and log‖J_t v_i(t−1)‖ = −log‖R_t^{−1} c_i(t)‖, from the last step to the first."""

    def step(after: Array, triangle: Array) -> tuple[Array, tuple[Array, Array]]:
        # Column j is at most about 1 / min |R_ii|, i ≤ j, long; times that nothing overflows.
        scales = jax.lax.cummin(jnp.abs(jnp.diagonal(triangle, axis1=-2, axis2=-1)), axis=triangle.ndim - 2)
        before, lengths = _unit_columns(_solved(triangle, after * scales[..., None, :]))
        return before, (after, jnp.log(scales) - jnp.log(lengths))

    start, _ = _unit_columns(
        jnp.broadcast_to(end.reshape((1,) * (triangles.ndim - 3) + end.shape), triangles.shape[1:])
    )
    return jax.lax.scan(step, start, triangles, reverse=True)[1]


def _unit_columns(columns: Array) -> tuple[Array, Array]:
    lengths = jnp.linalg.norm(columns, axis=-2)
    return columns / lengths[..., None, :], lengths


def _solved(triangle: Array, right: Array) -> Array:
    """R^{−1} C for each matrix of a batch."""
    return lapack.over_batch(
        lambda pair: jax.scipy.linalg.solve_triangular(*pair), (triangle, right), triangle.ndim - 2
    )


def _check_rank(triangles: Array) -> None:
    if validation.is_concrete(triangles):
        lost = np.asarray(jnp.any(jnp.diagonal(triangles, axis1=-2, axis2=-1) == 0, axis=-1))
        if lost.any():
            step = int(np.argwhere(lost)[0][0])
            raise ValueError(f"step Jacobian must keep the rank of the frame, got a loss at time step {step}")
