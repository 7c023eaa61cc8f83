"""Differentiable regularisers on the flow of gradients, to be added to a loss.

Both are functions of the weights through the step Jacobians J_t, exact and with their full derivative: gradients equal
finite differences. A step that starts from a reset, and one past the length of its sequence, does not count.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from rnnjax import validation
from rnnjax.cells import Cell
from rnnjax.frames import random_frame
from rnnjax.jacobians import jacobian_operator
from rnnjax.operators import Jacobians
from rnnjax.typing import Array, Carry, Params
from rnnjax.unroll import Trajectory, trajectory


@dataclasses.dataclass(frozen=True)
class VanishingGradientPenalty:
    """Pascanu's Ω: the error on its way back shall keep its norm::

        Ω = mean over t of (‖J_tᵀ δ_t‖² / ‖δ_t‖² − 1)²,        δ_t = ∂L/∂s_t held constant

    over the steps t ≥ 2 of all sequences for which ‖δ_t‖ exceeds ``smallest``, each sequence by itself.

    Attributes:
      weight: factor α on Ω, positive; 2 in the source.
      smallest: norm of δ_t at or below which a step does not count, 0 or above.

    Raises:
      ValueError: a weight that is not positive, a negative ``smallest``.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> cell = rnnjax.VanillaCell(4, activation="identity", recurrent_initializer=rnnjax.initializers.Orthogonal(0.5))
      >>> params = cell.init(jax.random.key(0), input_size=2)
      >>> penalty = VanishingGradientPenalty(weight=1.0)
      >>> print(f"{penalty(cell, params, jnp.ones((9, 2)), hidden_gradients=jnp.ones((9, 4))):.4f}")  # (¼ − 1)²
      0.5625

    Source: R. Pascanu et al., On the difficulty of training recurrent neural networks, ICML 2013, equation 9, with
    squared norms and the mean over the steps that count, as in the authors' code.
    """

    needs_hidden_gradients: ClassVar[bool] = True

    weight: float = 2.0
    smallest: float = 1e-10

    def __post_init__(self) -> None:
        validation.positive_number("weight", self.weight)
        validation.number_between("smallest", self.smallest, 0, float("inf"))

    def __call__(
        self,
        cell: Cell,
        params: Params,
        inputs: Any,
        carry: Carry | None = None,
        *,
        hidden_gradients: Any,
        lengths: Array | None = None,
        resets: Array | None = None,
    ) -> Array:
        """Returns α Ω for one recurrent layer.

        Args:
          cell: any cell.
          params: its weights.
          inputs: ``[T, ..., D]``, time-major.
          carry: the carry before the first step; ``cell.initialize_carry`` by default.
          hidden_gradients: δ, a pytree like the carry with leaves ``[T, ..., H]``: the gradient of the loss with
            respect to the ``perturbations`` of ``unroll``.
          lengths: as for ``unroll``.
          resets: as for ``unroll``.

        Returns:
          A scalar; 0 where no step counts.

        Raises:
          ValueError: what ``trajectory`` refuses, hidden gradients of another shape.
        """
        path = trajectory(cell, params, inputs, carry, lengths=lengths, resets=resets)
        jacobians = jacobian_operator(cell, params, path)
        errors = jax.lax.stop_gradient(_flat("hidden_gradients", hidden_gradients, path)).astype(jacobians.dtype)
        largest = jnp.abs(errors).max(axis=-1, keepdims=True)
        # Scaled, so that no square of an error that has nearly vanished underflows.
        errors = errors / jnp.where(largest > 0, largest, 1)
        squares = jnp.sum(errors**2, axis=-1)
        counted = _linked(path, squares.shape) & (largest[..., 0] * jnp.sqrt(squares) > self.smallest)
        counted &= (jnp.arange(len(counted)) > 0).reshape(-1, *(1,) * (counted.ndim - 1))
        arriving = jnp.sum(jacobians.transpose_times(errors[..., None])[..., 0] ** 2, axis=-1)
        terms = jnp.where(counted, (arriving / jnp.where(counted, squares, 1) - 1) ** 2, 0)
        return self.weight * jnp.sum(terms) / jnp.maximum(jnp.sum(counted, dtype=terms.dtype), 1)


@dataclasses.dataclass(frozen=True)
class GradientFlossing:
    """Gradient flossing: the leading finite-time Lyapunov exponents shall be ``target``::

        mean over i ≤ k of (λ_i − target)²,        λ_i = (1/T) Σ_t log R_ii(t),    J_t Q_{t−1} = Q_t R_t

    with exponents in nats per step, averaged over sequences. It needs no loss and no labels.

    Attributes:
      weight: factor on the penalty, positive.
      num_exponents: how many leading exponents k, at most the state size.
      target: exponent to reach, in nats per step; 0 keeps the norm of gradients.
      num_sequences: how many of the first sequences of a batch to take.
      seed: of the directions Q_0 to start from.

    Raises:
      ValueError: a setting out of range.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> cell = rnnjax.VanillaCell(4, activation="identity", recurrent_initializer=rnnjax.initializers.Orthogonal(0.5))
      >>> params = cell.init(jax.random.key(0), input_size=2)
      >>> print(f"{GradientFlossing(weight=1.0)(cell, params, jnp.ones((9, 2))):.4f}")  # (ln ½)²
      0.4805

    Source: R. Engelken, Gradient flossing: improving gradient descent through dynamic control of Jacobians, NeurIPS
    2023, equation 3.
    """

    needs_hidden_gradients: ClassVar[bool] = False

    weight: float = 1.0
    num_exponents: int = 4
    target: float = 0.0
    num_sequences: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        validation.positive_number("weight", self.weight)
        validation.positive_integer("num_exponents", self.num_exponents)
        validation.number_between("target", self.target, -1e6, 1e6)
        validation.positive_integer("num_sequences", self.num_sequences)
        validation.non_negative_integer("seed", self.seed)

    def __call__(
        self,
        cell: Cell,
        params: Params,
        inputs: Any,
        carry: Carry | None = None,
        *,
        hidden_gradients: Any = None,
        lengths: Array | None = None,
        resets: Array | None = None,
    ) -> Array:
        """Returns the weighted penalty for one recurrent layer.

        Args:
          cell: any cell.
          params: its weights.
          inputs: ``[T, ..., D]``, time-major.
          carry: the carry before the first step; ``cell.initialize_carry`` by default.
          hidden_gradients: not used; here so that both penalties are called alike.
          lengths: as for ``unroll``.
          resets: as for ``unroll``; directions start anew there.

        Returns:
          A scalar. Directions that are lost do not count from then on: where ReLUs are dead, or where all but 8 ε of
          what a step leaves of a direction lies along those before it (ε = 1.2e-7 in float32).

        Raises:
          ValueError: what ``trajectory`` refuses, more exponents than the state has.
        """
        cell.check(params, inputs, carry)
        leading = (jax.tree.leaves(inputs)[0].shape[0], *cell.batch_shape(inputs))
        if lengths is not None:
            lengths = jnp.asarray(lengths)
            validation.lengths("lengths", lengths, leading[1:], leading[0])
        if resets is not None:
            resets = jnp.asarray(resets, bool)
            validation.shape("resets", resets, leading)
        if leading[1:]:
            few = slice(self.num_sequences)
            inputs = jax.tree.map(lambda x: x[:, few], inputs)
            carry = jax.tree.map(lambda x: x[few], carry)
            lengths = None if lengths is None else lengths[few]
            resets = None if resets is None else resets[:, few]
        path = trajectory(cell, params, inputs, carry, lengths=lengths, resets=resets)
        jacobians = jacobian_operator(cell, params, path)
        validation.integer_between("num_exponents", self.num_exponents, 1, jacobians.shape[-1])
        frame = random_frame(jax.random.key(self.seed), jacobians, self.num_exponents)
        exponents, counted = _exponents(jacobians, frame, _linked(path, jacobians.shape[:-2]))
        terms = jnp.where(counted, (exponents - self.target) ** 2, 0)
        return self.weight * jnp.sum(terms) / jnp.maximum(jnp.sum(counted, dtype=terms.dtype), 1)


Penalty = VanishingGradientPenalty | GradientFlossing


def _linked(path: Trajectory, shape: tuple[int, ...]) -> Array:
    """Returns the steps that count and depend on the carry before them, bool ``[T, ...]``."""
    linked = jnp.ones(shape, bool)
    if path.active is not None:
        linked &= path.active
    return linked if path.resets is None else linked & ~path.resets


def _flat(name: str, tree: Any, path: Trajectory) -> Array:
    """Returns a pytree like the carries, without the first, as states ``[T, ..., S]``."""
    like = jax.tree.map(lambda leaf: leaf[1:], path.carries)
    validation.same_shapes(name, tree, like)
    num_axes = jax.tree.leaves(path.inputs)[0].ndim - 1
    leaves = [leaf.reshape(*leaf.shape[:num_axes], -1) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(leaves, axis=-1)


def _exponents(jacobians: Jacobians, frame: Array, linked: Array) -> tuple[Array, Array]:
    """Returns leading exponents ``[..., k]``, and which of them have a step that counts."""

    def step(columns: Array, xs: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        time, counted = xs
        carried = jacobians.at_step(time).times(columns)
        # At a reset the directions start anew; past the end of a sequence they are of no more use.
        columns = jnp.where(counted[..., None, None], carried, frame)
        columns, growth, alive = _orthonormal(columns)
        return columns, (growth, alive & counted[..., None])

    times = jnp.arange(jacobians.shape[0], dtype=jnp.int32)
    _, (growth, counted) = jax.lax.scan(step, frame, (times, linked))
    number = jnp.sum(counted, axis=0, dtype=growth.dtype)
    total = jnp.sum(jnp.where(counted, growth, 0), axis=0)
    return total / jnp.maximum(number, 1), number > 0


def _orthonormal(columns: Array) -> tuple[Array, Array, Array]:
    """Gram–Schmidt, twice for accuracy: columns, log R_ii ``[..., k]``, and which are not lost.

    Written out because it, unlike QR, has a derivative where a column is lost, and takes whole batches at once.
    """
    done: list[Array] = []
    logs, alive = [], []
    for index in range(columns.shape[-1]):
        column = columns[..., index]
        largest = jax.lax.stop_gradient(jnp.abs(column).max(axis=-1))
        scale = jnp.where(largest > 0, largest, 1)  # squares would under- or overflow
        column = column / scale[..., None]
        original = jnp.sum(column**2, axis=-1)
        for _ in range(2):
            for other in done:
                column = column - other * jnp.sum(other * column, axis=-1, keepdims=True)
        square = jnp.sum(column**2, axis=-1)
        kept = square > (8 * jnp.finfo(column.dtype).eps) ** 2 * original
        length = jnp.sqrt(jnp.where(kept, square, 1))
        done.append(jnp.where(kept[..., None], column / length[..., None], 0))
        logs.append(jnp.log(length) + jnp.log(scale))
        alive.append(kept)
    return jnp.stack(done, axis=-1), jnp.stack(logs, axis=-1), jnp.stack(alive, axis=-1)
