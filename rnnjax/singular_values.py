"""All singular values of long products, in logs."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rnnjax import lapack, products, validation
from rnnjax.cells import Cell
from rnnjax.jacobi import log_singular_values_of_rows
from rnnjax.jacobians import DenseJacobians, Jacobians, check_finite, step_jacobians
from rnnjax.products import FactoredProduct, Factors
from rnnjax.typing import Array, Carry, DType, Params
from rnnjax.unroll import trajectory


@flax.struct.dataclass
class SpectralProfile:
    """How every singular value of ∂s_T/∂s_{T−lag} shrinks or grows with the lag.

    Attributes:
      lags: ``[L]`` steps, ascending.
      log_singular_values: log σ_i of P(T, T − lag) in nats, ``[L, ..., S]``, descending in i; −inf where rank is lost.
      log_abs_det: Σ_t log|det J_t| over the lag's steps in nats, ``[L, ...]``, computed on its own: evidence to hold
        the sum of ``log_singular_values`` against.
    """

    lags: Array
    log_singular_values: Array
    log_abs_det: Array


def log_singular_values(product: FactoredProduct) -> Array:
    """Returns the logs of all singular values of a product, each to the accuracy of its steps.

    With P = Q diag(e^ℓ) V, the singular values are those of diag(e^ℓ) V. One-sided Jacobi rotations make its rows
    orthogonal; each row is kept as a unit vector and a log norm, so nothing overflows, and small singular values keep
    the relative accuracy that an SVD of the formed product loses.

    Args:
      product: the factored product.

    Returns:
      log σ_i in nats, ``[..., S]``, descending; −inf where rank is lost.

    Raises:
      ValueError: not a ``FactoredProduct``.

    Example:
      >>> import jax.numpy as jnp, rnnjax
      >>> cat_map = jnp.array([[2.0, 1.0], [1.0, 1.0]])
      >>> print(log_singular_values(rnnjax.factor_product(jnp.stack([cat_map] * 500))).round(1))
      [ 481.2 -481.2]

    Source: M. R. Hestenes, Inversion of matrices by biorthogonalization, 1958; J. Demmel et al., Computing the singular
    value decomposition with high relative accuracy, Linear Algebra and its Applications 299, 1999.
    """
    _check_product(product)
    return _all_values(product.log_scales, product.log_scales_remainder, product.right)


def log_spectral_norm(product: FactoredProduct) -> Array:
    """Returns log σ_1, the log of the spectral norm of a product.

    Args:
      product: the factored product.

    Returns:
      log ‖P‖₂ in nats, ``[...]``; −inf for a zero product.

    Raises:
      ValueError: not a ``FactoredProduct``.

    Example:
      >>> import jax.numpy as jnp, rnnjax
      >>> print(f"{log_spectral_norm(rnnjax.factor_product(jnp.full((700, 1, 1), 0.5))):.3f}")  # 700 ln ½
      -485.203
    """
    _check_product(product)
    scales = product.log_scales + product.log_scales_remainder
    largest = scales.max(axis=-1)
    relative = jnp.exp(scales - jnp.where(jnp.isfinite(largest), largest, 0)[..., None])
    return largest + jnp.log(lapack.spectral_norm(relative[..., None] * product.right))


def spectral_profile(
    cell: Cell,
    params: Params,
    inputs: Any,
    carry: Carry | None = None,
    *,
    lags: Sequence[int] | None = None,
    dtype: DType | None = None,
) -> SpectralProfile:
    """Returns all singular values of ∂s_T/∂s_{T−lag}, for several lags in one pass over the sequence.

    Args:
      cell: any cell.
      params: its weights.
      inputs: ``[T, ..., D]``, time-major.
      carry: the carry before the first step; ``cell.initialize_carry`` by default.
      lags: a sequence of numbers of steps, distinct, in [1, T]; all of them by default.
      dtype: what the factorisations are computed in, as for ``factor_product``.

    Returns:
      The ``SpectralProfile``.

    Raises:
      ValueError: inputs or weights that ``unroll`` would refuse; lags that are no sequence, empty, repeated or out of
        range; a dtype other than float32 and float64; a state or Jacobian that is not finite, with its step.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> cell = rnnjax.VanillaCell(3, activation="identity", recurrent_initializer=rnnjax.initializers.Orthogonal(0.5))
      >>> params = cell.init(jax.random.key(0), input_size=1)
      >>> profile = spectral_profile(cell, params, jnp.ones((8, 1)), lags=[1, 8])
      >>> print(profile.log_singular_values.round(3))  # lag · ln ½
      [[-0.693 -0.693 -0.693]
       [-5.545 -5.545 -5.545]]
    """
    cell.check(params, inputs, carry)
    ordered = _checked_lags(lags, jax.tree.leaves(inputs)[0].shape[0])
    with products.factorization_precision(jnp.float32, dtype):
        pass  # A dtype that it refuses is refused before any work is done.
    jacobians = step_jacobians(cell, params, trajectory(cell, params, inputs, carry))
    with products.factorization_precision(jacobians.dtype, dtype) as wide:
        scales, remainder, right, log_abs_det = _profile_factors(jacobians, ordered, wide)
    return SpectralProfile(ordered, _all_values(scales, remainder, right), log_abs_det)


def spectral_norm_profile(jacobians: Array | Jacobians) -> Array:
    """Returns log ‖∂s_T/∂s_{T−lag}‖₂ for every lag from 1 to T, at the cost of a product and a norm a step.

    A product in floats keeps the largest singular value, if not the small ones, and its scale is kept apart, so that
    nothing overflows. The exception is a direction that rounding has lost beside a larger one before a later factor
    annihilates the larger: what is left of the norm then is rounding, or zero. ``spectral_profile`` has no such limit.

    Args:
      jacobians: J_1 … J_T along axis 0, ``[T, ..., S, S]``, or what ``jacobian_operator`` returns.

    Returns:
      ``[T, ...]`` nats; entry i belongs to lag i + 1.

    Raises:
      ValueError: not a stack of square matrices, T = 0, or non-finite entries, with their step.

    Example:
      >>> import jax.numpy as jnp
      >>> print(spectral_norm_profile(jnp.stack([jnp.diag(jnp.array([0.1, 2.0]))] * 3)).round(3))
      [0.693 1.386 2.079]
    """
    if isinstance(jacobians, Jacobians):
        check_finite(jacobians)
        return _norm_profile(jacobians)
    return _norm_profile(DenseJacobians(products.checked_matrices(jacobians)))


def _check_product(product: FactoredProduct) -> None:
    if not isinstance(product, FactoredProduct):
        raise ValueError(
            f"product must be a FactoredProduct, what factor_product returns; got {type(product).__name__}"
        )


def _checked_lags(lags: Any, num_steps: int) -> Array:
    if lags is None:
        return jnp.arange(1, num_steps + 1)
    if isinstance(lags, (np.ndarray, jax.Array)):
        lags = np.asarray(lags).tolist()
    if not isinstance(lags, Sequence) or isinstance(lags, str):
        raise ValueError(f"lags must be a sequence of numbers of steps such as [1, 10, 100], got {lags!r}")
    ordered = sorted(validation.positive_integer("lags", lag) for lag in lags)
    if not ordered or len(set(ordered)) < len(ordered) or ordered[-1] > num_steps:
        raise ValueError(f"lags must be distinct numbers of steps in [1, {num_steps}], got {list(lags)}")
    return jnp.array(ordered)


@jax.jit
def _all_values(log_scales: Array, remainder: Array, rows: Array) -> Array:
    return jnp.vectorize(log_singular_values_of_rows, signature="(s),(s),(s,s)->(s)")(log_scales, remainder, rows)


@functools.partial(jax.jit, static_argnames="wide")
def _profile_factors(jacobians: Array, lags: Array, wide: DType) -> tuple[Array, Array, Array, Array]:
    """Returns ℓ, its remainder and V of each P(T, T − lag)ᵀ, and the log determinants, with axes ``[L, ...]``."""

    def single(chain: Array) -> tuple[Array, Array, Array, Array]:
        backwards = jnp.swapaxes(chain[::-1], -1, -2).astype(wide)  # P(T, T − lag)ᵀ grows on the left, one step a lag
        scales = products.column_scales(backwards)
        unscaled = products.without_column_scales(backwards, scales)
        row_scales = jnp.concatenate([scales[1:], jnp.ones_like(scales[:1])])

        def columns(lag: Array, factors: Factors) -> Array:
            return products.matmul(unscaled[lag - 1], factors.left)

        def advance(lag: Array, factors: Factors) -> Factors:
            return products.factor_columns(row_scales[lag - 1][:, None] * columns(lag, factors), factors)

        def at_lag(state: tuple[Array, Factors], lag: Array) -> tuple[tuple[Array, Factors], Factors]:
            done, factors = state
            factors = jax.lax.fori_loop(done + 1, lag, advance, factors)
            product = products.factor_columns(columns(lag, factors), factors)
            return (lag, advance(lag, factors)), product

        start = (jnp.zeros((), lags.dtype), products.diagonal_factors(scales[0]))
        _, factors = jax.lax.scan(at_lag, start, lags)
        factors = products.narrowed(factors, chain.dtype)
        determinants = jnp.cumsum(lapack.log_abs_det(backwards))[lags - 1].astype(chain.dtype)
        return factors.log_scales, factors.remainder, factors.right, determinants

    num_axes = jacobians.ndim - 3
    factors = lapack.over_batch(single, jnp.moveaxis(jacobians, 0, num_axes), num_axes)
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, num_axes, 0), factors)


@jax.jit
def _norm_profile(jacobians: Jacobians) -> Array:
    def step(state: tuple[Array, Array, Array], time: Array) -> tuple[tuple[Array, Array, Array], Array]:
        product, log_scale, remainder = state
        product = jacobians.at_step(time).transpose_times(product)
        largest = jnp.abs(product).max(axis=(-2, -1), keepdims=True)
        product = product / jnp.where(largest > 0, largest, 1)
        log_scale, remainder = products.add(log_scale, remainder, jnp.log(largest[..., 0, 0]))
        norm = log_scale + (remainder + jnp.log(lapack.spectral_norm(product)))
        return (product, log_scale, remainder), norm

    num_steps, shape = jacobians.shape[0], jacobians.shape[1:]
    identity = jnp.eye(shape[-1], dtype=jacobians.dtype).reshape((1,) * (len(shape) - 2) + tuple(shape[-2:]))
    zeros = jnp.zeros(shape[:-2], jacobians.dtype)
    start = (jnp.broadcast_to(identity, shape), zeros, zeros)
    _, norms = jax.lax.scan(step, start, jnp.arange(num_steps)[::-1])
    return norms
