"""Step Jacobians of a sequence as operators: J V and Jᵀ V without all J_t in memory.

Three forms share one interface: the factors J = P + D Uᵀ of an affine cell, matrices, and any step function, which is
linearised where a product asks for it. Leading axes are those of the sequence, ``[T, ...]``; ``at_step`` takes one.
"""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from rnnjax import lapack, validation
from rnnjax.cells import Cell
from rnnjax.typing import Array, Carry, DType, Params

_HIGHEST = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class StructuredJacobians:
    """Step Jacobians of an affine cell, kept as the factors of J = P + D Uᵀ.

    C is the number of values a unit carries: 1, or 2 for the LSTM. States are ordered by carry, then by unit.

    Attributes:
      carry_derivatives: P, ``[..., C, C, H]``: entry (a, b, j) is ∂(carry a of unit j)' / ∂(carry b of unit j).
      recurrent_derivatives: D, ``[..., C, G, H]``: entry (a, g, j) is ∂(carry a of unit j)' / ∂(gate g's r of unit j).
      recurrent_kernel: U, ``[H, G, H]``.
      transposed_kernel: Uᵀ, ``[G, H, H]``, entry (g, j, i) that of U (i, g, j): J V multiplies by rows of Uᵀ, Jᵀ V by
        rows of U, and a matrix whose rows lie together multiplies faster.
    """

    carry_derivatives: Array
    recurrent_derivatives: Array
    recurrent_kernel: Array
    transposed_kernel: Array

    @classmethod
    def from_factors(
        cls, carry_derivatives: Array, recurrent_derivatives: Array, recurrent_kernel: Array
    ) -> "StructuredJacobians":
        """Returns the Jacobians with factors P, D and U."""
        return cls(
            carry_derivatives, recurrent_derivatives, recurrent_kernel, jnp.transpose(recurrent_kernel, (1, 2, 0))
        )

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
        by_carry, by_gate = self.carry_derivatives[step], self.recurrent_derivatives[step]
        return dataclasses.replace(self, carry_derivatives=by_carry, recurrent_derivatives=by_gate)

    def sequence(self, index: Array | int) -> "StructuredJacobians":
        """Returns the Jacobians ``[T, S, S]`` of one sequence of a batch, counted along all batch axes."""
        by_carry, by_gate = (
            leaf.reshape(leaf.shape[0], -1, *leaf.shape[-3:])[:, index]
            for leaf in (self.carry_derivatives, self.recurrent_derivatives)
        )
        return dataclasses.replace(self, carry_derivatives=by_carry, recurrent_derivatives=by_gate)

    def finite(self) -> Array:
        """Returns whether each Jacobian is finite, bool ``[...]``."""
        factors = (self.carry_derivatives, self.recurrent_derivatives)
        by_step = [jnp.isfinite(factor).all(axis=(-3, -2, -1)) for factor in factors]
        return by_step[0] & by_step[1] & jnp.isfinite(self.recurrent_kernel).all()

    def astype(self, dtype: DType) -> "StructuredJacobians":
        """Returns the same factors in another dtype."""
        return jax.tree.map(lambda leaf: leaf.astype(dtype), self)

    def dense(self) -> Array:
        """Returns J, ``[..., S, S]``."""
        diagonal, from_hidden = self.carry_derivatives, self._from_hidden()
        hidden = diagonal.shape[-1]
        same_unit = jax.lax.expand_dims(jnp.eye(hidden, dtype=self.dtype)[:, None], range(diagonal.ndim - 2))
        unit_to_unit = jnp.moveaxis(diagonal, -2, -1)[..., None] * same_unit
        blocks = jnp.concatenate([from_hidden[..., None, :], unit_to_unit[..., 1:, :]], axis=-2)
        return blocks.reshape(self.shape)

    def times(self, columns: Array) -> Array:
        """Returns J V for V ``[..., S, m]``, whose leading axes are those of J."""
        parts = self._by_carry(columns)
        from_hidden = parts[..., 0, :, :]
        if self._forms_blocks(columns):
            result = lapack.matmul(self._blocks(), from_hidden)
            result = result.reshape(parts.shape) + _mixed(self.carry_derivatives[..., 1:, :], parts[..., 1:, :, :])
        else:
            through_gates = self._through_gates(from_hidden)
            result = _mixed(self.carry_derivatives, parts) + _mixed(self.recurrent_derivatives, through_gates)
        return result.reshape(columns.shape)

    def transpose_times(self, columns: Array) -> Array:
        """Returns Jᵀ V for V ``[..., S, m]``, whose leading axes are those of J."""
        parts = self._by_carry(columns)
        if self._forms_blocks(columns):
            to_hidden = lapack.matmul(jnp.swapaxes(self._blocks(), -1, -2), columns)
            others = _mixed(jnp.swapaxes(self.carry_derivatives[..., 1:, :], -3, -2), parts)
            return jnp.concatenate([to_hidden[..., None, :, :], others], axis=-3).reshape(columns.shape)
        result = _mixed(jnp.swapaxes(self.carry_derivatives, -3, -2), parts)
        at_gates = _mixed(jnp.swapaxes(self.recurrent_derivatives, -3, -2), parts)
        to_hidden = self._to_hidden(at_gates)
        return result.at[..., 0, :, :].add(to_hidden).reshape(columns.shape)

    def log_abs_det(self) -> Array:
        """Returns log|det J| in nats, ``[...]``, without the columns in which each unit feeds only itself."""
        from_hidden = self._from_hidden()
        if self.carry_derivatives.shape[-2] == 1:
            return lapack.log_abs_det(from_hidden[..., 0, :, :])
        if self.carry_derivatives.shape[-2] > 2:
            return lapack.log_abs_det(self.dense())
        first, second = from_hidden[..., 0, :, :], from_hidden[..., 1, :, :]
        a, b = self.carry_derivatives[..., 0, 1, :], self.carry_derivatives[..., 1, 1, :]
        exchanged = jnp.abs(a) > jnp.abs(b)
        pivot, other = jnp.where(exchanged, a, b), jnp.where(exchanged, b, a)
        rows = exchanged[..., None]
        pivot_rows, other_rows = jnp.where(rows, first, second), jnp.where(rows, second, first)
        ratio = other / jnp.where(pivot == 0, 1, pivot)
        return jnp.log(jnp.abs(pivot)).sum(axis=-1) + lapack.log_abs_det(other_rows - ratio[..., None] * pivot_rows)

    def _forms_blocks(self, columns: Array) -> bool:
        """Whether ∂s'/∂h is worth forming: fewer rows than gates have, and enough columns to pay for it."""
        num_carries, num_gates = self.recurrent_derivatives.shape[-3:-1]
        return num_carries < num_gates and columns.shape[-1] > 4 * num_carries

    def _blocks(self) -> Array:
        """∂s'/∂h, ``[..., S, H]``."""
        return self._from_hidden().reshape(*self.shape[:-1], self.carry_derivatives.shape[-1])

    def _from_hidden(self) -> Array:
        """∂s'/∂h, ``[..., C, H, H]``: entry (a, j, i) is ∂(carry a of unit j)' / ∂h_i."""
        gates, kernel = self.recurrent_derivatives, self.transposed_kernel
        rows = kernel.reshape((1,) * (gates.ndim - 2) + kernel.shape)
        through = sum(gates[..., g, :, None] * rows[..., g, :, :] for g in range(gates.shape[-2]))
        hidden = kernel.shape[-1]
        same_unit = jax.lax.expand_dims(jnp.eye(hidden, dtype=self.dtype), range(gates.ndim - 2))
        return through + self.carry_derivatives[..., 0, :, None] * same_unit

    def _through_gates(self, from_hidden: Array) -> Array:
        """Uᵀ V for V ``[..., H, m]``, ``[..., G, H, m]``."""
        if from_hidden.shape[-1] == 1:  # one column for many steps: a matrix product with the steps as rows
            return _dot(from_hidden[..., 0], self.recurrent_kernel, 1)[..., None]
        result = jax.lax.dot_general(
            self.transposed_kernel, from_hidden, (((2,), (from_hidden.ndim - 2,)), ((), ())), precision=_HIGHEST
        )
        return jnp.moveaxis(result, (0, 1), (-3, -2))

    def _to_hidden(self, at_gates: Array) -> Array:
        """U V for V ``[..., G, H, m]``, ``[..., H, m]``."""
        if at_gates.shape[-1] == 1:
            return _dot(at_gates[..., 0], self.transposed_kernel, 2)[..., None]
        axes = (at_gates.ndim - 3, at_gates.ndim - 2)
        result = jax.lax.dot_general(self.recurrent_kernel, at_gates, (((1, 2), axes), ((), ())), precision=_HIGHEST)
        return jnp.moveaxis(result, 0, -2)

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

    def sequence(self, index: Array | int) -> "DenseJacobians":
        """Returns the Jacobians ``[T, S, S]`` of one sequence of a batch, counted along all batch axes."""
        shape = self.matrices.shape
        return DenseJacobians(self.matrices.reshape(shape[0], -1, *shape[-2:])[:, index])

    def finite(self) -> Array:
        """Returns whether each Jacobian is finite, bool ``[...]``."""
        return jnp.isfinite(self.matrices).all(axis=(-2, -1))

    def astype(self, dtype: DType) -> "DenseJacobians":
        """Returns the same matrices in another dtype."""
        return DenseJacobians(self.matrices.astype(dtype))

    def dense(self) -> Array:
        """Returns J, ``[..., S, S]``."""
        return self.matrices

    def times(self, columns: Array) -> Array:
        """Returns J V for V ``[..., S, m]``."""
        return lapack.matmul(self.matrices, columns)

    def transpose_times(self, columns: Array) -> Array:
        """Returns Jᵀ V for V ``[..., S, m]``."""
        return lapack.matmul(jnp.swapaxes(self.matrices, -1, -2), columns)

    def log_abs_det(self) -> Array:
        """Returns log|det J| in nats, ``[...]``."""
        return lapack.log_abs_det(self.matrices)


@flax.struct.dataclass
class LinearizedJacobians:
    """Step Jacobians of any cell, by ``jax.jvp`` and ``jax.vjp`` of its step, with the methods of the other forms.

    Attributes:
      cell: any cell.
      params: its weights.
      carries: the carry before each step, leaves ``[T, ..., H]``.
      inputs: the input of each step, leaves ``[T, ..., D]``.
      num_axes: how many leading axes there are, time included.
      x64: whether float64 was on where the states come from; the step is linearised under the same setting.
      wide: dtype to multiply in; if not that of the states, J is formed before it multiplies.
    """

    cell: Cell
    params: Params
    carries: Carry
    inputs: Any
    num_axes: int = flax.struct.field(pytree_node=False)
    x64: bool = flax.struct.field(pytree_node=False)
    wide: DType | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """``[T, ..., S, S]``."""
        leading = jax.tree.leaves(self.carries)[0].shape[: self.num_axes]
        size = sum(math.prod(leaf.shape[self.num_axes :]) for leaf in jax.tree.leaves(self.carries))
        return (*leading, size, size)

    @property
    def dtype(self) -> DType:
        """Dtype of the Jacobians."""
        return self.wide or jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(self.carries)))

    def astype(self, dtype: DType) -> "LinearizedJacobians":
        """Returns the same Jacobians in another dtype; the step itself is not computed in it."""
        return dataclasses.replace(self, wide=jnp.dtype(dtype))

    def at_step(self, step: Array | int) -> "LinearizedJacobians":
        """Returns the Jacobian of one step, without the time axis."""
        carries, inputs = jax.tree.map(lambda leaf: leaf[step], (self.carries, self.inputs))
        return dataclasses.replace(self, carries=carries, inputs=inputs, num_axes=self.num_axes - 1)

    def sequence(self, index: Array | int) -> "LinearizedJacobians":
        """Returns the Jacobians ``[T, S, S]`` of one sequence of a batch, counted along all batch axes."""

        def own(leaf: Array) -> Array:
            return leaf.reshape(leaf.shape[0], -1, *leaf.shape[self.num_axes :])[:, index]

        carries, inputs = jax.tree.map(own, (self.carries, self.inputs))
        return dataclasses.replace(self, carries=carries, inputs=inputs, num_axes=1)

    def finite(self) -> Array:
        """Returns whether J times a vector of ones is finite, bool ``[...]``."""
        own = dataclasses.replace(self, wide=None)
        return jnp.isfinite(own.times(jnp.ones((*self.shape[:-1], 1), own.dtype))).all(axis=(-2, -1))

    def dense(self) -> Array:
        """Returns J, ``[..., S, S]``, by ``jax.jacrev``."""
        return self._over_leading(lambda function, state: jax.jacrev(function)(state)).astype(self.dtype)

    def times(self, columns: Array) -> Array:
        """Returns J V for V ``[..., S, m]``."""
        if self.wide:
            return DenseJacobians(self.dense()).times(columns)

        def products(function: Any, state: Array, vectors: Array) -> Array:
            return jax.vmap(lambda v: jax.jvp(function, (state,), (v,))[1], in_axes=1, out_axes=1)(vectors)

        return self._over_leading(products, columns)

    def transpose_times(self, columns: Array) -> Array:
        """Returns Jᵀ V for V ``[..., S, m]``."""
        if self.wide:
            return DenseJacobians(self.dense()).transpose_times(columns)

        def products(function: Any, state: Array, vectors: Array) -> Array:
            pull_back = jax.vjp(function, state)[1]
            return jax.vmap(lambda v: pull_back(v)[0], in_axes=1, out_axes=1)(vectors)

        return self._over_leading(products, columns)

    def log_abs_det(self) -> Array:
        """Returns log|det J| in nats, ``[...]``."""
        return lapack.log_abs_det(self.dense())

    def _over_leading(self, function: Any, *arrays: Array) -> Array:
        template = jax.eval_shape(self.cell.initialize_carry)
        _, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), template))

        def single(carry: Carry, inputs: Any, *own: Array) -> Array:
            def next_state(state: Array) -> Array:
                like = jax.tree.map(lambda new, old: new.astype(old.dtype), unravel(state), carry)
                return ravel_pytree(self.cell.apply(self.params, like, inputs)[0])[0]

            return function(next_state, ravel_pytree(carry)[0], *own)

        for _ in range(self.num_axes):
            single = jax.vmap(single)
        with jax.default_matmul_precision("highest"), jax.enable_x64(self.x64):
            return single(self.carries, self.inputs, *arrays)


Jacobians = StructuredJacobians | DenseJacobians | LinearizedJacobians


def first_non_finite_step(jacobians: Jacobians) -> Array:
    """Returns the first step whose Jacobian is not finite, int32 ``[...]``; −1 where all are finite.

    Args:
      jacobians: the step Jacobians, ``[T, ..., S, S]``.

    Returns:
      int32 ``[...]``.

    Example:
      >>> import jax.numpy as jnp
      >>> print(first_non_finite_step(DenseJacobians(jnp.ones((5, 2, 2)).at[3, 0, 1].set(jnp.nan))))
      3
    """
    bad = ~jacobians.finite()
    return jnp.where(bad.any(axis=0), jax.lax.argmax(bad, 0, jnp.int32), jnp.asarray(-1, jnp.int32))


def check_finite(jacobians: Jacobians) -> None:
    """Raises ValueError that names the first step whose Jacobian is not finite, where it has values."""
    if not all(validation.is_concrete(leaf) for leaf in jax.tree.leaves(jacobians)):
        return
    if isinstance(jacobians, StructuredJacobians):
        validation.finite("jacobians.recurrent_kernel", jacobians.recurrent_kernel)
    validation.finite_steps("step Jacobian", np.where(_finite(jacobians), 0.0, np.nan))


@jax.jit
def _finite(jacobians: Jacobians) -> Array:
    return jacobians.finite()


def _mixed(derivatives: Array, parts: Array) -> Array:
    """Σ_b derivatives[..., a, b, j] · parts[..., b, j, m], unit by unit, ``[..., a, j, m]``."""
    terms = (derivatives[..., b, :, None] * parts[..., None, b, :, :] for b in range(derivatives.shape[-2]))
    return sum(terms, jnp.zeros((), parts.dtype))


def _dot(left: Array, right: Array, num_axes: int) -> Array:
    """Contracts the last axes of ``left`` with the first of ``right``."""
    axes = (tuple(range(left.ndim - num_axes, left.ndim)), tuple(range(num_axes)))
    return jax.lax.dot_general(left, right, (axes, ((), ())), precision=_HIGHEST)
