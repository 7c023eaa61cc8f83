"""Matrix products at full precision, and factorisations of many matrices, one at a time on CPU.

On CPU a batched LAPACK call is a loop in any case, and inside a compiled loop XLA may wait for ever for the threads it
hands the batch to (seen with jaxlib 0.10.2: a scan of QR factorisations of two 128 × 128 matrices on two cores). One
matrix a call is as fast and always returns. On accelerators the batch goes to the device's own batched routines.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rnnjax.typing import Array


def over_batch(function: Callable[..., Any], array: Array, num_axes: int) -> Any:
    """Applies ``function`` to each element of a batch, one at a time on CPU, all at once elsewhere.

    Args:
      function: takes an array and returns a pytree of arrays.
      array: has ``num_axes`` leading batch axes.
      num_axes: how many batch axes there are.

    Returns:
      The results, with the batch axes leading.
    """
    if num_axes == 0:
        return function(array)
    flat = array.reshape(-1, *array.shape[num_axes:])
    results = jax.lax.map(function, flat) if jax.default_backend() == "cpu" else jax.vmap(function)(flat)
    return jax.tree.map(lambda leaf: leaf.reshape(*array.shape[:num_axes], *leaf.shape[1:]), results)


def matmul(left: Array, right: Array) -> Array:
    """Returns left · right for ``[..., m, k]`` and ``[..., k, n]``, leading axes the same, at the highest precision.

    jnp.matmul would also name its output's dtype, and that is what JAX refuses when a compiled program that switched
    float64 on for itself is mapped by a ``jax.vmap`` from outside.
    """
    batch = tuple(range(left.ndim - 2))
    axes = (((left.ndim - 1,), (right.ndim - 2,)), (batch, batch))
    return jax.lax.dot_general(left, right, axes, precision=jax.lax.Precision.HIGHEST)


def qr(matrices: Array) -> tuple[Array, Array]:
    """Returns the reduced QR factorisation of ``[..., m, n]``."""
    return over_batch(jnp.linalg.qr, matrices, matrices.ndim - 2)


def log_abs_det(matrices: Array) -> Array:
    """Returns log|det| in nats of ``[..., S, S]``; −inf for singular matrices."""
    return over_batch(lambda matrix: jnp.linalg.slogdet(matrix)[1], matrices, matrices.ndim - 2)


def spectral_norm(matrices: Array) -> Array:
    """Returns the largest singular value of ``[..., m, n]``."""
    return over_batch(lambda matrix: jnp.linalg.norm(matrix, 2), matrices, matrices.ndim - 2)


def singular_values(matrices: Array) -> Array:
    """Returns the singular values of ``[..., m, n]``, descending."""
    return over_batch(lambda matrix: jnp.linalg.svd(matrix, compute_uv=False), matrices, matrices.ndim - 2)
