"""Products of factored products: chunks of a chain, factored on their own, combined in any grouping.

For A = Q_a D_a V_a and B = Q_b D_b V_b with D = diag(e^ℓ), the product AB = Q_a (D_a M D_b) V_b has M = V_a Q_b in its
middle. Both diagonals span thousands of nats, so D_a M D_b is no matrix of floats. It is factored without being formed:

1. Gaussian elimination with complete pivoting, M = L diag(u) U with L and U unit triangular. Each pivot u is *chosen*
   by ℓ_a,i + log|M_ij| + ℓ_b,j, as the largest entry of D_a M D_b, but *computed* on M: scaling by diagonal matrices
   commutes with Schur complements.
2. L̃ = D_a L D_a⁻¹ diag(sign u) and Ũ = D_b⁻¹ U D_b have entries of at most about 1, and D_a M D_b = L̃ diag(e^d) Ũ with
   d = ℓ_a + log|u| + ℓ_b, each taken in the order of the pivots.
3. L̃ = Q R is well conditioned, so AB = (Q_a Q) · diag(e^ℓ) · V with ℓ_i = d_i + log|R_ii| and
   V = (R_ij e^(d_j − ℓ_i))_ij Ũ V_b.

References: J. Demmel et al., Computing the singular value decomposition with high relative accuracy, Linear Algebra and
its Applications 299, 1999 (complete pivoting of scaled matrices); C. Bauer, Fast and stable determinant quantum Monte
Carlo, SciPost Physics Core 2, 2020 (products of graded factors).
"""

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

from rnnjax import graded, lapack, products, validation
from rnnjax.graded import Factors
from rnnjax.products import FactoredProduct
from rnnjax.typing import Array, DType

_SAFETY = 10.0
"""What a first-order estimate of rounding is multiplied by, so that it is an upper bound in practice."""


@flax.struct.dataclass
class _Elimination:
    """What is left of M after some pivots.

    Attributes:
      schur: the Schur complement, ``[S, S]``, in M's own order of rows and columns.
      inverse_lower: Y with Y M = ``schur`` in the free rows, ``[S, S]``.
      inverse_upper: X with M X = ``schur`` in the free columns, ``[S, S]``.
      free_rows: rows that have held no pivot, bool ``[S]``.
      free_columns: columns that have held no pivot, bool ``[S]``.
    """

    schur: Array
    inverse_lower: Array
    inverse_upper: Array
    free_rows: Array
    free_columns: Array


@flax.struct.dataclass
class _Pivot:
    """A pivot u of M; the S of them have a leading axis ``[S]``.

    Attributes:
      row: int32, where it stands.
      column: int32.
      log_size: log|u| in nats; −inf where all that was left is zero.
      lower: its column of L diag(sign u), ``[S]``, in M's own order of rows.
      upper: its row of U, ``[S]``, in M's own order of columns.
      condition: change of log|u| for a change of size 1 in M, relative to M's rows: ‖yᵀ diag(‖M_i‖)‖ ‖x‖ / |u|, where
        u = yᵀ M x.
    """

    row: Array
    column: Array
    log_size: Array
    lower: Array
    upper: Array
    condition: Array


def multiply_products(
    later: FactoredProduct, earlier: FactoredProduct, *, dtype: DType | None = None
) -> FactoredProduct:
    """Multiplies two factored products: P = P_later · P_earlier.

    It is associative to rounding and not commutative: chunks of a chain may be factored on their own and combined in
    any grouping that keeps their order, for instance by ``jax.lax.associative_scan``, whose function gets the earlier
    one first.

    Args:
      later: P_later, what acts last, with batch axes ``...``.
      earlier: P_earlier, what acts first, in the shapes and dtype of ``later``.
      dtype: float32 or float64, what the product is computed in, as for ``factor_product``.

    Returns:
      The ``FactoredProduct``, in the dtype of its factors. Directions that either has lost are lost, exactly. Its
      ``first_non_finite_step`` is that of ``earlier`` if there is one, or else that of ``later``, counted from the
      first step of the factor that it is in.

    Raises:
      ValueError: not two factored products of the same shapes and dtype, or a dtype other than float32 and float64.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> jacobians = jnp.stack([jnp.array([[2.0, 1.0], [1.0, 1.0]])] * 3)
      >>> steps = rnnjax.factor_product(jacobians[None])  # each step a product of its own
      >>> prefixes = jax.lax.associative_scan(lambda earlier, later: multiply_products(later, earlier), steps)
      >>> print(*(f"{value:.3f}" for value in rnnjax.log_singular_values(prefixes)[:, 0]))
      0.962 1.925 2.887

    Source: J. Demmel et al., Computing the singular value decomposition with high relative accuracy, Linear Algebra and
    its Applications 299, 1999.
    """
    products.check_product("later", later)
    products.check_product("earlier", earlier)
    validation.same_shapes("earlier", earlier, later)
    validation.same_dtype("earlier", earlier.left, "later", later.left)
    with products.factorization_precision(later.left.dtype, dtype) as wide:
        return _multiply_products(later, earlier, wide)


def factor_product_over_mesh(
    matrices: Array, mesh: jax.sharding.Mesh, axis_name: str, *, dtype: DType | None = None
) -> FactoredProduct:
    """Multiplies a chain of matrices on several devices: each factors its share of the time, all combine the factors.

    Args:
      matrices: A_1 … A_T along axis 0, ``[T, ..., S, S]``, as for ``factor_product``, for any T.
      mesh: the devices.
      axis_name: the axis of ``mesh`` along which time is split; along the others the work is repeated.
      dtype: float32 or float64, what it is computed in, as for ``factor_product``.

    Returns:
      The ``FactoredProduct`` that one device would find, to rounding, on every device of the mesh. The factorisations
      it counts are those of all devices together.

    Raises:
      ValueError: what ``factor_product`` raises; not a mesh, or not one of its axes.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> mesh = jax.make_mesh((jax.device_count(),), ("time",))
      >>> cat_map = jnp.array([[2.0, 1.0], [1.0, 1.0]])
      >>> product = factor_product_over_mesh(jnp.stack([cat_map] * 501), mesh, "time")
      >>> print(rnnjax.log_singular_values(product).round(1))
      [ 482.2 -482.2]
    """
    if not isinstance(mesh, jax.sharding.Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, what jax.make_mesh returns; got {type(mesh).__name__}")
    validation.one_of("axis_name", axis_name, mesh.axis_names)
    matrices = products.checked_jacobians(matrices).dense()
    with products.factorization_precision(matrices.dtype, dtype) as wide:
        by_time = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis_name))
        padded = _with_identities(matrices, -len(matrices) % mesh.shape[axis_name])
        return _factor_product_over_mesh(jax.device_put(padded, by_time), mesh, axis_name, wide)


@functools.partial(jax.jit, static_argnames="wide")
def _multiply_products(later: FactoredProduct, earlier: FactoredProduct, wide: DType) -> FactoredProduct:
    num_axes = later.log_abs_det.ndim
    return lapack.over_batch(lambda pair: _product_of_pair(pair[0], pair[1], wide), (later, earlier), num_axes)


@functools.partial(jax.jit, static_argnames=("mesh", "axis_name", "wide"))
def _factor_product_over_mesh(matrices: Array, mesh: jax.sharding.Mesh, axis_name: str, wide: DType) -> FactoredProduct:
    def on_one_device(chunk: Array) -> FactoredProduct:
        product = products.factor_product(chunk.astype(wide), dtype=wide)
        start, step = jax.lax.axis_index(axis_name) * len(chunk), product.first_non_finite_step
        product = dataclasses.replace(product, first_non_finite_step=jnp.where(step >= 0, start + step, step))
        return _narrowed(_product_of_all(jax.lax.all_gather(product, axis_name), wide), matrices.dtype)

    time, everywhere = jax.sharding.PartitionSpec(axis_name), jax.sharding.PartitionSpec()
    # Every device computes the same result from what it gathered, which the check of replication cannot know.
    split = jax.shard_map(on_one_device, mesh=mesh, in_specs=time, out_specs=everywhere, check_vma=False)
    return split(matrices)


def _with_identities(matrices: Array, count: int) -> Array:
    """Appends identity matrices to a chain, which leave its product as it is."""
    if count == 0:
        return matrices
    shape = (count, *matrices.shape[1:])
    identity = jnp.eye(shape[-1], dtype=matrices.dtype).reshape((1,) * (len(shape) - 2) + shape[-2:])
    return jnp.concatenate([matrices, jnp.broadcast_to(identity, shape)])


def _product_of_all(parts: FactoredProduct, wide: DType) -> FactoredProduct:
    """Multiplies factored products along their first axis, the latest last, as a binary tree."""
    while (count := len(parts.log_abs_det)) > 1:
        paired = count - count % 2
        later, earlier, rest = (
            jax.tree.map(lambda leaf, which=which: leaf[which], parts)
            for which in (slice(1, paired, 2), slice(0, paired, 2), slice(paired, count))
        )
        parts = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), _multiply_products(later, earlier, wide), rest)
    return jax.tree.map(lambda leaf: leaf[0], parts)


def _narrowed(product: FactoredProduct, dtype: DType) -> FactoredProduct:
    """Rounds a product to ``dtype``."""
    factors = graded.narrowed(_widened_factors(product, product.left.dtype), dtype)
    rounded = float(jnp.finfo(dtype).eps) * jnp.where(jnp.isfinite(product.log_scales), product.log_scales, 0)
    return dataclasses.replace(
        product,
        left=factors.left,
        log_scales=factors.log_scales,
        log_scales_remainder=factors.remainder,
        right=factors.right,
        log_abs_det=product.log_abs_det.astype(dtype),
        error_estimate=jnp.hypot(product.error_estimate, rounded).astype(dtype),
    )


def _product_of_pair(later: FactoredProduct, earlier: FactoredProduct, wide: DType) -> FactoredProduct:
    """Returns later · earlier, without batch axes, computed in dtype ``wide``."""
    own = later.left.dtype
    first, second = _widened_factors(later, wide), _widened_factors(earlier, wide)
    pivots = _eliminate(first, second)
    factors = _factors_of_pivots(pivots, first, second)
    rounded = graded.narrowed(factors, own)
    inherited = jnp.hypot(later.error_estimate[pivots.row], earlier.error_estimate[pivots.column])
    bad_step = jnp.where(earlier.first_non_finite_step >= 0, earlier.first_non_finite_step, later.first_non_finite_step)
    return FactoredProduct(
        left=rounded.left,
        log_scales=rounded.log_scales,
        log_scales_remainder=rounded.remainder,
        right=rounded.right,
        log_abs_det=(later.log_abs_det.astype(wide) + earlier.log_abs_det.astype(wide)).astype(own),
        error_estimate=_error_estimate(inherited, pivots.condition.astype(own), rounded.log_scales),
        num_factorizations=later.num_factorizations + earlier.num_factorizations + 1,
        first_non_finite_step=bad_step,
    )


def _widened_factors(product: FactoredProduct, wide: DType) -> Factors:
    factors = Factors(product.left, product.log_scales, product.log_scales_remainder, product.right)
    return jax.tree.map(lambda leaf: leaf.astype(wide), factors)


def _error_estimate(inherited: Array, condition: Array, log_scales: Array) -> Array:
    """Returns how far rounding may have moved each log singular value, nats: the root of the sum of all squares.

    M is uncertain by its own rounding and by what the factors inherited. Their estimates are upper bounds, about
    ``_SAFETY``² times the typical error, and the typical error is what the condition of a pivot amplifies.
    """
    live = log_scales > -jnp.inf
    epsilon = float(jnp.finfo(log_scales.dtype).eps)
    middle = condition * jnp.sqrt((inherited / _SAFETY**2) ** 2 + (_SAFETY * epsilon) ** 2)
    rounded = epsilon * jnp.where(live, log_scales, 0)
    return jnp.where(live, jnp.sqrt(inherited**2 + middle**2 + rounded**2), 0)


def _factors_of_pivots(pivots: _Pivot, later: Factors, earlier: Factors) -> Factors:
    """Returns the factors of later · earlier, from the pivots of the middle matrix."""
    rows, columns, lost = pivots.row, pivots.column, pivots.log_size == -jnp.inf
    remainder = later.remainder[rows] + earlier.remainder[columns]
    scales, remainder = graded.add(later.log_scales[rows], remainder, earlier.log_scales[columns])
    scales, remainder = graded.add(scales, remainder, pivots.log_size)
    lower = _scaled(pivots.lower, later, rows, lost).T
    upper = _scaled(pivots.upper, earlier, columns, lost)
    middle = Factors(lower, scales, remainder, lapack.matmul(upper, earlier.right))
    result = graded.regraded(graded.orthogonalized(lower, scales), middle)
    return dataclasses.replace(result, left=lapack.matmul(later.left, result.left))


def _scaled(vectors: Array, factors: Factors, pivots: Array, lost: Array) -> Array:
    """Multiplies entry j of the vector of pivot i by e^(ℓ_j − ℓ_i); vectors of lost pivots stay as they are."""
    scales, remainder = factors.log_scales, factors.remainder
    exponents = (scales[None, :] - scales[pivots][:, None]) + (remainder[None, :] - remainder[pivots][:, None])
    largest = 0.99 * math.log(jnp.finfo(vectors.dtype).max)  # Only an entry that is zero, or nearly, has a larger one.
    return vectors * jnp.exp(jnp.where(lost[:, None], 0, jnp.minimum(exponents, largest)))


def _eliminate(later: Factors, earlier: Factors) -> _Pivot:
    """Returns the S pivots of M = V_a Q_b, the largest entry of what is left of D_a M D_b first."""
    middle, rank = lapack.matmul(later.right, earlier.left), _largest_rank(later, earlier)
    row_scales = (later.log_scales + later.remainder)[:, None]
    column_scales = (earlier.log_scales + earlier.remainder)[None, :]
    row_norms = jnp.sqrt(jnp.sum(middle**2, axis=1))

    def step(state: _Elimination, index: Array) -> tuple[_Elimination, _Pivot]:
        sizes = row_scales + jnp.log(jnp.abs(state.schur)) + column_scales
        row, column, largest = _largest(sizes, state.free_rows[:, None] & state.free_columns[None, :])
        lost = (largest == -jnp.inf) | (index >= rank)
        pivot = jnp.where(lost, 1, state.schur[row, column])
        lower = _unit_vector(state.schur[:, column] / pivot, state.free_rows & ~lost, row)
        upper = _unit_vector(state.schur[row] / pivot, state.free_columns & ~lost, column)
        y, x = state.inverse_lower[row], state.inverse_upper[:, column]
        found = _Pivot(
            row=row,
            column=column,
            log_size=jnp.where(lost, -jnp.inf, jnp.log(jnp.abs(pivot))),
            lower=lower * jnp.sign(pivot),
            upper=upper,
            condition=jnp.sqrt(jnp.sum((y * row_norms) ** 2) * jnp.sum(x**2)) / jnp.abs(pivot),
        )
        rest = _Elimination(
            schur=state.schur - lower[:, None] * state.schur[row][None, :],
            inverse_lower=state.inverse_lower - lower[:, None] * y[None, :],
            inverse_upper=state.inverse_upper - x[:, None] * upper[None, :],
            free_rows=state.free_rows.at[row].set(False),
            free_columns=state.free_columns.at[column].set(False),
        )
        return rest, found

    identity, free = jnp.eye(len(middle), dtype=middle.dtype), jnp.ones(len(middle), bool)
    start, indices = _Elimination(middle, identity, identity, free, free), jnp.arange(len(middle), dtype=jnp.int32)
    return jax.lax.scan(step, start, indices)[1]


def _largest_rank(later: Factors, earlier: Factors) -> Array:
    """Counts, int32, the states that live columns of Q_b reach and live rows of V_a read: M has no larger rank.

    V_a and Q_b are well conditioned, so that a state is missed, to rounding, only where rank is lost: a unit is dead.
    """
    tolerance = 16 * len(later.right) * float(jnp.finfo(later.right.dtype).eps)
    read = jnp.abs(jnp.where((later.log_scales > -jnp.inf)[:, None], later.right, 0)).max(axis=0)
    reached = jnp.abs(jnp.where((earlier.log_scales > -jnp.inf)[None, :], earlier.left, 0)).max(axis=1)
    return jnp.sum((read > tolerance * jnp.abs(later.right).max(axis=0)) & (reached > tolerance), dtype=jnp.int32)


def _largest(sizes: Array, free: Array) -> tuple[Array, Array, Array]:
    """Returns row and column of the largest of the free entries, and its size."""
    largest = jnp.where(free, sizes, -jnp.inf).max()
    # The maximum of bool: a jax.jit from outside, without float64, could not compile an argmax of float64.
    index = jax.lax.argmax((free & (sizes == largest)).ravel(), 0, jnp.int32)
    row, column = jnp.divmod(index, len(sizes))
    return row, column, largest


def _unit_vector(values: Array, kept: Array, index: Array) -> Array:
    """Returns ``values`` where ``kept``, 1 at ``index`` and 0 elsewhere."""
    return jnp.where(kept, values, 0).at[index].set(1)
