"""Long matrix products that neither overflow nor lose their small directions.

A product P = A_T … A_1 is kept in graded factors, P = Q · diag(e^ℓ) · V, with Q orthogonal, ℓ in logs and descending,
and V well conditioned. Multiplying by the next A needs one QR factorisation:

1. B = A Q; columns sorted by e^ℓ_j ‖B_j‖, rows by their largest entry, both descending; B = Q' R. Sorted columns
   replace pivoting; sorted rows make Householder QR accurate row by row (Cox & Higham 1998), which matters because
   the rows of a Jacobian D·Uᵀ differ by orders of magnitude once units saturate.
2. ℓ'_i = ℓ_i + log|R_ii|, in compensated sums.
3. V' = (R_ij e^(ℓ_j − ℓ'_i))_ij · V. Sorted, no exponent is large, and underflow is harmless.

Column scales of A_t are moved into the rows of A_{t−1} beforehand, where the row sorting takes care of them too.

References: D. E. Stewart, A new algorithm for the SVD of a long product of matrices and the stability of products,
ETNA 5, 1997; A. J. Cox & N. J. Higham, Stability of Householder QR factorization for weighted least squares problems,
1998; C. Bauer, Fast and stable determinant quantum Monte Carlo, SciPost Physics Core 2, 2020.
"""

import contextlib
import functools
from collections.abc import Iterator

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rnnjax import lapack, validation
from rnnjax.typing import Array, DType


@flax.struct.dataclass
class FactoredProduct:
    """A product P = A_T … A_1 of square matrices as P = left · diag(exp(log_scales)) · right.

    Attributes:
      left: Q, orthogonal, ``[..., S, S]``.
      log_scales: ℓ in nats, ``[..., S]``, nearly descending; −inf where rank is lost.
      log_scales_remainder: what the float sums of ``log_scales`` left out, nats, ``[..., S]``.
      right: V, well conditioned, ``[..., S, S]``.
      log_abs_det: Σ_t log|det A_t| in nats, ``[...]``, computed from each A_t on its own. It must equal the sum of
        all log singular values, and is the evidence that none of them is wrong.
    """

    left: Array
    log_scales: Array
    log_scales_remainder: Array
    right: Array
    log_abs_det: Array


@flax.struct.dataclass
class Factors:
    """Q, ℓ = scales + remainder, and V, without the evidence: what a scan over a chain carries."""

    left: Array
    log_scales: Array
    remainder: Array
    right: Array


def factor_product(matrices: Array, *, dtype: DType | None = None) -> FactoredProduct:
    """Multiplies a chain of matrices into graded factors of P = A_T … A_1.

    Args:
      matrices: A_1 … A_T along axis 0, ``[T, ..., S, S]``, float32 or float64 (narrower is widened to float32).
      dtype: float32 or float64, what the factorisations are computed in. float64 by default, also for float32 matrices
        and whatever JAX's own setting: an error of float32 grows to ε·κ·√T nats for steps of condition κ, and far
        beyond where neighbouring directions nearly meet. On TPU, which has no float64 QR, the default is the matrices'
        own dtype.

    Returns:
      The ``FactoredProduct``, with batch axes ``...``, in the dtype of the matrices.

    Raises:
      ValueError: not a stack of square matrices, T = 0, or non-finite entries, with their step.

    Example:
      >>> import jax.numpy as jnp
      >>> rotation = jnp.array([[0.0, -1.0], [1.0, 0.0]])
      >>> product = factor_product(jnp.stack([3.0 * rotation] * 1000))  # 3^1000 overflows
      >>> print(f"{product.log_abs_det:.2f} = 2000 ln 3")
      2197.22 = 2000 ln 3
    """
    matrices = checked_matrices(matrices)
    with factorization_precision(matrices.dtype, dtype) as wide:
        return _factor_product(matrices, wide)


def checked_matrices(matrices: Array) -> Array:
    """Returns ``matrices`` as float32 or float64 ``[T, ..., S, S]``, or raises ValueError."""
    matrices = jnp.asarray(matrices)
    if matrices.ndim < 3 or matrices.shape[-1] != matrices.shape[-2] or 0 in matrices.shape:
        raise ValueError(f"matrices must be square and at least one, [T, ..., S, S], got shape {matrices.shape}")
    validation.floating_dtype("matrices", matrices.dtype)
    validation.finite_steps("matrices", matrices)
    return matrices if jnp.finfo(matrices.dtype).bits >= 32 else matrices.astype(jnp.float32)


@contextlib.contextmanager
def factorization_precision(own: DType, asked: DType | None) -> Iterator[DType]:
    """Gives the dtype to factorise in, and switches float64 on for as long as the context lasts where that needs it."""
    if asked is None:
        asked = own if jax.default_backend() == "tpu" else jnp.float64
    name = asked if isinstance(asked, str) else np.dtype(asked).name
    wide = np.dtype(validation.one_of("dtype", name, ("float32", "float64")))
    wide = np.promote_types(wide, own)
    if wide == np.float64 and not validation.float64_enabled():
        with jax.enable_x64(True):
            yield wide
    else:
        yield wide


@functools.partial(jax.jit, static_argnames="wide")
def _factor_product(matrices: Array, wide: DType) -> FactoredProduct:
    def single(chain: Array) -> FactoredProduct:
        chain = chain.astype(wide)
        scaled, scales = move_column_scales(chain)
        factors, _ = jax.lax.scan(lambda f, a: (multiply(a, f), None), diagonal_factors(scales[0]), scaled)
        factors = narrowed(factors, matrices.dtype)
        determinant = log_abs_det(chain).astype(matrices.dtype)
        return FactoredProduct(factors.left, factors.log_scales, factors.remainder, factors.right, determinant)

    return lapack.over_batch(single, jnp.moveaxis(matrices, 0, -3), matrices.ndim - 3)


def narrowed(factors: Factors, dtype: DType) -> Factors:
    """Rounds factors to ``dtype``; what the rounding takes from ℓ goes to its remainder."""
    total = factors.log_scales + factors.remainder
    scales = total.astype(dtype)
    lost = jnp.where(jnp.isfinite(total), (factors.log_scales - scales.astype(total.dtype)) + factors.remainder, 0)
    return Factors(factors.left.astype(dtype), scales, lost.astype(dtype), factors.right.astype(dtype))


def log_abs_det(matrices: Array) -> Array:
    """Returns Σ_t log|det A_t| in nats over axis 0 of ``[T, S, S]``."""
    sums, remainders = jax.lax.scan(
        lambda total, term: (add(*total, term), None),
        (jnp.zeros((), matrices.dtype), jnp.zeros((), matrices.dtype)),
        lapack.log_abs_det(matrices),
    )[0]
    return sums + remainders


def move_column_scales(matrices: Array) -> tuple[Array, Array]:
    """Moves the column scales of each matrix into the rows of the one before it in time.

    A_T … A_1 = Ã_T … Ã_1 · diag(c_1) with Ã_t = diag(c_{t+1}) A_t diag(c_t)⁻¹ and c_{T+1} = 1. The scales are powers of
    two, so nothing is rounded; a zero column gives a zero scale, and from there a zero row: rank loss stays exact.

    Args:
      matrices: ``[T, S, S]``.

    Returns:
      Ã ``[T, S, S]`` and c ``[T, S]``.
    """
    scales = column_scales(matrices)
    later = jnp.concatenate([scales[1:], jnp.ones_like(scales[:1])])
    return later[:, :, None] * without_column_scales(matrices, scales), scales


def column_scales(matrices: Array) -> Array:
    """Returns the largest entry of each column once rows are equilibrated, as powers of two, ``[..., S]``."""
    magnitude = jnp.abs(matrices)
    rows = magnitude.max(axis=-1, keepdims=True)
    largest = (magnitude / jnp.where(rows > 0, rows, 1)).max(axis=-2)
    # Without mantissa bits a float is a power of two; jnp.exp2 would round.
    return jax.lax.reduce_precision(largest, jnp.finfo(largest.dtype).nexp, mantissa_bits=0)


def without_column_scales(matrices: Array, scales: Array) -> Array:
    """Divides each column by its scale; columns of scale zero are zero and stay so."""
    return matrices / jnp.where(scales > 0, scales, 1)[..., None, :]


def diagonal_factors(scales: Array) -> Factors:
    """Returns the factors of diag(scales), for non-negative scales ``[S]``."""
    identity = jnp.eye(scales.shape[0], dtype=scales.dtype)
    return Factors(identity, jnp.log(scales), jnp.zeros_like(scales), identity)


def multiply(matrix: Array, factors: Factors) -> Factors:
    """Returns the factors of ``matrix`` times the product that ``factors`` stand for, by one sorted QR."""
    return factor_columns(matmul(matrix, factors.left), factors)


def factor_columns(columns: Array, factors: Factors) -> Factors:
    """Returns the factors of B · diag(e^ℓ) · V, for B = ``columns`` and ℓ, V of ``factors``."""
    order, left, triangle = _sorted_qr(columns, factors.log_scales)
    scales, remainder = factors.log_scales[order], factors.remainder[order]
    new_scales, new_remainder = add(scales, remainder, jnp.log(jnp.abs(jnp.diagonal(triangle))))
    exponent = (scales[None, :] - new_scales[:, None]) + (remainder[None, :] - new_remainder[:, None])
    kept = _upper(len(order)) & jnp.isfinite(new_scales)[:, None] & (scales > -jnp.inf)[None, :]
    graded = triangle * jnp.exp(jnp.where(kept, exponent, 0))
    mixing = jnp.where(kept, graded, jnp.eye(len(order), dtype=triangle.dtype))
    return Factors(left, new_scales, new_remainder, matmul(mixing, factors.right[order]))


def _sorted_qr(columns: Array, log_scales: Array) -> tuple[Array, Array, Array]:
    """Returns a column order and the QR factors of the columns in that order, rows sorted while they are computed.

    A column that depends exactly on those before it leaves a zero on R's diagonal. Where columns after it still reach
    into that row, the rank would be counted too low, so the dependent column is moved to the end and the QR repeated.
    """
    rows = jnp.argsort(-jnp.abs(columns).max(axis=1))

    def factored(order: Array) -> tuple[Array, Array, Array]:
        left, triangle = lapack.qr(columns[rows][:, order])
        return order, left, triangle

    def hiding(order: Array, triangle: Array) -> Array:
        """Marks zeros on the diagonal with something to their right, in columns that still count."""
        reaching = (triangle != 0) & _upper(len(order)) & (log_scales[order] > -jnp.inf)[None, :]
        return (jnp.diagonal(triangle) == 0) & reaching.any(axis=1)

    def unfinished(state: tuple[Array, tuple[Array, Array, Array]]) -> Array:
        moves, (order, _, triangle) = state
        return (moves < len(order)) & hiding(order, triangle).any()

    def move_one(state: tuple[Array, tuple[Array, Array, Array]]) -> tuple[Array, tuple[Array, Array, Array]]:
        moves, (order, _, triangle) = state
        dependent = jax.lax.argmax(hiding(order, triangle), 0, jnp.int32)
        return moves + 1, factored(order[jnp.argsort(jnp.arange(len(order), dtype=jnp.int32) == dependent)])

    by_size = jnp.argsort(-(log_scales + jnp.log(jnp.abs(columns).max(axis=0))))
    _, (order, left, triangle) = jax.lax.while_loop(unfinished, move_one, (jnp.zeros((), jnp.int32), factored(by_size)))
    return order, jnp.zeros_like(left).at[rows].set(left), triangle


def _upper(size: int) -> Array:
    """Returns the bool mask of the upper triangle, ``[S, S]``."""
    return jnp.tri(size, dtype=bool).T


def matmul(left: Array, right: Array) -> Array:
    """Returns the product of two matrices at the highest precision.

    jnp.matmul would also name its output's dtype, and that is what JAX refuses when a compiled program that switched
    float64 on for itself is mapped by a ``jax.vmap`` from outside.
    """
    return jax.lax.dot(left, right, precision=jax.lax.Precision.HIGHEST)


def add(total: Array, remainder: Array, term: Array) -> tuple[Array, Array]:
    """Adds ``term`` to a compensated sum (Neumaier 1974): ``total + remainder`` is the sum at twice the precision."""
    new = total + term
    lost = jnp.where(jnp.abs(total) >= jnp.abs(term), (total - new) + term, (term - new) + total)
    return new, remainder + jnp.where(jnp.isfinite(new), lost, 0)
