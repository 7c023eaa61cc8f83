"""Where the gradient of the loss comes from: how far back the weights were used that it changes.

A loss L(o_1, …, o_T) reaches the weights θ through every output o_τ and, from there, through every step t ≤ τ:

    dL/dθ = Σ_lag g_lag,        g_lag = Σ_τ (∂L/∂o_τ) (∂o_τ/∂s_t) (∂⁺s_t/∂θ)  with t = τ − lag,

∂⁺ being the derivative of one step alone. All τ go back together, one lag at a time, each by the transposed derivative
of the step it has arrived at; nothing is kept of a lag but its share of the gradient and its norm.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rnnjax import validation
from rnnjax.cells import AffineCell, Cell
from rnnjax.meshes import check_not_spread
from rnnjax.typing import Array, Carry, Params
from rnnjax.unroll import Trajectory, trajectory, unroll

_CHUNK = 2**17
"""Numbers of one kind (states, or pre-activations of one gate) that a chunk of loss steps may take up."""


@flax.struct.dataclass
class GradientFlow:
    """The gradient of a loss, through time.

    Attributes:
      loss: L, a scalar.
      hidden_gradients: ∂L/∂h_t, ``[T, ..., H]``; for a ``StepCell`` ∂L/∂s_t by way of later steps, a pytree like the
        carry with leaves ``[T, ..., ...]``.
      gradient: dL/dθ, like the weights.
      share_by_lag: ⟨g_lag, dL/dθ⟩ / ‖dL/dθ‖², signed, ``[T]``, entry i that of lag i; sums to 1.
        NaN for a zero gradient.
      norm_by_lag: ‖g_lag‖₂, ``[T]``.
      parameter_share_by_lag: the same share of each weight array's own gradient, a pytree like the weights of ``[T]``.
      parameter_norm_by_lag: the norm of each weight array's own part, a pytree like the weights of ``[T]``.
    """

    loss: Array
    hidden_gradients: Any
    gradient: Params
    share_by_lag: Array
    norm_by_lag: Array
    parameter_share_by_lag: Any
    parameter_norm_by_lag: Any

    def memory_horizon(self, share: float = 0.9) -> int:
        """Returns the smallest lag from which on the shares gathered, Σ_{i ≤ lag} share_i, stay at ``share`` or above.

        Args:
          share: of the whole gradient, in (0, 1].

        Returns:
          A lag in steps; −1 where the gradient is zero.

        Raises:
          ValueError: a share out of range.

        Example:
          >>> import jax.numpy as jnp
          >>> shares = jnp.array([0.6, 0.4, -0.2, 0.2])
          >>> GradientFlow(*[jnp.zeros(0)] * 3, shares, *[jnp.zeros(0)] * 3).memory_horizon(0.9)
          3
        """
        validation.number_between("share", share, 0, 1, open_low=True)
        gathered = np.cumsum(np.asarray(self.share_by_lag, np.float64))
        if np.isnan(gathered).any():
            return -1
        # Shares of float32 sum to 1 within rounding only.
        below = np.flatnonzero(gathered < share - 1e-5)
        return int(below[-1]) + 1 if below.size else 0


def gradient_flow(
    cell: Cell,
    params: Params,
    inputs: Any,
    loss_fn: Callable[[Any], Array],
    carry: Carry | None = None,
    *,
    lengths: Array | None = None,
    resets: Array | None = None,
    truncation: int | None = None,
) -> GradientFlow:
    """Splits the gradient of a loss by the lag between the loss and the use of the weights.

        dL/dθ = Σ_lag g_lag,        g_lag = Σ_τ (∂L/∂o_τ) (∂o_τ/∂s_{τ−lag}) (∂⁺s_{τ−lag}/∂θ)

    Time grows with the number K of steps whose output the loss depends on (found out, except under ``jit``: there K =
    T) times T; memory is the states, plus K states on their way back, plus what a step's derivative takes in chunks of
    at most 2¹⁷ numbers a gate: it does not grow with T · K.

    Args:
      cell: any cell whose carry and weights are floating point.
      params: its weights θ.
      inputs: ``[T, ..., D]``, time-major.
      loss_fn: takes the outputs ``[T, ..., H]``; returns the loss, a scalar, or one loss a step, ``[T]``, to be summed.
      carry: the carry before the first step; ``cell.initialize_carry`` by default.
      lengths: as for ``unroll``.
      resets: as for ``unroll``; no gradient crosses them.
      truncation: as for ``unroll``; no gradient crosses the start of a window.

    Returns:
      The ``GradientFlow``.

    Raises:
      ValueError: what ``unroll`` refuses; carries, weights or outputs that are not floating point; a loss that is
        neither a scalar nor ``[T]``, or not finite.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> cell = rnnjax.VanillaCell(4)
      >>> params = cell.init(jax.random.key(0), input_size=2)
      >>> flow = gradient_flow(cell, params, jnp.ones((20, 3, 2)), lambda outputs: jnp.sum(outputs[-1] ** 2))
      >>> flow.share_by_lag.shape, f"{flow.share_by_lag.sum():.4f}", flow.hidden_gradients.shape
      ((20,), '1.0000', (20, 3, 4))

    Source: R. Pascanu et al., On the difficulty of training recurrent neural networks, ICML 2013, equations 3–5, summed
    by lag.
    """
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function of the outputs, got {loss_fn!r}")
    check_not_spread("inputs", inputs)
    controls: dict[str, Any] = {"lengths": lengths, "resets": resets}
    with jax.default_matmul_precision("highest"):
        _, outputs = unroll(cell, params, inputs, carry, truncation=truncation, **controls)
        path = trajectory(cell, params, inputs, carry, **controls)
        _check_floating(params=params, carry=path.carries, outputs=outputs)
        loss, cotangent = jax.value_and_grad(functools.partial(_total, loss_fn, path))(outputs)
        validation.finite("loss", loss)
        hidden, gradient = _backward(cell, params, inputs, carry, cotangent, truncation, controls)
        steps = _loss_steps(cotangent)
        by_lag = _by_lag(cell, params, path, gradient, cotangent, steps, truncation)
    return GradientFlow(loss, hidden, gradient, *_summarized(by_lag, gradient))


def _total(loss_fn: Callable[[Any], Array], path: Trajectory, outputs: Any) -> Array:
    losses = jnp.asarray(loss_fn(outputs))
    num_steps = jax.tree.leaves(path.inputs)[0].shape[0]
    if losses.shape not in ((), (num_steps,)):
        raise ValueError(f"loss_fn must return a scalar or one loss a step [{num_steps}], got shape {losses.shape}")
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(f"loss_fn must return a floating-point loss, got dtype {losses.dtype}")
    return losses.sum()


def _check_floating(**trees: Any) -> None:
    for name, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                where = name + jax.tree_util.keystr(path)
                raise ValueError(f"{where} must be floating point to have a gradient, got {jnp.result_type(leaf)}")


def _loss_steps(cotangent: Any) -> Array:
    """Returns the steps whose outputs the loss depends on, int32 ``[K]``; all of them where that cannot be seen."""
    leaves = jax.tree.leaves(cotangent)
    if not all(validation.is_concrete(leaf) for leaf in leaves):
        return jnp.arange(leaves[0].shape[0], dtype=jnp.int32)
    used = np.logical_or.reduce([np.asarray(leaf != 0).reshape(len(leaf), -1).any(axis=1) for leaf in leaves])
    return jnp.asarray(np.flatnonzero(used) if used.any() else [0], jnp.int32)


@functools.partial(jax.jit, static_argnames="truncation")
def _backward(
    cell: Cell,
    params: Params,
    inputs: Any,
    carry: Carry | None,
    cotangent: Any,
    truncation: int | None,
    controls: dict[str, Any],
) -> tuple[Any, Params]:
    """Returns the hidden gradients and the whole gradient, from one backward pass."""
    leading = (jax.tree.leaves(inputs)[0].shape[0], *cell.batch_shape(inputs))
    zeros: Any = cell.initialize_carry(leading, cell.carry_dtype(params))
    if isinstance(cell, AffineCell):
        zeros = jnp.zeros_like(cell.hidden(zeros))
    zeros = jax.tree.map(jnp.zeros_like, zeros)

    def run(params: Params, perturbations: Any) -> Any:
        return unroll(cell, params, inputs, carry, truncation=truncation, perturbations=perturbations, **controls)[1]

    gradient, hidden = jax.vjp(run, params, zeros)[1](cotangent)
    return hidden, gradient


@functools.partial(jax.jit, static_argnames="truncation")
def _by_lag(
    cell: Cell,
    params: Params,
    path: Trajectory,
    gradient: Params,
    cotangent: Any,
    loss_steps: Array,
    truncation: int | None,
) -> tuple[Any, Any]:
    """Returns ⟨g_lag, dL/dθ⟩ and ‖g_lag‖ of every weight array, each ``[T]``."""
    starts = path.starts(cell)
    num_steps, chunks = jax.tree.leaves(path.inputs)[0].shape[0], _chunks(path, loss_steps)
    severed = _severed(path, truncation)

    def back(lag: Array, step: Array, arriving: Carry) -> tuple[Params, Carry]:
        """Takes one chunk of loss steps, arrived at ``step − lag``, through the step there."""
        time = step - lag
        valid, time = time >= 0, jnp.maximum(time, 0)
        states, own, entering, cut = jax.tree.map(lambda leaf: leaf[time], (starts, path.inputs, cotangent, severed))
        if path.active is not None:
            entering = _masked(path.active[time], entering)
        entering = _masked(valid & (lag == 0), entering)

        def run(params: Params, carry: Carry) -> tuple[Carry, Any]:
            return cell.step(params, carry, cell.prepare_inputs(params, own))

        part, leaving = jax.vjp(run, params, states)[1]((_masked(valid, arriving), entering))
        return part, _masked(~cut, leaving)

    def at_lag(arriving: Carry, lag: Array) -> tuple[Carry, tuple[Any, Any]]:
        def chunk(total: Params, xs: tuple[Array, Carry]) -> tuple[Params, Carry]:
            def pending() -> tuple[Params, Carry]:
                part, leaving = back(lag, *xs)
                return jax.tree.map(jnp.add, total, part), leaving

            # A chunk ends when even its last loss step has gone back to the start.
            return jax.lax.cond(xs[0].max() >= lag, pending, lambda: (total, xs[1]))

        part, leaving = jax.lax.scan(chunk, jax.tree.map(jnp.zeros_like, params), (chunks, arriving))
        along = jax.tree.map(lambda a, b: jnp.sum(a * b), part, gradient)
        return leaving, (along, jax.tree.map(lambda a: jnp.sqrt(jnp.sum(a**2)), part))

    zeros = jax.tree.map(lambda leaf: jnp.zeros((*chunks.shape, *leaf.shape[1:]), leaf.dtype), starts)
    return jax.lax.scan(at_lag, zeros, jnp.arange(num_steps, dtype=jnp.int32))[1]


def _chunks(path: Trajectory, loss_steps: Array) -> Array:
    """Returns the loss steps ``[number of chunks, size of a chunk]``; those that fill the last chunk up are −1."""
    size_of_one = sum(leaf[0].size for leaf in jax.tree.leaves(path.carries))
    size = min(len(loss_steps), max(1, _CHUNK // max(size_of_one, 1)))
    filling = -len(loss_steps) % size
    return jnp.concatenate([loss_steps, jnp.full(filling, -1, jnp.int32)]).reshape(-1, size)


def _severed(path: Trajectory, truncation: int | None) -> Array:
    """Returns where no gradient passes from a step to those before it, bool ``[T]`` or ``[T, ...]``."""
    steps = jnp.arange(jax.tree.leaves(path.inputs)[0].shape[0])
    window = jnp.zeros(len(steps), bool) if truncation is None else steps % truncation == 0
    if path.resets is None:
        return window
    return path.resets | window.reshape(-1, *(1,) * (path.resets.ndim - 1))


def _masked(keep: Array, tree: Any) -> Any:
    """Zeros where ``keep`` is false, a condition over the leading axes."""

    def mask(leaf: Array) -> Array:
        return jnp.where(keep.reshape(keep.shape + (1,) * (leaf.ndim - keep.ndim)), leaf, jnp.zeros_like(leaf))

    return jax.tree.map(mask, tree)


@jax.jit
def _summarized(by_lag: tuple[Any, Any], gradient: Params) -> tuple[Array, Array, Any, Any]:
    along, norms = by_lag
    squares = jax.tree.map(lambda leaf: jnp.sum(leaf**2), gradient)
    share = jax.tree.reduce(jnp.add, along) / jax.tree.reduce(jnp.add, squares)
    norm = jnp.sqrt(sum(leaf**2 for leaf in jax.tree.leaves(norms)))
    return share, norm, jax.tree.map(jnp.divide, along, squares), norms
