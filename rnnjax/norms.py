"""The spectral norm of ∂s_T/∂s_{T−lag} for every lag, cheap enough to be left on during training."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rnnjax import graded, lapack, products
from rnnjax.meshes import check_not_spread
from rnnjax.operators import Jacobians, over_sequences
from rnnjax.typing import Array

_LAGS_TOGETHER = 20
_RIVAL_SHARE = 0.5
_RANDOM_SHARE = 0.3
_RESIDUAL = {"float32": 1e-5, "float64": 1e-7}
_MAX_ITERATIONS = 60
_HALVINGS = 2
_LEAST_WIDTH = 8


@flax.struct.dataclass
class _Growing:
    """P(T, T − lag)ᵀ X = columns · e^(log_scale + remainder) for orthonormal X, and guesses of its leading directions.

    Attributes:
      lag: int32.
      columns: ``[S, b]``.
      log_scale: nats.
      remainder: nats.
      guess: about the leading right singular vector of the columns, ``[b]``.
      rival: about the one after it, ``[b]``.
      norms: log spectral norms of the lags so far, ``[T + 16]``.
    """

    lag: Array
    columns: Array
    log_scale: Array
    remainder: Array
    guess: Array
    rival: Array
    norms: Array


@flax.struct.dataclass
class _Search:
    """Unit vectors x on the way to the leading right singular vectors of matrices C, one row for each.

    Attributes:
      vectors: x, ``[L, b]``.
      images: C x, ``[L, S]``.
      gradients: CᵀC x − ‖C x‖² x, ``[L, b]``: how ‖C x‖² / ‖x‖² grows.
      directions: p, where to look next, ``[L, b]``.
      unfinished: where ‖CᵀC x − θ² x‖ is too large a share of θ² = ‖C x‖², bool ``[L, 1]``.
    """

    vectors: Array
    images: Array
    gradients: Array
    directions: Array
    unfinished: Array


def spectral_norm_profile(jacobians: Array | Jacobians) -> Array:
    """Returns log ‖∂s_T/∂s_{T−lag}‖₂ for every lag from 1 to T, at about the cost of a product.

    A product in floats keeps the largest singular value, if not the small ones, and its scale is kept apart, so that
    nothing overflows. Directions that have shrunk below rounding beside the largest are left out from there on. The
    norms of several products at a time come from conjugate gradients that maximise ‖C x‖² / ‖x‖², from the leading
    direction of the lag before with a random one added, until the residual ‖CᵀC x − θ² x‖ is below 1e-5 θ² (1e-7 in
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

    Source: W. W. Bradbury & R. Fletcher, New iterative methods for solution of the eigenproblem, Numerische Mathematik
    9, 1966, applied to CᵀC.
    """
    check_not_spread("jacobians", jacobians)
    return _norm_profile(products.checked_jacobians(jacobians))


@jax.jit
def _norm_profile(jacobians: Jacobians) -> Array:
    norms = over_sequences(_norms_of_sequence, jacobians)
    return jnp.moveaxis(norms, -1, 0)


def _norms_of_sequence(jacobians: Jacobians) -> Array:
    num_steps, size, _ = jacobians.shape
    zero, identity = jnp.zeros((), jacobians.dtype), jnp.eye(size, dtype=jacobians.dtype)
    norms = jnp.zeros(num_steps + _LAGS_TOGETHER, jacobians.dtype)
    anywhere = _random_direction(identity[0])
    state = _Growing(jnp.zeros((), jnp.int32), identity, zero, zero, anywhere, anywhere, norms)
    for width in (size >> halvings for halvings in range(1, _HALVINGS + 1)):
        if width >= _LEAST_WIDTH:
            state = _narrowed(jacobians, state, width)
    state = jax.lax.while_loop(lambda s: _unfinished(s, num_steps), lambda s: _some_lags(jacobians, s), state)
    return state.norms[:num_steps]


def _unfinished(state: _Growing, num_steps: int) -> Array:
    # In rounds of lags: XLA on CPU would leave out a loop of "i < 1, i += 20" (jaxlib 0.10.2).
    return state.lag // _LAGS_TOGETHER < -(-num_steps // _LAGS_TOGETHER)


def _narrowed(jacobians: Jacobians, state: _Growing, width: int) -> _Growing:
    """Goes on with the lags until the columns fit into ``width`` dimensions but for rounding, and leaves the others."""
    num_steps = jacobians.shape[0]
    epsilon = float(jnp.finfo(jacobians.dtype).eps)

    def unfinished(current: tuple[_Growing, Array]) -> Array:
        grown, rotated = current
        fits = jnp.sum(rotated[:, width:] ** 2) <= epsilon**2 * jnp.sum(rotated**2)
        return _unfinished(grown, num_steps) & ~fits

    def more_lags(current: tuple[_Growing, Array]) -> tuple[_Growing, Array]:
        grown = _some_lags(jacobians, current[0])
        return grown, _rotated(grown.columns)

    grown, rotated = jax.lax.while_loop(unfinished, more_lags, (state, state.columns))
    columns = rotated[:, :width]
    anywhere = _random_direction(columns[0])
    return dataclasses.replace(grown, columns=columns, guess=anywhere, rival=anywhere)


def _rotated(columns: Array) -> Array:
    """Returns the columns times an orthogonal matrix that gathers most of them in the first few."""
    rows = jnp.argsort(-jnp.sum(columns**2, axis=1)).astype(jnp.int32)
    triangle = jnp.linalg.qr(columns[rows].T, mode="r")
    return jnp.zeros_like(columns).at[rows].set(triangle.T)


def _some_lags(jacobians: Jacobians, state: _Growing) -> _Growing:
    """Takes a few lags; what lies beyond T is written behind the norms that count."""
    num_steps = jacobians.shape[0]

    def step(carry: tuple[Array, Array, Array], lag: Array) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
        columns, log_scale, remainder = carry
        columns = jacobians.at_step(jnp.maximum(num_steps - 1 - lag, 0)).transpose_times(columns)
        largest = jnp.abs(columns).max()
        columns = columns / jnp.where(largest > 0, largest, 1)
        log_scale, remainder = graded.add(log_scale, remainder, jnp.log(largest))
        return (columns, log_scale, remainder), (columns, log_scale + remainder)

    lags = state.lag + jnp.arange(_LAGS_TOGETHER, dtype=jnp.int32)
    start = (state.columns, state.log_scale, state.remainder)
    (columns, log_scale, remainder), (matrices, log_scales) = jax.lax.scan(step, start, lags)
    random = _RANDOM_SHARE * _random_direction(state.guess)
    log_norms, vectors = _log_norms(matrices, _unit(state.guess + _RIVAL_SHARE * state.rival + random))
    norms = jax.lax.dynamic_update_slice(state.norms, log_scales + log_norms, (state.lag,))
    rival = _next_direction(columns, vectors[-1], state.rival + random)
    return _Growing(state.lag + _LAGS_TOGETHER, columns, log_scale, remainder, vectors[-1], rival, norms)


def _next_direction(columns: Array, leading: Array, guess: Array) -> Array:
    """Returns a better guess of the singular vector after the leading one: CᵀC times it, without the leading one."""
    turned = lapack.matmul(lapack.matmul(columns, guess[:, None]).reshape(1, -1), columns)[0]
    return _unit(turned - _dot(turned, leading) * leading)


def _log_norms(matrices: Array, start: Array) -> tuple[Array, Array]:
    """Returns the log spectral norms of ``[L, S, b]``, and leading right singular vectors ``[L, b]`` near the start."""
    vectors = jnp.broadcast_to(start, (len(matrices), len(start)))
    images = _times(matrices, vectors)
    gradients, unfinished = _gradients(matrices, vectors, images)
    _, found = jax.lax.while_loop(
        lambda state: state[1].unfinished.any() & (state[0] < _MAX_ITERATIONS),
        lambda state: (state[0] + 1, _iterated(matrices, state[1])),
        (jnp.zeros((), jnp.int32), _Search(vectors, images, gradients, gradients, unfinished)),
    )

    def decompose(state: tuple[Array, Array]) -> tuple[Array, Array]:
        norms, left = state
        index = jnp.argmax(left)
        return norms.at[index].set(lapack.spectral_norm(matrices[index])), left.at[index].set(False)

    state = (jnp.sqrt(jnp.sum(found.images**2, axis=1)), found.unfinished[:, 0])
    norms, _ = jax.lax.while_loop(lambda own: own[1].any(), decompose, state)
    return jnp.log(norms), found.vectors


def _iterated(matrices: Array, search: _Search) -> _Search:
    """Goes to the best vector in the plane of x and p, where that is not found yet."""
    x, y = search.vectors, search.images
    p = _unit(search.directions - _dot(search.directions, x) * x)
    image = _times(matrices, p)
    angle = jnp.arctan2(2 * _dot(y, image), _dot(y, y) - _dot(image, image)) / 2
    vectors, images = (jnp.cos(angle) * a + jnp.sin(angle) * b for a, b in ((x, p), (y, image)))
    gradients, unfinished = _gradients(matrices, vectors, images)
    old = search.gradients
    conjugate = jnp.maximum(_dot(gradients, gradients - old) / _dot(old, old), 0)
    directions = gradients + conjugate * search.directions
    new = _Search(vectors, images, gradients, directions, unfinished)
    return jax.tree.map(lambda after, before: jnp.where(search.unfinished, after, before), new, search)


def _gradients(matrices: Array, vectors: Array, images: Array) -> tuple[Array, Array]:
    """Returns CᵀC x − θ² x, and where it is too large a share of θ²."""
    squares = _dot(images, images)
    gradients = lapack.matmul(images[:, None, :], matrices)[:, 0] - squares * vectors
    limit = _RESIDUAL[vectors.dtype.name]
    return gradients, _dot(gradients, gradients) > (limit * squares) ** 2


def _times(matrices: Array, vectors: Array) -> Array:
    """Returns C x for each row, ``[L, S]``."""
    return lapack.matmul(matrices, vectors[:, :, None])[:, :, 0]


def _dot(first: Array, second: Array) -> Array:
    return jnp.sum(first * second, axis=-1, keepdims=True)


def _unit(vectors: Array) -> Array:
    norms = jnp.sqrt(_dot(vectors, vectors))
    return vectors / jnp.where(norms > 0, norms, 1)


def _random_direction(like: Array) -> Array:
    """Returns a unit vector, always the same."""
    return _unit(jnp.asarray(np.random.default_rng(0).normal(size=like.shape), like.dtype))
