"""The spectral norm of ∂s_T/∂s_{T−lag} for every lag, cheap enough to be left on during training."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rnnjax import graded, lapack, products
from rnnjax.operators import Jacobians
from rnnjax.typing import Array

_BLOCK = 8
_MAX_ITERATIONS = 20
_RESIDUAL = {"float32": 5e-4, "float64": 1e-7}
_LAGS_BETWEEN = 8
_HALVINGS = 3


@flax.struct.dataclass
class _Growing:
    """P(T, T − lag)ᵀ X = columns · e^(log_scale + remainder) for orthonormal X, and guesses of its leading directions.

    Attributes:
      lag: int32.
      columns: ``[S, b]``.
      log_scale: nats.
      remainder: nats.
      guesses: orthonormal rows, ``[m, b]``.
      norms: log spectral norms of the lags so far, ``[T]``.
    """

    lag: Array
    columns: Array
    log_scale: Array
    remainder: Array
    guesses: Array
    norms: Array


def spectral_norm_profile(jacobians: Array | Jacobians) -> Array:
    """Returns log ‖∂s_T/∂s_{T−lag}‖₂ for every lag from 1 to T, at about the cost of a product.

    A product in floats keeps the largest singular value, if not the small ones, and its scale is kept apart, so that
    nothing overflows. Directions that have shrunk below rounding beside the largest are left out from there on. The
    norm of each product comes from subspace iteration that starts from the leading directions at the lag before, with
    PPᵀ times a random one added, until the residual ‖PPᵀx − θ²x‖ of the leading pair is below 5e-4 θ² (1e-7 in
    float64), which bounds the error of log θ as long as no larger singular value went unseen; where it is not, from an
    SVD.

    The exception is a direction that rounding has lost beside a larger one before a later factor annihilates the
    larger: what is left of the norm then is rounding, or zero. ``spectral_profile`` has no such limit.

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

    Source: H. Rutishauser, Simultaneous iteration method for symmetric matrices, Numerische Mathematik 16, 1970.
    """
    return _norm_profile(products.checked_jacobians(jacobians))


@jax.jit
def _norm_profile(jacobians: Jacobians) -> Array:
    norms = products.over_sequences(_norms_of_sequence, jacobians)
    return jnp.moveaxis(norms, -1, 0)


def _norms_of_sequence(jacobians: Jacobians) -> Array:
    num_steps, size, _ = jacobians.shape
    zero, identity = jnp.zeros((), jacobians.dtype), jnp.eye(size, dtype=jacobians.dtype)
    guesses = identity[: min(_BLOCK, size)]
    norms = jnp.zeros(num_steps, jacobians.dtype)
    state = _Growing(jnp.zeros((), jnp.int32), identity, zero, zero, guesses, norms)
    for width in (size >> halvings for halvings in range(1, _HALVINGS + 1)):
        if width > _BLOCK:
            state = _narrowed(jacobians, state, width)
    state = jax.lax.fori_loop(state.lag, num_steps, lambda _, own: _one_lag(jacobians, own), state)
    return state.norms


def _narrowed(jacobians: Jacobians, state: _Growing, width: int) -> _Growing:
    """Goes on with the lags until the columns fit into ``width`` dimensions but for rounding, and leaves the others."""
    num_steps = jacobians.shape[0]
    epsilon = float(jnp.finfo(jacobians.dtype).eps)

    def unfinished(current: tuple[_Growing, Array]) -> Array:
        grown, rotated = current
        fits = jnp.sum(rotated[:, width:] ** 2) <= epsilon**2 * jnp.sum(rotated**2)
        return (grown.lag < num_steps) & ~fits

    def some_lags(current: tuple[_Growing, Array]) -> tuple[_Growing, Array]:
        grown, _ = current
        end = jnp.minimum(grown.lag + _LAGS_BETWEEN, num_steps)
        grown = jax.lax.fori_loop(grown.lag, end, lambda _, own: _one_lag(jacobians, own), grown)
        return grown, _rotated(grown.columns)

    grown, rotated = jax.lax.while_loop(unfinished, some_lags, (state, state.columns))
    guesses = jnp.eye(_BLOCK, width, dtype=rotated.dtype)
    return dataclasses.replace(grown, columns=rotated[:, :width], guesses=guesses)


def _rotated(columns: Array) -> Array:
    """Returns the columns times an orthogonal matrix that gathers most of them in the first few."""
    rows = jnp.argsort(-jnp.sum(columns**2, axis=1)).astype(jnp.int32)
    triangle = jnp.linalg.qr(columns[rows].T, mode="r")
    return jnp.zeros_like(columns).at[rows].set(triangle.T)


def _one_lag(jacobians: Jacobians, state: _Growing) -> _Growing:
    step = jacobians.shape[0] - 1 - state.lag
    columns = jacobians.at_step(step).transpose_times(state.columns)
    largest = jnp.abs(columns).max()
    columns = columns / jnp.where(largest > 0, largest, 1)
    log_scale, remainder = graded.add(state.log_scale, state.remainder, jnp.log(largest))
    norm, guesses = _norm_and_directions(columns, state.guesses)
    norms = state.norms.at[state.lag].set(log_scale + (remainder + jnp.log(norm)))
    return _Growing(state.lag + 1, columns, log_scale, remainder, guesses, norms)


def _norm_and_directions(columns: Array, guesses: Array) -> tuple[Array, Array]:
    """Returns the spectral norm of ``columns`` and its leading right singular vectors, near those guessed.

    Vectors are rows, since few rows times a matrix take a tenth of the time of the transposed matrix times few columns.
    """
    if columns.shape[1] <= _BLOCK + 1:
        return lapack.spectral_norm(columns), guesses
    limit = _RESIDUAL[columns.dtype.name]
    random = jnp.asarray(np.random.default_rng(0).normal(size=columns.shape[1]), columns.dtype)
    # Multiplied once, so that a larger direction that nobody guessed stands out in it.
    unguessed = lapack.matmul(lapack.matmul(columns, random[:, None]).reshape(1, -1), columns)
    start = jnp.concatenate([guesses, unguessed / jnp.sqrt(jnp.sum(unguessed**2))])

    def iterate(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        count, directions, _, _ = state
        # Rows in memory: without the barrier XLA would fold the transpose into the product, and multiply slowly.
        directions = jax.lax.optimization_barrier(jnp.linalg.qr(directions.T)[0].T)
        images = lapack.matmul(directions, columns.T)
        squares, rotation = jnp.linalg.eigh(lapack.matmul(images, images.T))
        directions, images = (lapack.matmul(rotation[:, ::-1].T, x) for x in (directions, images))
        back = lapack.matmul(images, columns)
        residual = jnp.linalg.norm(back[0] - squares[-1] * directions[0]) / squares[-1]
        return count + 1, back / jnp.sqrt(jnp.sum(back[0] ** 2)), squares[-1], residual

    def unfinished(state: tuple[Array, Array, Array, Array]) -> Array:
        count, _, _, residual = state
        return (residual > limit) & (count < _MAX_ITERATIONS)

    dtype = columns.dtype
    initial = (jnp.zeros((), jnp.int32), start, jnp.ones((), dtype), jnp.full((), jnp.inf, dtype))
    _, directions, square, residual = jax.lax.while_loop(unfinished, iterate, initial)
    norm = jax.lax.cond(residual <= limit, lambda: jnp.sqrt(square), lambda: lapack.spectral_norm(columns))
    kept = directions[: guesses.shape[0]]
    return norm, jnp.where(jnp.isfinite(kept), kept, guesses)
