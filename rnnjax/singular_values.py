"""All singular values of long products, in logs."""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from rnnjax import lapack, products
from rnnjax.jacobi import log_singular_values_of_rows
from rnnjax.products import FactoredProduct
from rnnjax.typing import Array, DType


@flax.struct.dataclass
class SingularSpectrum:
    """All singular values of a product, and what they rest on.

    Attributes:
      log_singular_values: log σ_i in nats, ``[..., S]``, descending; −inf where rank is lost.
      error_estimate: how far rounding may have moved each, nats, ``[..., S]``; 0 where rank is lost, infinite where it
        seems to be though no step is singular.
      log_abs_det: Σ_t log|det A_t| in nats, ``[...]``, computed from each step on its own.
      residual: Σ_i log σ_i − Σ_t log|det A_t| in nats, ``[...]``; 0 where both are −inf.
      num_factorizations: LU and QR factorisations of the product, int32 ``[...]``.
      num_sweeps: Jacobi sweeps, int32 ``[...]``; 0 where a plain SVD served.
      first_non_finite_step: as in ``FactoredProduct``.
    """

    log_singular_values: Array
    error_estimate: Array
    log_abs_det: Array
    residual: Array
    num_factorizations: Array
    num_sweeps: Array
    first_non_finite_step: Array


def log_singular_values(product: FactoredProduct) -> Array:
    """Returns the logs of all singular values of a product, each to the accuracy of its steps.

    With P = Q diag(e^ℓ) V, the singular values are those of diag(e^ℓ) V. QR iterations and one-sided Jacobi rotations
    make its rows orthogonal; each row is kept as a unit vector and a log norm, so nothing overflows, and small singular
    values keep the relative accuracy that an SVD of the formed product loses.

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
    return singular_spectrum(product).log_singular_values


def singular_spectrum(product: FactoredProduct) -> SingularSpectrum:
    """Returns all log singular values of a product together with the evidence for them.

    Args:
      product: the factored product.

    Returns:
      The ``SingularSpectrum``.

    Raises:
      ValueError: not a ``FactoredProduct``.

    Example:
      >>> import jax, rnnjax
      >>> chain = rnnjax.testing.chain_of_steps(jax.random.key(0), 500, 8, condition_number=100.0)
      >>> spectrum = singular_spectrum(rnnjax.factor_product(chain))
      >>> bool(abs(spectrum.residual) < spectrum.error_estimate.sum())
      True
    """
    products.check_product("product", product)
    with products.factorization_precision(product.log_scales.dtype, None) as wide:
        values, residual, sweeps = _all_values(product, wide)
    return SingularSpectrum(
        log_singular_values=values,
        error_estimate=products.estimate_of_lost(product.error_estimate, jnp.isneginf(values), product.log_abs_det),
        log_abs_det=product.log_abs_det,
        residual=residual,
        num_factorizations=product.num_factorizations,
        num_sweeps=sweeps,
        first_non_finite_step=product.first_non_finite_step,
    )


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
    products.check_product("product", product)
    scales = product.log_scales + product.log_scales_remainder
    largest = scales.max(axis=-1)
    relative = jnp.exp(scales - jnp.where(jnp.isfinite(largest), largest, 0)[..., None])
    return largest + jnp.log(lapack.spectral_norm(relative[..., None] * product.right))


@functools.partial(jax.jit, static_argnames="wide")
def _all_values(product: FactoredProduct, wide: DType) -> tuple[Array, Array, Array]:
    """Returns log σ, the residual of their sum, taken before they are rounded, and the number of sweeps."""
    own, fields = product.log_scales.dtype, (product.log_scales, product.log_scales_remainder, product.right)

    def single(one: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array]:
        *factors, log_abs_det = (leaf.astype(wide) for leaf in one)
        values, sweeps = log_singular_values_of_rows(*factors)
        both_lost = jnp.isneginf(values).any() & jnp.isneginf(log_abs_det)
        residual = jnp.where(both_lost, 0, values.sum() - jnp.where(both_lost, 0, log_abs_det))
        return values.astype(own), residual.astype(own), sweeps

    return lapack.over_batch(single, (*fields, product.log_abs_det), product.log_abs_det.ndim)
