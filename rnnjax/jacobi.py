"""Singular values of graded rows, by QR iteration and one-sided Jacobi rotations on lengths kept in logs.

The rows of diag(e^ℓ) · V span thousands of nats. A few QR iterations (see ``graded.transposed``) make rows whose
lengths differ much orthogonal at little cost; what is left are neighbours of like length, which Jacobi rotations
finish. Each row is a unit vector u_j and a log length ℓ_j, so that no length is ever formed. For a pair with
d = e^(ℓ_q − ℓ_p) ≤ 1 and c = u_p·u_q, the rotation with

    τ = 2c / ((1 − d²) + √((1 − d²)² + 4c²d²)),   t = τ d

takes u_p to u_p + t d u_q and u_q to u_q − τ u_p, both then normalised, and makes the two rows orthogonal. As d → 0 it
becomes a Gram–Schmidt step. All pairs of rows a given distance apart take two rounds, and a sweep goes through the
distances at which rows are not yet orthogonal.

References: M. R. Hestenes, Inversion of matrices by biorthogonalization and related results, 1958; J. Demmel et al.,
Computing the singular value decomposition with high relative accuracy, Linear Algebra and its Applications 299, 1999;
Z. Drmač & K. Veselić, New fast and accurate Jacobi SVD algorithm I, SIAM J. Matrix Anal. Appl. 29, 2008.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rnnjax import graded, lapack
from rnnjax.typing import Array

_MAX_SWEEPS = 30
_QR_ITERATIONS = 6
_FEW_ROWS = 32


@flax.struct.dataclass
class _Rows:
    """Unit rows ``[S, S]``, log lengths ``[S]``, what their float sums left out ``[S]``, and the rotation so far.

    ``rotation`` is ``[S, S]``, or ``[S, 0]`` where nobody asks for it.
    """

    units: Array
    log_lengths: Array
    remainder: Array
    rotation: Array


def log_singular_values_of_rows(log_scales: Array, remainder: Array, rows: Array) -> tuple[Array, Array]:
    """Returns the logs of the singular values of diag(e^(log_scales + remainder)) · rows.

    Args:
      log_scales: ``[S]`` nats, −inf for rows that are zero.
      remainder: ``[S]`` nats, what the sums in ``log_scales`` left out.
      rows: ``[S, S]``, well conditioned.

    Returns:
      ``[S]`` nats, descending; and the number of Jacobi sweeps, int32, 0 where the values are so close to each other
      that a plain SVD has them all.
    """
    start = (log_scales, remainder, rows)
    found = jax.lax.fori_loop(0, _QR_ITERATIONS, lambda _, current: graded.transposed_rows(*current), start)
    spread = jnp.max(found[0]) - jnp.min(found[0])
    close = spread <= -np.log(jnp.finfo(rows.dtype).eps) / 4
    values, sweeps = jax.lax.cond(close, _by_svd, _by_rotations, *found)
    return -jnp.sort(-values), sweeps


def graded_svd(factors: graded.Factors) -> tuple[Array, Array, Array]:
    """Returns log σ_i and the singular vectors of P = L · diag(e^ℓ) · V with orthonormal L.

    Args:
      factors: L ``[S, b]``, ℓ ``[b]`` and V ``[b, b]``.

    Returns:
      log σ_i ``[b]`` in nats, descending; left singular vectors ``[S, b]`` and right singular vectors ``[b, b]``, by
      columns. Vectors of lost directions are meaningless.
    """

    def iterate(_: int, current: graded.Factors) -> graded.Factors:
        return graded.transposed(graded.transposed(current))

    # Few rows are rotated in less time than it takes to factor them again.
    pairs = 1 if len(factors.log_scales) <= _FEW_ROWS else 2
    factors = jax.lax.fori_loop(0, pairs, iterate, factors)
    rotation = jnp.eye(len(factors.log_scales), dtype=factors.right.dtype)
    rows, _ = _rotated(_Rows(factors.right, factors.log_scales, factors.remainder, rotation))
    values = rows.log_lengths + rows.remainder
    order = jnp.argsort(-values).astype(jnp.int32)
    left = lapack.matmul(factors.left, rows.rotation[order].T)
    return values[order], left, rows.units[order].T


def _by_svd(log_scales: Array, remainder: Array, rows: Array) -> tuple[Array, Array]:
    """Returns log singular values that span few nats, which a plain SVD gives with small relative error."""
    largest = jnp.max(log_scales)
    scales = jnp.exp((log_scales - largest) + remainder)
    return largest + jnp.log(lapack.singular_values(scales[:, None] * rows)), jnp.zeros((), jnp.int32)


def _by_rotations(log_scales: Array, remainder: Array, rows: Array) -> tuple[Array, Array]:
    """Returns log singular values, unsorted, and the number of sweeps."""
    rotated, sweeps = _rotated(_Rows(rows, log_scales, remainder, jnp.zeros((len(log_scales), 0), rows.dtype)))
    return rotated.log_lengths + rotated.remainder, sweeps


def _rotated(rows: _Rows) -> tuple[_Rows, Array]:
    """Rotates the rows of diag(e^ℓ) · V until all are orthogonal; returns them and the number of sweeps."""
    start = _normalized(rows)

    def unfinished(state: tuple[Array, _Rows, Array]) -> Array:
        sweeps, _, distance = state
        return (distance > 0) & (sweeps < _MAX_SWEEPS)

    def sweep(state: tuple[Array, _Rows, Array]) -> tuple[Array, _Rows, Array]:
        sweeps, rows, distance = state
        rows = jax.lax.fori_loop(jnp.ones((), jnp.int32), distance + 1, _rotate_at, rows)
        return sweeps + 1, rows, _largest_distance(rows)

    sweeps, rows, _ = jax.lax.while_loop(unfinished, sweep, (jnp.zeros((), jnp.int32), start, _largest_distance(start)))
    return rows, sweeps


def _largest_distance(rows: _Rows) -> Array:
    """Returns how far apart in the list rows may be that are not orthogonal, int32; 0 when all are."""
    size = len(rows.log_lengths)
    tolerance = 4 * size**0.5 * float(jnp.finfo(rows.units.dtype).eps)
    live = (rows.log_lengths > -jnp.inf).astype(rows.units.dtype)
    units = live[:, None] * rows.units
    cosines = jnp.abs(lapack.matmul(units, units.T))
    positions = jnp.arange(size, dtype=jnp.int32)
    apart = jnp.abs(positions[:, None] - positions[None, :])
    return jnp.max(jnp.where(cosines > tolerance, apart, 0))


def _rotate_at(distance: Array, rows: _Rows) -> _Rows:
    """Rotates every pair of rows ``distance`` apart: two rounds of disjoint pairs."""
    positions = jnp.arange(len(rows.log_lengths), dtype=jnp.int32)
    even = (positions // distance) % 2 == 0
    for first in (even, ~even):
        partner = jnp.where(first, positions + distance, positions - distance)
        inside = (partner >= 0) & (partner < len(positions))
        rows = _rotate(rows, jnp.where(inside, partner, positions), first, inside)
    return rows


def _rotate(rows: _Rows, partner: Array, first: Array, paired: Array) -> _Rows:
    """Makes each row orthogonal to its partner; ``first`` marks one of each pair, ``paired`` who has a partner."""
    others = jax.tree.map(lambda leaf: leaf[partner], rows)
    live = paired & (rows.log_lengths > -jnp.inf) & (others.log_lengths > -jnp.inf)
    gap = (others.log_lengths - rows.log_lengths) + (others.remainder - rows.remainder)
    gap = jnp.where(live, gap, 0)
    longer = (gap < 0) | ((gap == 0) & first)
    cosine = jnp.where(live, jnp.sum(rows.units * others.units, axis=1), 0)
    ratio = jnp.exp(-jnp.abs(gap))
    difference = -jnp.expm1(-2 * jnp.abs(gap))  # 1 − d²
    denominator = difference + jnp.sqrt(difference**2 + (2 * cosine * ratio) ** 2)
    tau = jnp.where(cosine == 0, 0, 2 * cosine / jnp.where(cosine == 0, 1, denominator))
    tangent = tau * ratio
    share = jnp.where(longer, tangent * ratio, -tau)
    turn = jnp.where(longer, tangent, -tangent) / jnp.sqrt(1 + tangent**2)
    turned = dataclasses.replace(
        rows,
        units=rows.units + share[:, None] * others.units,
        rotation=rows.rotation / jnp.sqrt(1 + tangent**2)[:, None] + turn[:, None] * others.rotation,
    )
    return _normalized(turned, jnp.log1p(tangent**2) / 2)


def _normalized(rows: _Rows, shrink: Array | float = 0.0) -> _Rows:
    """Moves the length of each row, less ``shrink`` nats, into its log length; a zero row becomes a lost one."""
    norms = jnp.sqrt(jnp.sum(rows.units**2, axis=1))
    log_lengths, remainder = graded.add(rows.log_lengths, rows.remainder, jnp.log(norms) - shrink)
    units = rows.units / jnp.where(norms > 0, norms, 1)[:, None]
    return dataclasses.replace(rows, units=units, log_lengths=log_lengths, remainder=remainder)
