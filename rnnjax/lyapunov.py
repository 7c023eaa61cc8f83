"""Lyapunov exponents: average growth rates of a trajectory's perturbations, in nats per step.

A frame is carried along by the Jacobians and made orthonormal again, J_t Q_{t−1} = Q_t R_t; exponent i is the average
of log|R_ii| (Benettin et al. 1980) as T → ∞. For finite T it is not the log of a singular value of the product: see
``singular_values``.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rnnjax import validation
from rnnjax.cells import Cell, CellParams
from rnnjax.frames import block_growth, random_frame
from rnnjax.jacobians import jacobian_operator
from rnnjax.operators import Jacobians
from rnnjax.typing import Array, Carry, Key, Params
from rnnjax.unroll import trajectory

_NUM_BATCH_MEANS = 20


@flax.struct.dataclass
class LyapunovResult:
    """Lyapunov exponents of a trajectory, what they rest on, and where the run stopped.

    Standard errors are by batch means over up to 20 groups of blocks, which allows for the correlation of neighbouring
    steps; NaN with fewer than 2 full blocks, or where rank is lost. No gradient passes through them.

    Attributes:
      exponents: ``[..., k]`` nats per step, descending; −inf where rank is lost.
      standard_errors: ``[..., k]`` nats per step.
      convergence_drift: ``[..., k]`` nats per step, exponents of the second half of the blocks minus those of all; NaN
        where rank is lost.
      kaplan_yorke_dimension: ``[...]``, the dimension of the attractor (Kaplan & Yorke 1979); NaN when the exponents
        computed do not suffice, S when all S of them do not sum to less than 0.
      kaplan_yorke_standard_error: ``[...]``, to first order in the errors of the exponents.
      entropy_rate: ``[...]`` nats per step, the sum of the positive exponents (Pesin 1977); NaN when the exponents
        computed do not suffice.
      entropy_rate_standard_error: ``[...]`` nats per step.
      local_exponents: ``[M, ..., k]`` nats per step, averages over blocks of steps.
      block_logs: ``[M, ..., k]`` nats, Σ log|R_ii| of each block, by column of the frame.
      frame: ``[..., S, k]``, orthonormal, after the last step.
      carry: the carry after the last step.
      num_steps: steps that count.
      block_length: steps in a block; the last may hold fewer.
    """

    exponents: Array
    standard_errors: Array
    convergence_drift: Array
    kaplan_yorke_dimension: Array
    kaplan_yorke_standard_error: Array
    entropy_rate: Array
    entropy_rate_standard_error: Array
    local_exponents: Array
    block_logs: Array
    frame: Array
    carry: Carry
    num_steps: int = flax.struct.field(pytree_node=False)
    block_length: int = flax.struct.field(pytree_node=False)


def lyapunov_spectrum(
    cell: Cell,
    params: Params,
    inputs: Any = None,
    carry: Carry | None = None,
    *,
    num_steps: int | None = None,
    num_exponents: int | None = None,
    num_transient: int = 0,
    num_state_transient: int = 0,
    block_length: int | None = None,
    resume: LyapunovResult | None = None,
    key: Key | None = None,
) -> LyapunovResult:
    """Returns the leading Lyapunov exponents of a recurrent network, driven or autonomous.

    Derivatives are those of a QR at every step, at its cost. In chaos they grow with T as perturbations do.

    Args:
      cell: any cell.
      params: its weights.
      inputs: ``[T, ..., D]``, time-major; None for an autonomous network: zeros, of one feature for a ``StepCell``.
      carry: the carry before the first step; ``cell.initialize_carry`` by default. Without inputs and biases that is a
        fixed point of most cells, stable or not, and its exponents are what comes back: give another.
      num_steps: T of an autonomous network.
      num_exponents: k, at most the state size S; all S by default.
      num_transient: steps at the start in which state and frame settle, and which do not count.
      num_state_transient: steps before these in which the state settles alone, without the cost of a frame.
      block_length: steps over which local exponents are averages, 1 for those of each step; a twentieth of the steps
        that count by default.
      resume: a result to continue with more steps, as if it had been one run; it settles all other options.
      key: random key of the frame's start; a fixed one by default.

    Returns:
      The ``LyapunovResult``.

    Raises:
      ValueError: inputs or weights that ``unroll`` would refuse; ``num_exponents`` not in [1, S]; transients that leave
        no step; ``block_length`` not in [1, steps that count]; options that ``resume`` settles; a state or Jacobian
        that is not finite, with its step; growth that overflows.

    Example:
      >>> import jax, rnnjax
      >>> cell = rnnjax.VanillaCell(3, activation="identity", recurrent_initializer=rnnjax.initializers.Orthogonal(2.0))
      >>> params = cell.init(jax.random.key(0), input_size=1)
      >>> print(lyapunov_spectrum(cell, params, num_steps=50).exponents.round(3))  # ln 2
      [0.693 0.693 0.693]

    Source: G. Benettin et al., Lyapunov characteristic exponents for smooth dynamical systems, Meccanica 15, 1980;
    R. Engelken, F. Wolf & L. F. Abbott, Lyapunov spectra of chaotic recurrent neural networks, 2023.
    """
    if resume is not None:
        if not isinstance(resume, LyapunovResult):
            raise ValueError(f"resume must be a LyapunovResult, got {type(resume).__name__}")
        _check_settled(carry, num_exponents, num_transient, num_state_transient, block_length, key)
        carry, block_length = resume.carry, resume.block_length
    inputs = _driving(cell, params, inputs, carry, num_steps)
    cell.check(params, inputs, carry)
    length, size = jax.tree.leaves(inputs)[0].shape[0], cell.state_size
    if num_exponents is not None:
        validation.integer_between("num_exponents", num_exponents, 1, size)
    alone = validation.integer_between("num_state_transient", num_state_transient, 0, length - 1)
    start = alone + validation.integer_between("num_transient", num_transient, 0, length - 1 - alone)
    if block_length is None:
        block_length = max(1, (length - start) // _NUM_BATCH_MEANS)
    elif resume is None:
        validation.integer_between("block_length", block_length, 1, length - start)
    path = trajectory(cell, params, inputs, carry)
    jacobians = jacobian_operator(cell, params, path)
    if resume is None:
        frame = random_frame(jax.random.key(0) if key is None else key, jacobians, num_exponents or size)
    else:
        frame = resume.frame
    num_done = 0 if resume is None else resume.num_steps
    frame, _ = block_growth(jacobians, frame, (alone, start))
    frame, logs = block_growth(jacobians, frame, _boundaries(start, length, block_length, num_done))
    logs = logs if resume is None else _joined(resume, logs)
    _check_growth(logs)
    carry = jax.tree.map(lambda leaf: leaf[-1], path.carries)
    num_steps = num_done + length - start
    return _summarized(logs, size, frame=frame, carry=carry, num_steps=num_steps, block_length=block_length)


def _driving(cell: Cell, params: Params, inputs: Any, carry: Carry | None, num_steps: int | None) -> Any:
    """The inputs, or zeros for an autonomous network."""
    if inputs is not None:
        if num_steps is not None:
            raise ValueError(f"num_steps must be left out where inputs are given, got {num_steps!r}")
        return inputs
    if num_steps is None:
        raise ValueError("inputs must be given, or num_steps for an autonomous network; got neither")
    validation.positive_integer("num_steps", num_steps)
    leaf, example = jax.tree.leaves((carry, 0.0))[0], jax.tree.leaves(jax.eval_shape(cell.initialize_carry))[0]
    batch_shape = jnp.shape(leaf)[: max(jnp.ndim(leaf) - example.ndim, 0)]
    features = params.input_kernel.shape[0] if isinstance(params, CellParams) else 1
    dtype = params.input_kernel.dtype if isinstance(params, CellParams) else example.dtype
    return jnp.zeros((num_steps, *batch_shape, features), dtype)


def _check_settled(carry: Any, num_exponents: Any, num_transient: Any, num_state_transient: Any, *others: Any) -> None:
    given = [option for option in (carry, num_exponents, *others) if option is not None]
    if given or num_transient or num_state_transient:
        raise ValueError("resume settles every option but inputs and num_steps, which alone may be given with it")


def _boundaries(start: int, stop: int, block_length: int, num_done: int) -> tuple[int, ...]:
    """Steps at which blocks begin and end; the first completes one that ``num_done`` earlier steps have begun."""
    return (start, *range(start + block_length - num_done % block_length, stop, block_length), stop)


def _joined(past: LyapunovResult, logs: Array) -> Array:
    """The blocks of an earlier run and those of its continuation, which may begin inside the earlier one's last."""
    before = past.block_logs
    if past.num_steps % past.block_length:
        before, logs = before[:-1], logs.at[0].add(before[-1])
    return jnp.concatenate([before, logs])


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
    falls = jnp.any(sums < 0, axis=-1, keepdims=True)
    below = jnp.argmax(sums < 0, axis=-1, keepdims=True)
    previous = jnp.where(below > 0, jnp.take_along_axis(sums, jnp.maximum(below - 1, 0), axis=-1), 0)
    next_exponent = jnp.where(falls, jnp.take_along_axis(exponents, below, axis=-1), -1)
    dimension = below.astype(exponents.dtype) + previous / jnp.abs(next_exponent)
    most = float(exponents.shape[-1]) if exponents.shape[-1] == state_size else jnp.nan
    whole_space = jnp.where(sums[..., -1] >= 0, most, jnp.nan)
    return jnp.where(falls[..., 0], dimension[..., 0], whole_space)


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
      >>> from rnnjax.operators import DenseJacobians
      >>> steps = DenseJacobians(jnp.stack([jnp.array([[2.0, 1.0], [1.0, 1.0]])] * 50))
      >>> [f"{exponent:.4f}" for exponent in finite_time_exponents(steps, 2)]  # ± log of the squared golden ratio
      ['0.9624', '-0.9624']

    Source: H. Rutishauser, Simultaneous iteration method for symmetric matrices, Numerische Mathematik 16, 1970,
    applied to (J_T … J_1)ᵀ (J_T … J_1).
    """
    count = validation.integer_between("num_exponents", num_exponents, 1, jacobians.shape[-1])
    frame = random_frame(jax.random.key(0) if key is None else key, jacobians, count)
    num_steps = jacobians.shape[0]
    frame, _ = block_growth(jacobians, frame, (0, num_steps), True)
    _, logs = block_growth(jacobians, frame, (0, num_steps))
    return -jnp.sort(-logs[0] / num_steps, axis=-1)


def _summarized(logs: Array, size: int, **rest: Any) -> LyapunovResult:
    num_steps, block_length = rest["num_steps"], rest["block_length"]
    lengths = np.diff(np.minimum(np.arange(len(logs) + 1) * block_length, num_steps))
    order = jnp.argsort(-logs.sum(axis=0), axis=-1)
    ordered = jnp.take_along_axis(logs, jnp.broadcast_to(order[None], logs.shape), axis=-1)
    local = ordered / jnp.asarray(lengths.reshape(-1, *(1,) * (logs.ndim - 1)), logs.dtype)
    exponents, half = ordered.sum(axis=0) / num_steps, len(logs) // 2
    drift = ordered[half:].sum(axis=0) / int(lengths[half:].sum()) - exponents
    error = functools.partial(_standard_errors, num_steps=num_steps, block_length=block_length)
    dimension = functools.partial(kaplan_yorke_dimension, state_size=size)
    entropy_rate = functools.partial(_sum_of_positive, state_size=size)
    return LyapunovResult(
        exponents=exponents,
        standard_errors=error(jax.lax.stop_gradient(local)),
        convergence_drift=jnp.where(jnp.isneginf(exponents), jnp.nan, drift),
        kaplan_yorke_dimension=dimension(exponents),
        kaplan_yorke_standard_error=error(_linear_part(dimension, exponents, local)),
        entropy_rate=entropy_rate(exponents),
        entropy_rate_standard_error=error(_linear_part(entropy_rate, exponents, local)),
        local_exponents=local,
        block_logs=logs,
        **rest,
    )


def _sum_of_positive(exponents: Array, state_size: int) -> Array:
    positive = exponents > 0
    unknown = positive[..., -1] & (exponents.shape[-1] < state_size)
    return jnp.where(unknown, jnp.nan, jnp.where(positive, exponents, 0).sum(axis=-1))


def _linear_part(quantity: Callable[[Array], Array], exponents: Array, local: Array) -> Array:
    """Σ_i ∂quantity/∂λ_i λ_i of each block: its error is that of the quantity, to first order (delta method)."""
    exponents, local = jax.lax.stop_gradient((exponents, local))
    weights = jax.grad(lambda values: quantity(values).sum())(exponents)[None]
    terms = jnp.where(weights == 0, 0, weights * local)  # Lost rank makes no error where it has no weight.
    return jnp.where(jnp.isnan(quantity(exponents))[None], jnp.nan, terms.sum(axis=-1))


def _standard_errors(local: Array, num_steps: int, block_length: int) -> Array:
    """Standard error of the mean over axis 0 by batch means; blocks that fill no batch count in the mean alone."""
    num_full = num_steps // block_length
    num_batches = min(_NUM_BATCH_MEANS, num_full)
    if num_batches < 2:
        return jnp.full(local.shape[1:], jnp.nan, local.dtype)
    length = num_full // num_batches
    batches = local[num_full - num_batches * length : num_full].reshape(num_batches, length, *local.shape[1:])
    return batches.mean(axis=1).std(axis=0, ddof=1) * (length * block_length / num_steps) ** 0.5


def _check_growth(logs: Array) -> None:
    if validation.is_concrete(logs):
        validation.finite_steps("growth of the frame", jnp.where(jnp.isneginf(logs), 0, logs))
