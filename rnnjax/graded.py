"""Graded factors of a long product, and the factorisations that keep them well conditioned.

A product P is kept as P = L · diag(e^ℓ) · V, with L well conditioned or orthogonal, ℓ in logs and descending, and V
well conditioned. Columns B that stand for P = B · diag(e^ℓ) · V are factored B = L U with U upper triangular, and

    ℓ'_i = ℓ_i + log|U_ii|,    V' = (U_ij e^(ℓ_j − ℓ'_i))_ij · V,

with columns sorted by e^ℓ_j ‖B_j‖, so that no exponential is large and underflow is harmless. Inside a long product L
comes from Gaussian elimination with partial pivoting: L need not be orthogonal there, only well conditioned, and
elimination costs a fraction of a QR factorisation. At its end L = Q comes from Householder QR with rows sorted by size.
Both are accurate row by row (Cox & Higham 1998; Higham 2002, section 9), which matters because the rows of a Jacobian
D·Uᵀ differ by orders of magnitude once units saturate.

References: D. E. Stewart, A new algorithm for the SVD of a long product of matrices and the stability of products,
ETNA 5, 1997; A. J. Cox & N. J. Higham, Stability of Householder QR factorization for weighted least squares problems,
1998; N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, 2002.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rnnjax import lapack
from rnnjax.typing import Array, DType

_PROBES = 2
_SMALL = 32
_MANY_PRODUCTS = 2**23
"""Multiplications from which on XLA spreads a product of matrices over several cores of a CPU."""


@flax.struct.dataclass
class Factors:
    """L, ℓ = log_scales + remainder, and V of P = L · diag(e^ℓ) · V."""

    left: Array
    log_scales: Array
    remainder: Array
    right: Array


@flax.struct.dataclass
class Triangular:
    """Sorted columns B[:, order] = left · triangle, for B ``[S, b]``, b ≤ S.

    Attributes:
      order: int32 ``[b]``.
      rows: int32 ``[S]``, the row of B that row i of ``sorted_left`` stands for.
      sorted_left: ``[S, b]``, orthonormal, or lower triangular with ones on the diagonal.
      triangle: upper triangular ``[b, b]``.
    """

    order: Array
    rows: Array
    sorted_left: Array
    triangle: Array

    @property
    def left(self) -> Array:
        """``[S, b]``, rows as in B."""
        return jnp.zeros_like(self.sorted_left).at[self.rows].set(self.sorted_left)


def eliminated(columns: Array, log_scales: Array) -> Triangular:
    """Factors sorted columns by Gaussian elimination with partial pivoting."""
    return _rank_revealing(lapack.lu, columns, log_scales)


def orthogonalized(columns: Array, log_scales: Array) -> Triangular:
    """Factors sorted columns by Householder QR with rows sorted by their largest entry, descending."""
    rows = _by_largest_entry(columns)
    return _rank_revealing(lambda ordered: (rows, *lapack.qr(ordered[rows])), columns, log_scales)


def _triangularized(columns: Array, log_scales: Array) -> Triangular:
    """Does the same, and leaves ``sorted_left`` empty, at half of the cost."""
    rows, nothing = _by_largest_entry(columns), jnp.zeros((len(columns), 0), columns.dtype)
    return _rank_revealing(lambda ordered: (rows, nothing, lapack.triangle(ordered[rows])), columns, log_scales)


def _by_largest_entry(columns: Array) -> Array:
    """Returns the rows from that with the largest entry to that with the smallest, int32."""
    return jnp.argsort(-jnp.abs(columns).max(axis=1)).astype(jnp.int32)


@flax.struct.dataclass
class Condition:
    """How much rounding in eliminated columns B = L U is amplified, rows and columns of B scaled to size 1.

    Attributes:
      whole: about ‖B̃⁻¹‖_F.
      vanished: whether the pivot of a direction that counts is zero.
      rows: about ‖(L̃⁻¹)_i‖, ``[b]``; 0 for the columns of lost directions.
      triangle: U, with ones on the diagonal for those, ``[b, b]``.
      sizes: c, the norms of the columns of B, ``[b]``.
    """

    whole: Array
    vanished: Array
    rows: Array
    triangle: Array
    sizes: Array

    def of_pivots(self) -> Array:
        """Returns about the relative error of each pivot in units of rounding, ``[b]``, which moves its log scale.

        It is ‖(L̃⁻¹)_i‖ times the norm of column i of diag(c) U⁻¹, as d log|U_ii| = (L⁻¹ dB U⁻¹)_ii.
        """
        return self.rows * _columns_of_inverse(self.triangle, self.sizes)


def condition(factored: Triangular, columns: Array, log_scales: Array) -> Condition:
    """Estimates the condition of eliminated columns B, in which each row may be as inaccurate as its scale allows.

    Norms of inverses are taken from products with random signs z, as E‖A z‖² = ‖A‖_F².
    """
    live = log_scales > -jnp.inf
    norms, row_scales = _sizes(columns, live)
    pivots, norms = jnp.diagonal(factored.triangle), norms[factored.order]
    counts = live[factored.order] & (pivots != 0)
    lower, top = factored.sorted_left[: len(live)], factored.rows[: len(live)]
    signs = row_scales[top][:, None] * _random_signs(len(live), columns.dtype)
    solved = jnp.where(counts[:, None], _solve(lower, signs, lower=True), 0)
    invertible = factored.triangle + jnp.diag(jnp.where(counts, 0, 1 - pivots))
    whole = norms[:, None] * _solve(invertible, solved, lower=False)
    return Condition(
        whole=jnp.sqrt(jnp.sum(jnp.where(counts[:, None], whole, 0) ** 2) / _PROBES),
        vanished=(live[factored.order] & (pivots == 0)).any(),
        rows=_root_mean_square(solved),
        triangle=invertible,
        sizes=norms,
    )


def diagonal_errors(factored: Triangular, columns: Array, log_scales: Array) -> Array:
    """Returns about the relative error of each |R_ii| of orthogonalized columns, in units of rounding, ``[b]``.

    Rows are as inaccurate as their scale allows, so that it is ‖(Qᵀ D)_i‖ times the norm of column i of diag(c) R⁻¹ for
    rows of scale D; 0 for the columns of lost directions.
    """
    live = log_scales > -jnp.inf
    norms, row_scales = _sizes(columns, live)
    rows = factored.sorted_left * row_scales[factored.rows][:, None]
    diagonal = jnp.diagonal(factored.triangle)
    counts = live[factored.order] & (diagonal != 0)
    invertible = factored.triangle + jnp.diag(jnp.where(counts, 0, 1 - diagonal))
    by_column = _columns_of_inverse(invertible, norms[factored.order])
    return jnp.where(counts, jnp.sqrt(jnp.sum(rows**2, axis=0)) * by_column, 0)


def _sizes(columns: Array, live: Array) -> tuple[Array, Array]:
    """Returns the norms of the columns that count, and the largest entry of each row once those are scaled to 1."""
    norms = jnp.where(live, jnp.sqrt(jnp.sum(columns**2, axis=0)), 0)
    relative = jnp.abs(columns) / jnp.where(norms > 0, norms, 1)[None, :]
    return norms, jnp.where(live[None, :], relative, 0).max(axis=1)


def _columns_of_inverse(triangle: Array, sizes: Array) -> Array:
    """Returns about the norm of each column of diag(sizes) R⁻¹ for an upper triangle R, ``[b]``."""
    signs = sizes[:, None] * _random_signs(len(sizes), triangle.dtype)
    solved = jax.lax.linalg.triangular_solve(triangle.T, signs, left_side=True, lower=True)
    return jnp.maximum(_root_mean_square(solved), sizes / jnp.abs(jnp.diagonal(triangle)))


def _random_signs(count: int, dtype: DType) -> Array:
    return jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], (count, _PROBES)), dtype)


def _solve(triangle: Array, right: Array, *, lower: bool) -> Array:
    """Solves with the transpose of the transpose, whose columns lie together in memory, as LAPACK wants them."""
    return jax.lax.linalg.triangular_solve(triangle.T, right, left_side=True, lower=not lower, transpose_a=True)


def _root_mean_square(columns: Array) -> Array:
    return jnp.sqrt(jnp.sum(columns**2, axis=1) / _PROBES)


def regraded(factored: Triangular, factors: Factors) -> Factors:
    """Returns the factors of B · diag(e^ℓ) · V, for B factored and ℓ, V of ``factors``."""
    scales, remainder, mixing = _rescaled(factored, factors.log_scales, factors.remainder)
    return Factors(factored.left, scales, remainder, triangular_times(mixing, factors.right[factored.order]))


def _rescaled(factored: Triangular, log_scales: Array, remainder: Array) -> tuple[Array, Array, Array]:
    """Returns ℓ', what its float sums left out, and (U_ij e^(ℓ_j − ℓ'_i))_ij."""
    order, triangle = factored.order, factored.triangle
    scales, remainder = log_scales[order], remainder[order]
    new_scales, new_remainder = add(scales, remainder, jnp.log(jnp.abs(jnp.diagonal(triangle))))
    exponent = (scales[None, :] - new_scales[:, None]) + (remainder[None, :] - new_remainder[:, None])
    kept = _upper(len(order)) & jnp.isfinite(new_scales)[:, None] & (scales > -jnp.inf)[None, :]
    mixing = jnp.where(
        kept, triangle * jnp.exp(jnp.where(kept, exponent, 0)), jnp.eye(len(order), dtype=triangle.dtype)
    )
    return new_scales, new_remainder, mixing


def transposed(factors: Factors) -> Factors:
    """Returns the factors of Pᵀ = Vᵀ · diag(e^ℓ) · Lᵀ, with Vᵀ made orthogonal.

    Twice over it is a step of QR iteration: V comes closer to orthogonal by e^(ℓ_j − ℓ_i) for each pair of rows.
    """
    columns = factors.right.T
    return regraded(orthogonalized(columns, factors.log_scales), dataclasses.replace(factors, right=factors.left.T))


def transposed_rows(log_scales: Array, remainder: Array, rows: Array) -> tuple[Array, Array, Array]:
    """Returns ℓ', its remainder and V' with diag(e^ℓ) V = V'ᵀ diag(e^ℓ') Qᵀ: what ``transposed`` does, without Q."""
    factored = _triangularized(rows.T, log_scales)
    scales, remainder, mixing = _rescaled(factored, log_scales, remainder)
    return scales, remainder, jnp.zeros_like(mixing).at[:, factored.order].set(mixing, unique_indices=True)


def triangular_times(triangle: Array, matrix: Array) -> Array:
    """Returns the product of an upper triangle and a matrix, for the most part without the blocks that are zero."""
    size = len(triangle)
    # XLA has all cores take part in a large product, and one core in a quarter of it. Blocks of a small one cost more
    # than the zeros they leave out.
    is_one = size <= _SMALL or _MANY_PRODUCTS <= size**3 < 4 * _MANY_PRODUCTS
    block = size if is_one else -(-size // 4)
    rows = [lapack.matmul(triangle[start : start + block, start:], matrix[start:]) for start in range(0, size, block)]
    return jnp.concatenate(rows)


def _rank_revealing(
    factor: Callable[[Array], tuple[Array, Array, Array]], columns: Array, log_scales: Array
) -> Triangular:
    """Factors columns sorted by size, with columns that depend exactly on others at the end.

    A column that depends exactly on those before it leaves a zero on the diagonal. Where columns after it still reach
    into that row, the rank would be counted too low, so the dependent column is moved to the end and factored again.
    """
    positions = jnp.arange(len(log_scales), dtype=jnp.int32)
    by_size = jnp.argsort(-(log_scales + jnp.log(jnp.abs(columns).max(axis=0)))).astype(jnp.int32)

    def hiding(current: Triangular) -> Array:
        """Marks zeros on the diagonal with something to their right, in columns that still count."""
        live = log_scales[current.order] > -jnp.inf
        reaching = (current.triangle != 0) & _upper(len(live)) & live[None, :]
        return (jnp.diagonal(current.triangle) == 0) & reaching.any(axis=1)

    def unfinished(state: tuple[Array, Triangular]) -> Array:
        runs, current = state
        return (runs < len(log_scales)) & hiding(current).any()

    def factor_again(state: tuple[Array, Triangular]) -> tuple[Array, Triangular]:
        runs, current = state
        dependent = jax.lax.argmax(hiding(current), 0, jnp.int32)
        order = current.order[jnp.argsort(positions == dependent)]
        return runs + 1, Triangular(order, *factor(columns[:, order]))

    first = Triangular(by_size, *factor(columns[:, by_size]))
    # Zeros are rare, and a loop that is not entered would still copy its matrices.
    return jax.lax.cond(
        (jnp.diagonal(first.triangle) == 0).any(),
        lambda: jax.lax.while_loop(unfinished, factor_again, (jnp.zeros((), jnp.int32), first))[1],
        lambda: first,
    )


def diagonal_factors(scales: Array) -> Factors:
    """Returns the factors of diag(scales), for non-negative scales ``[S]``."""
    identity = jnp.eye(scales.shape[0], dtype=scales.dtype)
    return Factors(identity, jnp.log(scales), jnp.zeros_like(scales), identity)


def narrowed(factors: Factors, dtype: DType) -> Factors:
    """Rounds factors to ``dtype``; what the rounding takes from ℓ goes to its remainder."""
    total = factors.log_scales + factors.remainder
    scales = total.astype(dtype)
    lost = jnp.where(jnp.isfinite(total), (factors.log_scales - scales.astype(total.dtype)) + factors.remainder, 0)
    return Factors(factors.left.astype(dtype), scales, lost.astype(dtype), factors.right.astype(dtype))


def column_scales(matrix: Array) -> Array:
    """Returns the largest entry of each column once rows are equilibrated, as powers of two, ``[S]``.

    P = A_T … A_1 = Ã_T … Ã_1 · diag(c_1) with Ã_t = diag(c_{t+1}) A_t diag(c_t)⁻¹: the column scales of a matrix become
    row scales of the one before it in time, where elimination takes care of them, and a zero column becomes a zero row,
    so that rank loss stays exact. Scales are powers of two, so nothing is rounded.
    """
    magnitude = jnp.abs(matrix)
    rows = magnitude.max(axis=-1, keepdims=True)
    largest = (magnitude / jnp.where(rows > 0, rows, 1)).max(axis=-2)
    # Without mantissa bits a float is a power of two; jnp.exp2 would round.
    return jax.lax.reduce_precision(largest, jnp.finfo(largest.dtype).nexp, mantissa_bits=0)


def unscaled_rows(matrix: Array, scales: Array) -> Array:
    """Divides each row by its scale; rows of scale zero are zero and stay so."""
    return matrix / jnp.where(scales > 0, scales, 1)[:, None]


def add(total: Array, remainder: Array, term: Array) -> tuple[Array, Array]:
    """Adds ``term`` to a compensated sum (Neumaier 1974): ``total + remainder`` is the sum at twice the precision."""
    new = total + term
    lost = jnp.where(jnp.abs(total) >= jnp.abs(term), (total - new) + term, (term - new) + total)
    return new, remainder + jnp.where(jnp.isfinite(new), lost, 0)


def _upper(size: int) -> Array:
    """Returns the bool mask of the upper triangle, ``[S, S]``."""
    return jnp.tri(size, dtype=bool).T
