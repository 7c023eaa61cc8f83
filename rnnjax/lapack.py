"""Matrix products at full precision, and factorisations of many matrices, one at a time on CPU.

On CPU a batched LAPACK call is a loop in any case, and inside a compiled loop XLA may wait for ever for the threads it
hands the batch to (seen with jaxlib 0.10.2: a scan of QR factorisations of two 128 × 128 matrices on two cores). One
matrix a call is as fast and always returns. On accelerators the batch goes to the device's own batched routines.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnnjax.typing import Array


def over_batch(function: Callable[[Any], Any], tree: Any, num_axes: int) -> Any:
    """Applies ``function`` to each element of a batch, one at a time on CPU, all at once elsewhere.

    Args:
      function: takes a pytree of arrays and returns one.
      tree: its arrays have the same ``num_axes`` leading batch axes.
      num_axes: how many batch axes there are.

    Returns:
      The results, with the batch axes leading.
    """
    if num_axes == 0:
        return function(tree)
    batch_shape = jax.tree.leaves(tree)[0].shape[:num_axes]
    flat = jax.tree.map(lambda leaf: leaf.reshape(math.prod(batch_shape), *leaf.shape[num_axes:]), tree)
    results = jax.lax.map(function, flat) if jax.default_backend() == "cpu" else jax.vmap(function)(flat)
    return jax.tree.map(lambda leaf: leaf.reshape(*batch_shape, *leaf.shape[1:]), results)


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


def triangle(matrices: Array) -> Array:
    """Returns R of the reduced QR factorisation of ``[..., m, n]``, at half of its cost."""
    return over_batch(lambda matrix: jnp.linalg.qr(matrix, mode="r"), matrices, matrices.ndim - 2)


def lu(columns: Array) -> tuple[Array, Array, Array]:
    """Returns the factorisation columns[rows] = L U of one ``[m, n]``, m ≥ n, with partial pivoting.

    Returns:
      The rows in the order of their pivots, int32 ``[m]``; L ``[m, n]`` with ones on the diagonal; U ``[n, n]``.
    """
    packed, pivots, rows = jax.lax.linalg.lu(columns)
    if jax.default_backend() == "cpu":
        rows = _rows(pivots, columns.shape[0])
    unit = jnp.tril(packed, -1) + jnp.eye(columns.shape[0], columns.shape[1], dtype=packed.dtype)
    return rows.astype(jnp.int32), unit, jnp.triu(packed[: columns.shape[1]])


@jax.custom_jvp
def lu_of_transpose_in_place(matrix: Array) -> tuple[Array, Array, Array]:
    """Returns what LAPACK's getrf leaves of the transpose of one ``[n, n]`` on CPU, nothing of it held elsewhere.

    ``jax.lax.linalg.lu`` checks the status and keeps what LAPACK wrote beside what it returns.

    Returns:
      L and U of the transpose in one matrix, transposed, ``[n, n]``; with which row each was exchanged, from 1, int32
      ``[n]``; the status, int32.
    """
    size, kind = len(matrix), {"float32": "s", "float64": "d"}[matrix.dtype.name]
    shapes = [((size, size), matrix.dtype), ((size,), jnp.int32), ((), jnp.int32)]
    # JAX keeps the target's name and arguments stable: exported programs hold them.
    call = jax.ffi.ffi_call(
        f"lapack_{kind}getrf_ffi",
        tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes),
        vmap_method="sequential",
        input_output_aliases={0: 0},
    )
    packed, exchanges, status = call(matrix)
    return packed, exchanges, status


@lu_of_transpose_in_place.defjvp
def _lu_of_transpose_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    packed, exchanges, status = lu_of_transpose_in_place(*primals)
    change = jax.jvp(lambda matrix: jax.lax.linalg.lu(matrix.T)[0].T, primals, tangents)[1]
    return (packed, exchanges, status), (change, *(np.zeros(x.shape, jax.dtypes.float0) for x in (exchanges, status)))


def _rows(pivots: Array, size: int) -> Array:
    """Returns the rows in the order of their pivots, given with which row each was exchanged.

    Row x of the order is s_0(s_1(… s_{n−1}(x))), where s_i exchanges i and ``pivots[i]``: nothing is looked up on the
    way, as in JAX's own loop on CPU, so that several exchanges are one pass.
    """
    order = jnp.arange(size, dtype=pivots.dtype)

    def exchanged(row: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        first, second = pair
        return jnp.where(row == first, second, jnp.where(row == second, first, row)), None

    return jax.lax.scan(exchanged, order, (order[: pivots.shape[0]], pivots), reverse=True, unroll=8)[0]


def log_abs_det(matrices: Array) -> Array:
    """Returns log|det| in nats of ``[..., S, S]``; −inf for singular matrices.

    It is that of the transpose, whose columns, which LAPACK wants one after the other in memory, are rows that are so.
    """
    return over_batch(lambda matrix: jnp.linalg.slogdet(matrix.T)[1], matrices, matrices.ndim - 2)


def spectral_norm(matrices: Array) -> Array:
    """Returns the largest singular value of ``[..., m, n]``."""
    return over_batch(lambda matrix: jnp.linalg.norm(matrix, 2), matrices, matrices.ndim - 2)


def singular_values(matrices: Array) -> Array:
    """Returns the singular values of ``[..., m, n]``, descending."""
    return over_batch(lambda matrix: jnp.linalg.svd(matrix, compute_uv=False), matrices, matrices.ndim - 2)
