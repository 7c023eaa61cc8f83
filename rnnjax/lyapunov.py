"""Lyapunov exponents: average growth rates of a trajectory's perturbations, in nats per step.

Exponents come from QR sums (Benettin et al. 1980): an orthonormal frame is carried along by the Jacobians and made
orthonormal again at each step, J_t Q_{t−1} = Q_t R_t; exponent i is the average of log|R_ii|. These sums converge to
the exponents as T → ∞, but they are not the log singular values of the finite product: see ``singular_values``.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from rnnjax import lapack, validation
from rnnjax.cells import Cell
from rnnjax.jacobians import Jacobians, jacobian_operator
from rnnjax.typing import Array, Carry, Key, Params
from rnnjax.unroll import trajectory

_NUM_BATCH_MEANS = 20


@flax.struct.dataclass
class LyapunovResult:
    """Lyapunov exponents of a trajectory and what they rest on.

    Attributes:
      exponents: ``[..., k]`` nats per step, descending; −inf where rank is lost.
      standard_errors: ``[..., k]`` nats per step, from the means of up to 20 consecutive blocks (batch means), which
        allows for the correlation of neighbouring steps; NaN with fewer than 2 steps, or where rank is lost.
      convergence_drift: ``[..., k]`` nats per step, exponents of the second half minus those of all steps; NaN where
        rank is lost.
      kaplan_yorke_dimension: ``[...]``, the dimension of the attractor (Kaplan & Yorke 1979); NaN when the exponents
        computed do not suffice, S when all S of them do not sum to less than 0.
      local_exponents: ``[T', ..., k]`` nats, log|R_ii| of each step after the transient.
    """

    exponents: Array
    standard_errors: Array
    convergence_drift: Array
    kaplan_yorke_dimension: Array
    local_exponents: Array


def lyapunov_spectrum(
    cell: Cell,
    params: Params,
    inputs: Any,
    carry: Carry | None = None,
    *,
    num_exponents: int | None = None,
    num_transient: int = 0,
    key: Key | None = None,
) -> LyapunovResult:
    """Returns the leading Lyapunov exponents of a driven recurrent network.

    Args:
      cell: any cell.
      params: its weights.
      inputs: ``[T, ..., D]``, time-major; zeros for an autonomous network.
      carry: the carry before the first step; ``cell.initialize_carry`` by default.
      num_exponents: k, at most the state size S; all S by default.
      num_transient: steps at the start in which state and frame settle, and which do not count.
      key: random key of the frame's start; a fixed one by default.

    Returns:
      The ``LyapunovResult``.

    Raises:
      ValueError: inputs or weights that ``unroll`` would refuse, ``num_exponents`` not in [1, S],
        ``num_transient`` not in [0, T); a state or Jacobian that is not finite, with its step.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> cell = rnnjax.VanillaCell(3, activation="identity", recurrent_initializer=rnnjax.initializers.Orthogonal(2.0))
      >>> params = cell.init(jax.random.key(0), input_size=1)
      >>> result = lyapunov_spectrum(cell, params, jnp.zeros((50, 1)))
      >>> print(result.exponents.round(3))  # ln 2
      [0.693 0.693 0.693]

    Source: G. Benettin et al., Lyapunov characteristic exponents for smooth dynamical systems, Meccanica 15, 1980;
    R. Engelken, F. Wolf & L. F. Abbott, Lyapunov spectra of chaotic recurrent neural networks, 2023.
    """
    cell.check(params, inputs, carry)
    num_steps = jax.tree.leaves(inputs)[0].shape[0]
    size = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(cell.initialize_carry)))
    count = size if num_exponents is None else validation.integer_between("num_exponents", num_exponents, 1, size)
    validation.integer_between("num_transient", num_transient, 0, num_steps - 1)
    jacobians = jacobian_operator(cell, params, trajectory(cell, params, inputs, carry))
    frame = random_frame(jax.random.key(0) if key is None else key, jacobians, count)
    _, local = frame_growth(jacobians, frame)
    return _summarized(local[num_transient:], size)


def kaplan_yorke_dimension(exponents: Array, state_size: int | None = None) -> Array:
    """Returns the Kaplan–Yorke dimension j + Σ_{i≤j} λ_i / |λ_{j+1}|.

    Here j is the largest number of leading exponents whose sum is not negative.

    Args:
      exponents: ``[..., k]``, descending.
      state_size: S, if known: with all S exponents and a sum that never becomes negative, the dimension is S.

    Returns:
      ``[...]``; NaN where the sum never becomes negative and more exponents are needed.

    Example:
      >>> import jax.numpy as jnp
      >>> print(f"{kaplan_yorke_dimension(jnp.array([0.9056, 0.0, -14.5723])):.3f}")
      2.062

    Source: J. L. Kaplan & J. A. Yorke, Chaotic behavior of multidimensional difference equations, 1979.
    """
    sums = jnp.cumsum(exponents, axis=-1)
    below = jnp.argmax(sums < 0, axis=-1, keepdims=True)
    previous = jnp.where(below > 0, jnp.take_along_axis(sums, jnp.maximum(below - 1, 0), axis=-1), 0)
    next_exponent = jnp.take_along_axis(exponents, below, axis=-1)
    dimension = below.astype(exponents.dtype) + previous / jnp.abs(next_exponent)
    most = float(exponents.shape[-1]) if exponents.shape[-1] == state_size else jnp.nan
    whole_space = jnp.where(sums[..., -1] >= 0, most, jnp.nan)
    return jnp.where(jnp.any(sums < 0, axis=-1), dimension[..., 0], whole_space)


def finite_time_exponents(jacobians: Jacobians, num_exponents: int, key: Key | None = None) -> Array:
    """Returns the leading finite-time exponents log σ_i(J_T … J_1) / T of a sequence.

    One round of subspace iteration: a random frame is carried back through J_Tᵀ … J_1ᵀ, where it turns to the leading
    right singular vectors of the product, and from there forward, where the growth of each direction is taken. The
    values are exact up to the square of the gap ratios σ_{i+1}/σ_i, which shrink as T grows; where singular values
    cluster they are not, and ``log_singular_values`` is the function to use.

    Args:
      jacobians: the step Jacobians, from ``jacobian_operator``.
      num_exponents: k, at most S.
      key: random key of the frame's start; a fixed one by default.

    Returns:
      ``[..., k]`` nats per step, descending.

    Raises:
      ValueError: ``num_exponents`` not in [1, S].

    Example:
      >>> import jax.numpy as jnp
      >>> from rnnjax.jacobians import DenseJacobians
      >>> steps = DenseJacobians(jnp.stack([jnp.array([[2.0, 1.0], [1.0, 1.0]])] * 50))
      >>> [f"{exponent:.4f}" for exponent in finite_time_exponents(steps, 2)]  # ± log of the squared golden ratio
      ['0.9624', '-0.9624']

    Source: H. Rutishauser, Simultaneous iteration method for symmetric matrices, Numerische Mathematik 16, 1970,
    applied to (J_T … J_1)ᵀ (J_T … J_1).
    """
    count = validation.integer_between("num_exponents", num_exponents, 1, jacobians.shape[-1])
    frame = random_frame(jax.random.key(0) if key is None else key, jacobians, count)
    frame, _ = frame_growth(jacobians, frame, backward=True)
    _, local = frame_growth(jacobians, frame)
    return -jnp.sort(-local.mean(axis=0), axis=-1)


def random_frame(key: Key, jacobians: Jacobians, count: int) -> Array:
    """Returns random orthonormal columns, the same for every sequence.

    Args:
      key: random key.
      jacobians: the step Jacobians the frame is for, ``[T, ..., S, S]``; its shape and dtype are used.
      count: number of columns k, at most S.

    Returns:
      ``[..., S, k]``, uniformly distributed over the k-frames of the space but for the signs of columns.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnnjax.jacobians import DenseJacobians
      >>> frame = random_frame(jax.random.key(0), DenseJacobians(jnp.ones((5, 3, 4, 4))), 2)
      >>> frame.shape, bool(jnp.allclose(frame[0].T @ frame[0], jnp.eye(2), atol=1e-6))
      ((3, 4, 2), True)
    """
    *batch_shape, size, _ = jacobians.shape[1:]
    columns = jnp.linalg.qr(jax.random.normal(key, (size, count), jacobians.dtype))[0]
    return jnp.broadcast_to(columns.reshape((1,) * len(batch_shape) + columns.shape), (*batch_shape, *columns.shape))


def frame_growth(jacobians: Jacobians, frame: Array, *, backward: bool = False) -> tuple[Array, Array]:
    """Carries an orthonormal frame along, by J_t forward in time or by J_tᵀ backward: J_t Q_{t−1} = Q_t R_t.

    Args:
      jacobians: the step Jacobians, from ``jacobian_operator``.
      frame: orthonormal columns ``[..., S, k]``.
      backward: from the last step to the first, with transposed Jacobians.

    Returns:
      The last frame ``[..., S, k]``, and log|R_ii| of each step in nats, ``[T, ..., k]``, entry t that of J_t.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnnjax.jacobians import DenseJacobians
      >>> steps = DenseJacobians(jnp.stack([jnp.diag(jnp.array([2.0, 0.5]))] * 3))
      >>> _, growth = frame_growth(steps, jnp.eye(2))
      >>> print(growth.sum(axis=0).round(3))  # 3 ln 2 and 3 ln ½
      [ 2.079 -2.079]

    Source: G. Benettin et al., Lyapunov characteristic exponents for smooth dynamical systems, Meccanica 15, 1980.
    """
    return _frame_growth(jacobians, frame, backward)


@jax.jit(static_argnames="backward")
def _frame_growth(jacobians: Jacobians, frame: Array, backward: bool) -> tuple[Array, Array]:
    def step(frame: Array, time: Array) -> tuple[Array, Array]:
        jacobian = jacobians.at_step(time)
        frame, triangle = lapack.qr(jacobian.transpose_times(frame) if backward else jacobian.times(frame))
        return frame, jnp.log(jnp.abs(jnp.diagonal(triangle, axis1=-2, axis2=-1)))

    return jax.lax.scan(step, frame, jnp.arange(jacobians.shape[0]), reverse=backward)


def _summarized(local: Array, state_size: int) -> LyapunovResult:
    mean = local.mean(axis=0)
    order = jnp.argsort(-mean, axis=-1)
    local = jnp.take_along_axis(local, jnp.broadcast_to(order[None], local.shape), axis=-1)
    exponents = local.mean(axis=0)
    return LyapunovResult(
        exponents=exponents,
        standard_errors=_standard_errors(local),
        convergence_drift=local[len(local) // 2 :].mean(axis=0) - exponents,
        kaplan_yorke_dimension=kaplan_yorke_dimension(exponents, state_size),
        local_exponents=local,
    )


def _standard_errors(local: Array) -> Array:
    """Standard error of the mean over axis 0 by batch means; steps that fill no block count in the mean alone."""
    num_blocks = min(_NUM_BATCH_MEANS, len(local))
    if num_blocks < 2:
        return jnp.full(local.shape[1:], jnp.nan, local.dtype)
    length = len(local) // num_blocks
    means = local[-num_blocks * length :].reshape(num_blocks, length, *local.shape[1:]).mean(axis=1)
    return means.std(axis=0, ddof=1) * (length / len(local)) ** 0.5
