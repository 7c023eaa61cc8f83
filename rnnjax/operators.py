"""Step Jacobians of a sequence as operators: J V and Jᵀ V without all J_t in memory.

Three forms share one interface: the factors J = P + D Uᵀ of an affine cell, matrices, and any step function, which is
linearised where a product asks for it. Leading axes are those of the sequence, ``[T, ...]``; ``at_step`` takes one.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from rnnjax import lapack, validation
from rnnjax.cells import Cell
from rnnjax.structured import StructuredJacobians
from rnnjax.typing import Array, Carry, DType, Params


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

    def flattened(self) -> "DenseJacobians":
        """Returns the Jacobians of all steps of all sequences along one axis, step by step."""
        return DenseJacobians(self.matrices.reshape(-1, *self.shape[-2:]))

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

    def schur_complement(self) -> tuple[Array, Array]:
        """Returns zeros, ``[...]``, and J: no pivots are known before it is factored."""
        return jnp.zeros(self.shape[:-2], self.dtype), self.matrices

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
        def single(carry: Carry, inputs: Any, *own: Array) -> Array:
            flat, unravel = ravel_pytree(carry)

            def next_state(state: Array) -> Array:
                # A whole number, of a random key for one, might not survive as a floating-point one.
                start = jax.tree.map(_if_floating, unravel(state), carry)
                return ravel_pytree(self.cell.apply(self.params, start, inputs)[0])[0]

            return function(next_state, flat, *own)

        for _ in range(self.num_axes):
            single = jax.vmap(single)
        with jax.default_matmul_precision("highest"), jax.enable_x64(self.x64):
            return single(self.carries, self.inputs, *arrays)


def _if_floating(moved: Array, fixed: Array) -> Array:
    return moved if jnp.issubdtype(fixed.dtype, jnp.floating) else fixed


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


def over_sequences(function: Callable[[Jacobians], Any], jacobians: Jacobians, late: Array | bool = False) -> Any:
    """Applies ``function`` to the Jacobians ``[T, S, S]`` of each sequence of a batch; batch axes of results lead.

    ``late`` is false, and what the first of several sequences is to wait for.
    """
    batch_shape = jacobians.shape[1:-2]
    if not batch_shape:
        return function(jacobians)
    indices = jnp.arange(math.prod(batch_shape), dtype=jnp.int32) + jnp.asarray(late, jnp.int32)
    results = lapack.over_batch(lambda index: function(jacobians.sequence(index)), indices, 1)
    return jax.tree.map(lambda leaf: leaf.reshape(*batch_shape, *leaf.shape[1:]), results)


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
