"""Step Jacobians of affine cells as the factors of J = P + D Uᵀ."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from rnnjax import lapack
from rnnjax.typing import Array, DType

_HIGHEST = jax.lax.Precision.HIGHEST
_FEW = 24
"""How many columns at most are multiplied faster as the rows of a matrix."""


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
      gates_alone: whether C = 1 and P = 0, so that J = D Uᵀ.
    """

    carry_derivatives: Array
    recurrent_derivatives: Array
    recurrent_kernel: Array
    transposed_kernel: Array
    gates_alone: bool = flax.struct.field(pytree_node=False)

    @classmethod
    def from_factors(
        cls, carry_derivatives: Array, recurrent_derivatives: Array, kernel: Array, *, gates_alone: bool = False
    ) -> "StructuredJacobians":
        """Returns the Jacobians with factors P, D and U."""
        transposed = jnp.transpose(kernel, (1, 2, 0))
        return cls(carry_derivatives, recurrent_derivatives, kernel, transposed, gates_alone)

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

    def flattened(self) -> "StructuredJacobians":
        """Returns the Jacobians of all steps of all sequences along one axis, step by step."""
        by_carry, by_gate = (x.reshape(-1, *x.shape[-3:]) for x in (self.carry_derivatives, self.recurrent_derivatives))
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
        return self.times_parts(_along_first(self._by_carry(columns)))

    def times_parts(self, parts: list[Array]) -> Array:
        """Returns J V ``[..., S, m]`` for V given by carry, ``[..., H, m]`` each."""
        if self._forms_blocks(parts[0]):
            result = lapack.matmul(self._blocks(), parts[0])
            result = self._by_carry(result) + _mixed(self.carry_derivatives[..., 1:, :], parts[1:])
        else:
            result = _mixed(self.recurrent_derivatives, _along_first(self._through_gates(parts[0])))
            result = result if self.gates_alone else _mixed(self.carry_derivatives, parts) + result
        return result.reshape(*self.shape[:-1], parts[0].shape[-1])

    def transpose_times(self, columns: Array) -> Array:
        """Returns Jᵀ V for V ``[..., S, m]``, whose leading axes are those of J."""
        parts = self._by_carry(columns)
        if self._forms_blocks(columns):
            to_hidden = lapack.matmul(jnp.swapaxes(self._blocks(), -1, -2), columns)
            others = _mixed(jnp.swapaxes(self.carry_derivatives[..., 1:, :], -3, -2), _along_first(parts))
            return jnp.concatenate([to_hidden[..., None, :, :], others], axis=-3).reshape(columns.shape)
        to_hidden = self._to_hidden(_mixed(jnp.swapaxes(self.recurrent_derivatives, -3, -2), _along_first(parts)))
        if self.gates_alone:
            return to_hidden
        result = _mixed(jnp.swapaxes(self.carry_derivatives, -3, -2), _along_first(parts))
        return result.at[..., 0, :, :].add(to_hidden).reshape(columns.shape)

    def takes_rows(self, count: int) -> bool:
        """Whether ``times_rows`` can multiply that many columns, and does so faster than ``times``."""
        return self.recurrent_derivatives.shape[-3:-1] == (1, 1) and count <= _FEW

    def times_rows(self, rows: Array, *, transposed: bool = False) -> Array:
        """Returns (J V)ᵀ, or (Jᵀ V)ᵀ, for Vᵀ ``[..., m, S]``, of a cell with one gate and one carry."""
        by_gate, by_carry = self.recurrent_derivatives[..., 0, :], self.carry_derivatives[..., 0, :]
        if transposed:
            result = _dot(rows * by_gate, self.transposed_kernel[0], 1)
        else:
            result = _dot(rows, self.recurrent_kernel[:, 0], 1) * by_gate
        return result if self.gates_alone else rows * by_carry + result

    def log_abs_det(self) -> Array:
        """Returns log|det J| in nats, ``[...]``."""
        log_pivots, rest = self.schur_complement()
        return log_pivots + lapack.log_abs_det(rest)

    def schur_complement(self) -> tuple[Array, Array]:
        """Returns what is left of J once the columns in which each unit feeds only itself are eliminated.

        Of the two entries of such a column the larger is its pivot, as in Gaussian elimination with partial pivoting.

        Returns:
          Σ log|pivot| in nats, ``[...]``, and the Schur complement, ``[..., n, n]``: |det J| is the product of the
          pivots and its own.
        """
        from_hidden, no_pivots = self._from_hidden(), jnp.zeros(self.shape[:-2], self.dtype)
        if self.carry_derivatives.shape[-2] == 1:
            return no_pivots, from_hidden[..., 0, :, :]
        if self.carry_derivatives.shape[-2] > 2:
            return no_pivots, self.dense()
        first, second = from_hidden[..., 0, :, :], from_hidden[..., 1, :, :]
        a, b = self.carry_derivatives[..., 0, 1, :], self.carry_derivatives[..., 1, 1, :]
        exchanged = jnp.abs(a) > jnp.abs(b)
        pivot, other = jnp.where(exchanged, a, b), jnp.where(exchanged, b, a)
        rows = exchanged[..., None]
        pivot_rows, other_rows = jnp.where(rows, first, second), jnp.where(rows, second, first)
        ratio = other / jnp.where(pivot == 0, 1, pivot)
        return jnp.log(jnp.abs(pivot)).sum(axis=-1), other_rows - ratio[..., None] * pivot_rows

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
        zero = jnp.zeros((), self.dtype)
        through = sum((gates[..., g, :, None] * rows[..., g, :, :] for g in range(gates.shape[-2])), zero)
        if self.gates_alone:
            return through
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


def _mixed(derivatives: Array, parts: list[Array]) -> Array:
    """Σ_b derivatives[..., a, b, j] · parts[b][..., j, m], unit by unit, ``[..., a, j, m]``."""
    terms = (derivatives[..., b, :, None] * part[..., None, :, :] for b, part in enumerate(parts))
    return sum(terms, jnp.zeros((), derivatives.dtype))


def _along_first(array: Array) -> list[Array]:
    """Returns the parts of an array ``[..., b, j, m]``, ``[..., j, m]`` each."""
    return [array[..., b, :, :] for b in range(array.shape[-3])]


def _dot(left: Array, right: Array, num_axes: int) -> Array:
    """Contracts the last axes of ``left`` with the first of ``right``."""
    axes = (tuple(range(left.ndim - num_axes, left.ndim)), tuple(range(num_axes)))
    return jax.lax.dot_general(left, right, (axes, ((), ())), precision=_HIGHEST)
