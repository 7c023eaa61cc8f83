"""One-sided Jacobi rotations on rows whose lengths span thousands of nats.

Each row is a unit vector u_j and a log length ℓ_j, so that no length is ever formed. For a pair with
d = e^(ℓ_q − ℓ_p) ≤ 1 and c = u_p·u_q, the rotation with

    τ = 2c / ((1 − d²) + √((1 − d²)² + 4c²d²)),   t = τ d

takes u_p to u_p + t d u_q and u_q to u_q − τ u_p, both then normalised, and makes the two rows orthogonal. As d → 0 it
becomes a Gram–Schmidt step. A round-robin order gives S/2 independent rotations at a time.

References: M. R. Hestenes, Inversion of matrices by biorthogonalization and related results, 1958; J. Demmel et al.,
Computing the singular value decomposition with high relative accuracy, Linear Algebra and its Applications 299, 1999.
"""

import flax.struct
import jax
import jax.numpy as jnp

from rnnjax.products import add
from rnnjax.typing import Array

_MAX_SWEEPS = 30


@flax.struct.dataclass
class _Rows:
    """Unit rows ``[S, S]``, log lengths ``[S]`` and what the float sums of the lengths left out ``[S]``."""

    units: Array
    log_lengths: Array
    remainder: Array


def log_singular_values_of_rows(log_scales: Array, remainder: Array, rows: Array) -> Array:
    """Returns the logs of the singular values of diag(e^(log_scales + remainder)) · rows.

    Args:
      log_scales: ``[S]`` nats, −inf for rows that are zero.
      remainder: ``[S]`` nats, what the sums in ``log_scales`` left out.
      rows: ``[S, S]``, well conditioned.

    Returns:
      ``[S]`` nats, descending.
    """
    count = len(log_scales)
    padding = count % 2  # pairs need an even number; a zero row changes nothing
    rows = jnp.pad(rows, ((0, padding), (0, 0)))
    log_scales = jnp.pad(log_scales, (0, padding), constant_values=-jnp.inf)
    start = _normalized(_Rows(rows, log_scales, jnp.pad(remainder, (0, padding))))
    tolerance = 4 * count**0.5 * jnp.finfo(rows.dtype).eps

    def unfinished(state: tuple[Array, Array, _Rows]) -> Array:
        sweeps, largest_cosine, _ = state
        return (largest_cosine > tolerance) & (sweeps < _MAX_SWEEPS)

    def sweep(state: tuple[Array, Array, _Rows]) -> tuple[Array, Array, _Rows]:
        sweeps, _, current = state
        nothing = jnp.zeros((), rows.dtype)
        cosine, current = jax.lax.fori_loop(0, count + padding - 1, lambda _, x: _round(*x), (nothing, current))
        return sweeps + 1, cosine, current

    _, _, result = jax.lax.while_loop(unfinished, sweep, (jnp.array(0), jnp.array(jnp.inf, rows.dtype), start))
    return -jnp.sort(-(result.log_lengths + result.remainder))[:count]


def _round(largest_cosine: Array, rows: _Rows) -> tuple[Array, _Rows]:
    """Rotates row i against row S−1−i, all at once, then moves every row but the first on by one place."""
    half = len(rows.log_lengths) // 2
    top = jax.tree.map(lambda x: x[:half], rows)
    bottom = jax.tree.map(lambda x: x[half:][::-1], rows)
    cosine, top, bottom = _rotate(top, bottom)
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b[::-1]]), top, bottom)
    moved = jax.tree.map(lambda x: jnp.concatenate([x[:1], x[-1:], x[1:-1]]), joined)
    return jnp.maximum(largest_cosine, cosine), moved


def _rotate(first: _Rows, second: _Rows) -> tuple[Array, _Rows, _Rows]:
    """Makes each row of ``first`` orthogonal to its partner in ``second``; returns the largest cosine found."""
    swap = second.log_lengths > first.log_lengths
    long = jax.tree.map(lambda a, b: _select(swap, b, a), first, second)
    short = jax.tree.map(lambda a, b: _select(swap, a, b), first, second)
    live = short.log_lengths > -jnp.inf
    gap = (short.log_lengths - long.log_lengths) + (short.remainder - long.remainder)
    gap = jnp.where(live, gap, 0)
    cosine = jnp.where(live, jnp.sum(long.units * short.units, axis=1), 0)
    ratio = jnp.exp(jnp.minimum(gap, 0))
    difference = -jnp.expm1(2 * jnp.minimum(gap, 0))  # 1 − d²
    denominator = difference + jnp.sqrt(difference**2 + (2 * cosine * ratio) ** 2)
    tau = jnp.where(cosine == 0, 0, 2 * cosine / jnp.where(cosine == 0, 1, denominator))
    tangent = tau * ratio
    shrink = jnp.log1p(tangent**2) / 2
    new_long = _normalized(long.replace(units=long.units + (tangent * ratio)[:, None] * short.units), shrink)
    new_short = _normalized(short.replace(units=short.units - tau[:, None] * long.units), shrink)
    first = jax.tree.map(lambda a, b: _select(swap, a, b), new_short, new_long)
    second = jax.tree.map(lambda a, b: _select(swap, a, b), new_long, new_short)
    return jnp.abs(cosine).max(), first, second


def _normalized(rows: _Rows, shrink: Array | float = 0.0) -> _Rows:
    """Moves the length of each row, less ``shrink`` nats, into its log length; a zero row becomes a lost one."""
    norms = jnp.sqrt(jnp.sum(rows.units**2, axis=1))
    log_lengths, remainder = add(rows.log_lengths, rows.remainder, jnp.log(norms) - shrink)
    return _Rows(rows.units / jnp.where(norms > 0, norms, 1)[:, None], log_lengths, remainder)


def _select(condition: Array, on_true: Array, on_false: Array) -> Array:
    return jnp.where(condition.reshape(-1, *(1,) * (on_true.ndim - 1)), on_true, on_false)
