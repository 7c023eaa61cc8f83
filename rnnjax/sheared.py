"""Chains of Jacobians whose hidden rows leave out what they share with the rows of the memory.

Where h_t = o φ(c_t), as in an LSTM, the row of h is that of c times a = o φ'(c_t), but for what reaches o. With
S_t = [[1, −a_t], [0, 1]] for each unit,

    J_T … J_1 = (S_T J_T S_{T−1}⁻¹) … (S_1 J_1 S_0⁻¹),    S_0 = S_T = 1,

is the same product of matrices whose rows differ in size instead of being nearly dependent. Scaling rows mends the
first (see ``graded``), nothing the second: a step of an LSTM of 128 units, condition number 700, has 8 that way. Where
c_t hardly counts in the next step beside h_t, it is the row of c that leaves out b = 1/a times that of h instead:
columns of h and c would be nearly dependent otherwise.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from rnnjax.operators import Jacobians
from rnnjax.structured import StructuredJacobians
from rnnjax.typing import Array, DType


@flax.struct.dataclass
class ShearedJacobians:
    """S_t J_t S_{t−1}⁻¹ of a cell with two carries.

    Attributes:
      rows: S_t J_t, ``[..., 2H, 2H]``, in the dtype to work in.
      before: a_{t−1} and b_{t−1}, ``[..., 2, H]``.
      factors: P and D of J_t itself, in the dtype they came in.
    """

    rows: StructuredJacobians
    before: Array
    factors: tuple[Array, Array]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense matrices, ``[T, ..., S, S]``."""
        return self.rows.shape

    @property
    def dtype(self) -> DType:
        """Dtype of the matrices."""
        return self.rows.dtype

    def at_step(self, step: Array | int) -> "ShearedJacobians":
        """Returns the matrix of one step, without the time axis."""
        by_carry, by_gate = self.factors
        return ShearedJacobians(self.rows.at_step(step), self.before[step], (by_carry[step], by_gate[step]))

    def starting_at(self, step: Array | int) -> "ShearedJacobians":
        """Returns matrices of which those from a step on have the product of its Jacobian and later ones."""
        return dataclasses.replace(self, before=self.before.at[step].set(0))

    def times(self, columns: Array, *, last: bool = False) -> Array:
        """Returns S_t J_t S_{t−1}⁻¹ V for V ``[..., 2H, m]``; J_t S_{t−1}⁻¹ V for the last step of a product."""
        (hidden, memory), (a, b) = jnp.split(columns, 2, axis=-2), self._shears()
        matrices = self._plain() if last else self.rows
        return matrices.times_parts([hidden + a[..., None] * memory, memory + b[..., None] * hidden])

    def transpose_times(self, columns: Array, *, last: bool = False) -> Array:
        """Returns S_{t−1}⁻ᵀ J_tᵀ S_tᵀ V; J_tᵀ S_tᵀ V for the last step of a product of transposes."""
        result = self.rows.transpose_times(columns)
        if last:
            return result
        (hidden, memory), (a, b) = jnp.split(result, 2, axis=-2), self._shears()
        return jnp.concatenate([hidden + b[..., None] * memory, memory + a[..., None] * hidden], axis=-2)

    def dense(self) -> Array:
        """Returns the matrices, ``[..., 2H, 2H]``."""
        (hidden, memory), (a, b) = jnp.split(self.rows.dense(), 2, axis=-1), self._shears()
        return jnp.concatenate([hidden + b[..., None, :] * memory, memory + a[..., None, :] * hidden], axis=-1)

    def _plain(self) -> StructuredJacobians:
        by_carry, by_gate = (x.astype(self.dtype) for x in self.factors)
        return dataclasses.replace(self.rows, carry_derivatives=by_carry, recurrent_derivatives=by_gate)

    def _shears(self) -> tuple[Array, Array]:
        return self.before[..., 0, :], self.before[..., 1, :]


def sheared(jacobians: Jacobians, dtype: DType) -> Jacobians | ShearedJacobians:
    """Returns a chain ``[T, S, S]`` with the product of the Jacobians: sheared where an affine cell has two carries.

    Args:
      jacobians: of one sequence.
      dtype: to work in.

    Returns:
      The chain in that dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> by_carry = jnp.array([[[[0.0], [0.25]], [[0.0], [0.5]]]] * 2)  # h is half of c, but for what comes from h
      >>> steps = StructuredJacobians.from_factors(by_carry, jnp.ones((2, 2, 1, 1)), jnp.ones((1, 1, 1)))
      >>> chain = sheared(steps, jnp.float32)
      >>> print(chain.dense()[0])
      [[0.5 0. ]
       [1.  0.5]]
    """
    if not isinstance(jacobians, StructuredJacobians) or jacobians.carry_derivatives.shape[-2] != 2:
        return jacobians.astype(dtype)
    wide = jacobians.astype(dtype)
    factors = (wide.carry_derivatives, wide.recurrent_derivatives)
    hidden, memory = wide.carry_derivatives[:, 0, 1], wide.carry_derivatives[:, 1, 1]
    a, b = _ratio(hidden, memory), _ratio(memory, hidden)
    keeps_memory = jnp.concatenate([_weight_of_memory(wide)[1:] >= jnp.abs(a[:-1]), jnp.zeros_like(a[:1], bool)])
    a, hidden_rows = _smaller(factors, 0, jnp.where(keeps_memory, a, 0).at[-1].set(0))
    b, memory_rows = _smaller(factors, 1, jnp.where(keeps_memory, 0, b).at[-1].set(0))
    carries, gates = (jnp.stack(pair, axis=1) for pair in zip(hidden_rows, memory_rows, strict=True))
    after = jnp.stack([a, b], axis=1)
    return ShearedJacobians(
        dataclasses.replace(wide, carry_derivatives=carries, recurrent_derivatives=gates),
        jnp.concatenate([jnp.zeros_like(after[:1]), after[:-1]]),
        (jacobians.carry_derivatives, jacobians.recurrent_derivatives),
    )


def _ratio(numerator: Array, denominator: Array) -> Array:
    ratio = numerator / jnp.where(denominator == 0, 1, denominator)
    return jnp.where((denominator == 0) | ~jnp.isfinite(ratio), 0, ratio)


def _weight_of_memory(jacobians: StructuredJacobians) -> Array:
    """Returns how much c_{t−1} counts in the row of c_t, beside what h_{t−1} may, ``[T, H]`` from 0 to 1."""
    own = jnp.abs(jacobians.carry_derivatives[:, 1, 1])
    through = jnp.abs(jacobians.recurrent_derivatives[:, 1]).max(axis=1) * jnp.abs(jacobians.recurrent_kernel).max()
    largest = jnp.maximum(own, through)
    return own / jnp.where(largest == 0, 1, largest)


def _smaller(factors: tuple[Array, Array], carry: int, shear: Array) -> tuple[Array, list[Array]]:
    """Returns the shears, 0 where they would not make the row of their unit smaller, and the rows."""
    before = [x[:, carry] for x in factors]
    after = [_less(rows, shear, x[:, 1 - carry]) for rows, x in zip(before, factors, strict=True)]
    is_smaller = _size(after) < _size(before)
    rows = [jnp.where(is_smaller[:, None], new, old) for new, old in zip(after, before, strict=True)]
    return jnp.where(is_smaller, shear, 0), rows


def _size(rows: list[Array]) -> Array:
    return jnp.maximum(*(jnp.abs(x).max(axis=1) for x in rows))


def _less(rows: Array, shear: Array, others: Array) -> Array:
    """Returns rows − shear · others ``[T, n, H]`` with most of their digits, also where the two nearly cancel.

    Products of halves of two mantissas are exact, and the largest is subtracted first.
    """
    for left in _halves(shear[:, None]):
        for right in _halves(others):
            rows = rows - left * right
    return rows


def _halves(array: Array) -> tuple[Array, Array]:
    info = jnp.finfo(array.dtype)
    upper = jax.lax.reduce_precision(array, info.nexp, (info.nmant - 1) // 2)
    return upper, array - upper
