"""What tests of recurrent networks need: matrices of prescribed spectra, exact references, tolerances.

The rest of the library imports nothing from here, so that what is tested and what it is tested against stay apart.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnnjax import validation
from rnnjax.typing import Array, ArrayLike, DType, Key

_PRIME = 2**521 - 1
_GUARD_DIGITS = 30


def tolerance(dtype: DType, scale: float = 1.0) -> float:
    r"""The tolerance :math:`\text{scale} \cdot \sqrt{\varepsilon}` of a dtype.

    It suits what is compared across different algorithms, convergence criteria and finite differences.

    Args:
      dtype: a floating-point dtype.
      scale: the factor in front, for instance the size of the values that are compared.

    Returns:
      ``scale`` times the square root of the machine epsilon of ``dtype``.

    Raises:
      ValueError: if ``dtype`` is not a floating-point dtype or ``scale`` is not positive.

    Example:
      >>> f"{tolerance('float32'):.2e}", f"{tolerance('float64', scale=10):.2e}"
      ('3.45e-04', '1.49e-07')
    """
    return validation.positive_number("scale", scale) * math.sqrt(_machine_epsilon(dtype))


def rounding_tolerance(dtype: DType, scale: float = 1.0) -> float:
    r"""The tolerance :math:`\text{scale} \cdot \varepsilon` of a dtype.

    It suits two evaluations of the same formula, which differ by rounding alone.

    Args:
      dtype: a floating-point dtype.
      scale: the number of roundings to allow, times the size of the values that are compared.

    Returns:
      ``scale`` times the machine epsilon of ``dtype``.

    Raises:
      ValueError: if ``dtype`` is not a floating-point dtype or ``scale`` is not positive.

    Example:
      >>> f"{rounding_tolerance('float32', scale=8):.2e}"
      '9.54e-07'
    """
    return validation.positive_number("scale", scale) * _machine_epsilon(dtype)


def matrix_of_spectrum(key: Key, singular_values: ArrayLike, dtype: DType = None) -> Array:
    r"""A random matrix with prescribed singular values, :math:`A = U \operatorname{diag}(\sigma) V^\top`.

    U and V are independent and uniform on the orthogonal group (Haar measure). The matrix is computed in ``dtype``,
    so its singular values are the prescribed ones to within machine epsilon times the largest.

    Args:
      key: a key of ``jax.random.key``.
      singular_values: ``[..., S]``, at least 0, in any order; leading axes give that many independent matrices.
      dtype: the floating-point dtype of the result; that of ``singular_values`` when None.

    Returns:
      ``[..., S, S]``.

    Raises:
      ValueError: if ``singular_values`` has no axis, is empty, negative or not finite.

    Example:
      >>> matrix = matrix_of_spectrum(jax.random.key(0), jnp.array([4.0, 2.0, 0.5]))
      >>> print(jnp.linalg.svd(matrix, compute_uv=False).round(4))
      [4.  2.  0.5]

    References:
      F. Mezzadri, "How to generate random matrices from the classical compact groups", 2007.
    """
    sigma = jnp.asarray(singular_values, dtype)
    if sigma.ndim == 0 or sigma.size == 0 or not jnp.issubdtype(sigma.dtype, jnp.floating):
        raise ValueError(
            f"singular_values must be a non-empty floating-point array [..., S], got {sigma.dtype}{list(sigma.shape)}"
        )
    validation.finite("singular_values", sigma)
    if validation.is_concrete(sigma) and bool((sigma < 0).any()):
        raise ValueError(f"singular_values must be at least 0, got {sigma.min()}")
    left_key, right_key = jax.random.split(key)
    *batch_shape, size = sigma.shape
    left = jax.random.orthogonal(left_key, size, tuple(batch_shape), sigma.dtype)
    right = jax.random.orthogonal(right_key, size, tuple(batch_shape), sigma.dtype)
    return jnp.einsum("...ij,...j,...jk->...ik", left, sigma, right, precision=jax.lax.Precision.HIGHEST)


def chain_of_steps(
    key: Key, num_steps: int, state_size: int, *, condition_number: float, gain: float = 1.0, dtype: DType = jnp.float32
) -> Array:
    r"""Random step Jacobians :math:`J_1, \ldots, J_T` that all have the same condition number.

    The singular values of each step run geometrically from :math:`g \sqrt{\kappa}` down to
    :math:`g / \sqrt{\kappa}`, so that :math:`\log|\det J_t| = S \ln g`; their orthogonal factors are independent and
    uniform, so the steps neither commute nor are symmetric.

    Args:
      key: a key of ``jax.random.key``.
      num_steps: T.
      state_size: S.
      condition_number: κ, the largest singular value of a step over its smallest, at least 1.
      gain: g, the geometric mean of the singular values of a step.
      dtype: the floating-point dtype of the result.

    Returns:
      ``[T, S, S]``, time on axis 0.

    Raises:
      ValueError: if a size is not a positive integer, or ``condition_number`` or ``gain`` is out of range.

    Example:
      >>> chain = chain_of_steps(jax.random.key(0), 5, 3, condition_number=100.0)
      >>> print(chain.shape, jnp.linalg.cond(chain[0]).round())
      (5, 3, 3) 100.0
    """
    shape = (validation.positive_integer("num_steps", num_steps), validation.positive_integer("state_size", state_size))
    kappa = validation.number_between("condition_number", condition_number, 1, np.finfo(np.float64).max)
    if state_size == 1 and kappa != 1:
        raise ValueError(f"condition_number must be 1 where state_size is 1, got {condition_number!r}")
    half = 0.5 * math.log(kappa)
    sigma = validation.positive_number("gain", gain) * np.exp(np.linspace(half, -half, state_size))
    return matrix_of_spectrum(key, np.broadcast_to(sigma, shape), dtype)


def exact_log_singular_values(jacobians: np.ndarray, digits: int | None = None) -> np.ndarray:
    r"""All :math:`\log \sigma_i(J_T \cdots J_1)`, exact to the last digits of float64.

    Floating-point numbers are integers times a power of two, so the product is formed exactly in integers, and its rank
    is that of the integers modulo a large prime. The eigenvalues of its Gram matrix are computed by mpmath with as
    many digits as their range asks for, and computed again with more digits until both agree. The time grows as
    :math:`S^3 T^2`: seconds for S = 12, T = 400. This needs the package mpmath.

    Args:
      jacobians: ``[T, S, S]``, finite, floating point, :math:`J_1` first; taken as exact numbers.
      digits: decimal digits to begin with, raised until they suffice; derived from an estimate of the range of the
        singular values when None.

    Returns:
      ``[S]`` in float64, natural logs, descending; ``-inf`` for each singular value that is exactly 0.

    Raises:
      ValueError: if ``jacobians`` is not a finite floating-point array ``[T, S, S]``.

    Example:
      >>> cat_map = np.array([[2.0, 1.0], [1.0, 1.0]])
      >>> print(exact_log_singular_values(np.stack([cat_map] * 1000)))
      [ 962.42365012 -962.42365012]
    """
    steps = _checked_chain(jacobians)
    product, exponent = _exact_product(steps)
    rank = _rank(product)
    result = np.full(steps.shape[-1], -np.inf)
    if rank:
        digits = _digits_for(steps, rank) if digits is None else validation.positive_integer("digits", digits)
        result[:rank] = _converged_logs(product, exponent, rank, digits)
    return result


def chain_of_factors(carry_derivatives: ArrayLike, recurrent_derivatives: ArrayLike, kernel: ArrayLike) -> np.ndarray:
    r"""A chain with the product of :math:`J_t = P_t + D_t U^\top`, without the rounding that forming J would bring.

    :math:`J = [D\;P] \, [U^\top\;0; I]`, both padded with zeros to square matrices of size N = (C + G) H.

    Args:
      carry_derivatives: P, ``[T, C, C, H]``, as in ``StructuredJacobians``.
      recurrent_derivatives: D, ``[T, C, G, H]``.
      kernel: U, ``[H, G, H]``.

    Returns:
      ``[2T, N, N]`` in float64: the right factor of step 1, its left factor, those of step 2, and so on. The product
      has the C·H singular values of :math:`J_T \cdots J_1`, and zeros.

    Example:
      >>> chain = chain_of_factors(np.full([3, 1, 1, 1], 0.5), np.full([3, 1, 1, 1], 2.0), np.full([1, 1, 1], 0.75))
      >>> print(np.exp(exact_log_singular_values(chain)).round(3))  # (½ + 2 · ¾)³ and 0
      [8. 0.]
    """
    by_carry, by_gate, kernel = (np.asarray(x, np.float64) for x in (carry_derivatives, recurrent_derivatives, kernel))
    num_steps, num_carries, num_gates, hidden = by_gate.shape
    through, state = num_gates * hidden, num_carries * hidden
    chain, units = np.zeros((num_steps, 2, through + state, through + state)), np.arange(hidden)
    chain[:, 0, :through, :hidden] = kernel.reshape(hidden, through).T
    chain[:, 0, through:, :state] = np.eye(state)
    for a in range(num_carries):
        for g in range(num_gates):
            chain[:, 1, a * hidden + units, g * hidden + units] = by_gate[:, a, g]
        for b in range(num_carries):
            chain[:, 1, a * hidden + units, through + b * hidden + units] = by_carry[:, a, b]
    return chain.reshape(2 * num_steps, *chain.shape[2:])


def _machine_epsilon(dtype: DType) -> float:
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(f"dtype must be a floating-point dtype, got {jnp.dtype(dtype).name}")
    return float(jnp.finfo(dtype).eps)


def _checked_chain(jacobians: Any) -> np.ndarray:
    steps = np.asarray(jacobians)
    square = steps.ndim == 3 and steps.shape[1] == steps.shape[2]
    if not square or not steps.size or not jnp.issubdtype(steps.dtype, jnp.floating):
        raise ValueError(
            f"jacobians must be a non-empty floating-point array [T, S, S], got {steps.dtype}{list(steps.shape)}"
        )
    steps = steps.astype(np.float64)
    validation.finite("jacobians", steps)
    return steps


def _exact_product(steps: np.ndarray) -> tuple[np.ndarray, int]:
    """Integers N and an exponent e with J_T … J_1 = N · 2^e."""
    product = np.eye(steps.shape[-1], dtype=int).astype(object)
    exponent = 0
    for step in steps:
        ratios = [value.as_integer_ratio() for value in step.ravel().tolist()]
        denominator = max(below for _, below in ratios)
        integers = np.array([above * (denominator // below) for above, below in ratios], dtype=object)
        product = integers.reshape(step.shape) @ product
        exponent -= denominator.bit_length() - 1
    return product, exponent


def _rank(product: np.ndarray) -> int:
    """Rank by Gaussian elimination modulo a prime: smaller than the true rank with a probability of about 2^-520."""
    rows = [[int(value) % _PRIME for value in row] for row in product]
    rank = 0
    for column in range(len(rows)):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        inverse = pow(rows[rank][column], -1, _PRIME)
        for i in range(rank + 1, len(rows)):
            factor = rows[i][column] * inverse % _PRIME
            rows[i] = [(a - factor * b) % _PRIME for a, b in zip(rows[i], rows[rank], strict=True)]
        rank += 1
    return rank


def _digits_for(steps: np.ndarray, rank: int) -> int:
    """Digits that a Gram matrix with this range of singular values needs; the range is estimated by repeated QR."""
    basis = np.eye(steps.shape[-1])
    logs = np.zeros(steps.shape[-1])
    with np.errstate(divide="ignore"):
        for step in steps:
            basis, triangle = np.linalg.qr(step @ basis)
            logs += np.log(np.abs(np.diag(triangle)))
    leading = np.sort(logs)[::-1][:rank]
    leading = leading[np.isfinite(leading)]
    extent = np.ptp(leading) if leading.size else 0.0
    return math.ceil(2 * extent / math.log(10)) + _GUARD_DIGITS


def _converged_logs(product: np.ndarray, exponent: int, rank: int, digits: int) -> np.ndarray:
    """The leading logs, with more digits each time until one more pass changes none of them."""
    while True:
        logs = _logs_from_gram(product, exponent, rank, digits)
        again = _logs_from_gram(product, exponent, rank, digits + _GUARD_DIGITS)
        if np.isfinite(again).all() and np.allclose(logs, again, rtol=1e-15, atol=1e-15):
            return again
        digits *= 2


def _logs_from_gram(product: np.ndarray, exponent: int, rank: int, digits: int) -> np.ndarray:
    import mpmath

    with mpmath.workdps(digits):
        scale = max(abs(int(value)) for value in product.flat)
        matrix = mpmath.matrix(product.tolist()) / scale
        eigenvalues = mpmath.eigsy(matrix.T * matrix, eigvals_only=True)
        shift = mpmath.log(scale) + exponent * mpmath.log(2)
        squares = sorted(eigenvalues, reverse=True)[:rank]
        return np.array([float(mpmath.log(square) / 2 + shift) if square > 0 else -np.inf for square in squares])
