"""How singular values shrink or grow with the lag, and between any two times."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rnnjax import graded, products, validation
from rnnjax.cells import AffineCell, Cell
from rnnjax.determinants import with_log_abs_dets
from rnnjax.jacobi import log_singular_values_of_rows
from rnnjax.jacobians import jacobian_operator
from rnnjax.operators import Jacobians, first_non_finite_step, over_sequences
from rnnjax.products import Chain, Steps
from rnnjax.sheared import sheared
from rnnjax.typing import Array, Carry, DType, Params
from rnnjax.unroll import trajectory

_GRID_TIMES = 16


@flax.struct.dataclass
class SpectralProfile:
    """How every singular value of ∂s_T/∂s_{T−lag} shrinks or grows with the lag.

    Attributes:
      lags: ``[L]`` steps, ascending.
      log_singular_values: log σ_i of P(T, T − lag) in nats, ``[L, ..., S]``, descending in i; −inf where rank is lost.
        For a block of the state, the values beyond the size of the block are −inf.
      error_estimate: how far rounding may have moved each, nats, ``[L, ..., S]``; 0 where rank is lost.
      log_abs_det: Σ_t log|det J_t| over the lag's steps in nats, ``[L, ...]``, computed on its own: evidence to hold
        the sum of ``log_singular_values`` against (of the full state, also where a block was asked for).
      num_factorizations: factorisations up to each lag, int32 ``[L, ...]``.
      num_sweeps: Jacobi sweeps at each lag, int32 ``[L, ...]``.
      first_non_finite_step: as in ``FactoredProduct``.
    """

    lags: Array
    log_singular_values: Array
    error_estimate: Array
    log_abs_det: Array
    num_factorizations: Array
    num_sweeps: Array
    first_non_finite_step: Array


@flax.struct.dataclass
class SpectralGrid:
    """All singular values of ∂s_t/∂s_k for pairs of times.

    Attributes:
      times: ``[n]``, numbers of steps taken, ascending; s_0 is the first state.
      log_singular_values: ``[n, n, ..., S]`` nats; entry (a, b) belongs to t = times[a], k = times[b], descending in i;
        −inf where rank is lost, NaN where t ≤ k.
      error_estimate: how far rounding may have moved each, nats, ``[n, n, ..., S]``.
      first_non_finite_step: as in ``FactoredProduct``.
    """

    times: Array
    log_singular_values: Array
    error_estimate: Array
    first_non_finite_step: Array


def spectral_profile(
    cell: Cell,
    params: Params,
    inputs: Any,
    carry: Carry | None = None,
    *,
    lags: Sequence[int] | None = None,
    block: str | None = None,
    dtype: DType | None = None,
) -> SpectralProfile:
    """Returns all singular values of ∂s_T/∂s_{T−lag}, for several lags in one pass over the sequence.

    Args:
      cell: any cell.
      params: its weights.
      inputs: ``[T, ..., D]``, time-major.
      carry: the carry before the first step; ``cell.initialize_carry`` by default.
      lags: a sequence of numbers of steps, distinct, in [1, T]; all of them by default.
      block: a part of the state, such as "h" or "c" of an LSTM, for ∂h_T/∂h_{T−lag} or ∂c_T/∂c_{T−lag} through all
        paths; the parts of another cell are named like the leaves of its carry, "[1]" the second of a tuple, but for
        the first of an affine cell, "h". The full state by default.
      dtype: what the factorisations are computed in, as for ``factor_product``.

    Returns:
      The ``SpectralProfile``.

    Raises:
      ValueError: inputs or weights that ``unroll`` would refuse; lags that are no sequence, empty, repeated or out of
        range; an unknown block; a dtype other than float32 and float64; a state or Jacobian that is not finite, with
        its step.

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
    ordered = checked_lags(lags, jax.tree.leaves(inputs)[0].shape[0])
    mask = state_block(cell, block)
    products.factorization_dtype(dtype)  # refused before any work is done
    jacobians = jacobian_operator(cell, params, trajectory(cell, params, inputs, carry))
    with products.factorization_precision(jacobians.dtype, dtype) as wide:
        return _profile(jacobians, ordered, mask, wide)


def spectral_grid(
    cell: Cell,
    params: Params,
    inputs: Any,
    carry: Carry | None = None,
    *,
    times: Sequence[int] | None = None,
    block: str | None = None,
    dtype: DType | None = None,
) -> SpectralGrid:
    """Returns all singular values of ∂s_t/∂s_k for every pair t > k of given times, as for a heat map.

    Args:
      cell: any cell.
      params: its weights.
      inputs: ``[T, ..., D]``, time-major.
      carry: the carry before the first step; ``cell.initialize_carry`` by default.
      times: at least two distinct numbers of steps in [0, T]; about 16 evenly spaced ones by default.
      block: a part of the state, as for ``spectral_profile``.
      dtype: what the factorisations are computed in, as for ``factor_product``.

    Returns:
      The ``SpectralGrid``.

    Raises:
      ValueError: as ``spectral_profile``; times that are fewer than two, repeated or out of range.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> cell = rnnjax.VanillaCell(3, activation="identity", recurrent_initializer=rnnjax.initializers.Orthogonal(0.5))
      >>> params = cell.init(jax.random.key(0), input_size=1)
      >>> grid = spectral_grid(cell, params, jnp.ones((8, 1)), times=[0, 3, 8])
      >>> print(grid.log_singular_values[..., 0].round(3))  # (t − k) · ln ½
      [[   nan    nan    nan]
       [-2.079    nan    nan]
       [-5.545 -3.466    nan]]
    """
    cell.check(params, inputs, carry)
    ordered = _checked_times(times, jax.tree.leaves(inputs)[0].shape[0])
    mask = state_block(cell, block)
    products.factorization_dtype(dtype)  # refused before any work is done
    jacobians = jacobian_operator(cell, params, trajectory(cell, params, inputs, carry))
    with products.factorization_precision(jacobians.dtype, dtype) as wide:
        return _grid(jacobians, ordered, mask, wide)


def state_block(cell: Cell, block: str | None) -> Array:
    """Returns which entries of the flattened state belong to a part of the carry, bool ``[S]``.

    Args:
      cell: any cell.
      block: "h", or "c" for an LSTM; of another cell the path of a leaf of its carry; None for the full state.

    Returns:
      bool ``[S]``.

    Raises:
      ValueError: a name that the cell's carry does not have.

    Example:
      >>> import rnnjax
      >>> print(state_block(rnnjax.LSTMCell(2), "c"))
      [False False  True  True]
    """
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(cell.initialize_carry))
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    if isinstance(cell, AffineCell):
        names = ["h", *(["c"] if len(names) == 2 else names[1:])]
    sizes = {name: leaf.size for name, (_, leaf) in zip(names, leaves, strict=True)}
    if block is not None:
        validation.one_of("block", block, sizes)
    return jnp.array(np.concatenate([np.full(size, block in (None, name)) for name, size in sizes.items()]))


def checked_lags(lags: Any, num_steps: int) -> Array:
    """Returns lags in [1, T] in ascending order, all of them for None; raises ValueError for any other."""
    if lags is None:
        return jnp.arange(1, num_steps + 1, dtype=jnp.int32)
    lags = _as_sequence("lags", lags)
    ordered = sorted(validation.positive_integer("lags", lag) for lag in lags)
    if not ordered or len(set(ordered)) < len(ordered) or ordered[-1] > num_steps:
        raise ValueError(f"lags must be distinct numbers of steps in [1, {num_steps}], got {list(lags)}")
    return jnp.array(ordered, jnp.int32)


def _checked_times(times: Any, num_steps: int) -> Array:
    if times is None:
        times = np.unique(np.linspace(0, num_steps, min(num_steps, _GRID_TIMES) + 1).astype(int))
    times = _as_sequence("times", times)
    ordered = sorted(validation.non_negative_integer("times", time) for time in times)
    if len(ordered) < 2 or len(set(ordered)) < len(ordered) or ordered[-1] > num_steps:
        raise ValueError(f"times must be two or more distinct numbers in [0, {num_steps}], got {list(times)}")
    return jnp.array(ordered, jnp.int32)


def _as_sequence(name: str, values: Any) -> Sequence[Any]:
    if isinstance(values, (np.ndarray, jax.Array)):
        values = np.asarray(values).tolist()
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{name} must be a sequence of numbers of steps such as [1, 10, 100], got {values!r}")
    return values


def _at(chain: Chain, steps: Steps, end: Array, mask: Array) -> tuple[Steps, Steps]:
    """Returns the product up to A_{end − 1}, and A_end … A_1 orthogonalized, with rows outside ``mask`` zero."""
    steps = chain.advanced(steps, end - 1)
    columns = jnp.where(mask[:, None], chain.last_columns(steps), 0)
    factored = graded.orthogonalized(columns, steps.factors.log_scales)
    own = chain.epsilon() * graded.diagonal_errors(factored, columns, steps.factors.log_scales)
    whole = dataclasses.replace(
        steps,
        factors=graded.regraded(factored, steps.factors),
        num_factorizations=steps.num_factorizations + 1,
        squared_error=steps.squared_error[factored.order] + len(columns) * own**2,
    )
    return steps, whole


def _spectrum(whole: Steps, own: DType, finite: Array) -> dict[str, Array]:
    """Returns log σ, NaN unless all Jacobians are finite, error estimates and counts."""
    factors = whole.factors
    scales = jnp.where(finite, factors.log_scales, jnp.nan)
    values, sweeps = log_singular_values_of_rows(scales, factors.remainder, factors.right)
    return {
        "log_singular_values": values.astype(own),
        "error_estimate": products.error_estimate(whole, values, own),
        "num_factorizations": whole.num_factorizations,
        "num_sweeps": sweeps,
    }


@functools.partial(jax.jit, static_argnames="wide")
def _profile(jacobians: Jacobians, lags: Array, mask: Array, wide: DType) -> SpectralProfile:
    own = jacobians.dtype

    def single(sequence: Jacobians) -> dict[str, Array]:
        # P(T, T − lag)ᵀ grows on the left, one step a lag.
        finite = sequence.finite().all()
        chain = Chain(sheared(sequence, wide), True, products.condition_limit(own, wide))

        def at_lag(steps: Steps, lag: Array) -> tuple[Steps, dict[str, Array]]:
            steps, whole = _at(chain, steps, lag, mask)
            return steps, _spectrum(whole, own, finite)

        return jax.lax.scan(at_lag, chain.start(mask), lags)[1]

    results, log_abs_dets = with_log_abs_dets(single, jacobians, wide, reverse=True)
    num_axes = len(jacobians.shape) - 3
    results = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, num_axes, 0), results)
    results["log_abs_det"] = log_abs_dets[lags - 1].astype(own)
    return SpectralProfile(lags=lags, first_non_finite_step=first_non_finite_step(jacobians), **results)


@functools.partial(jax.jit, static_argnames="wide")
def _grid(jacobians: Jacobians, times: Array, mask: Array, wide: DType) -> SpectralGrid:
    own = jacobians.dtype

    def single(sequence: Jacobians) -> dict[str, Array]:
        finite = sequence.finite().all()
        chain = Chain(sheared(sequence, wide), False, products.condition_limit(own, wide))

        def between(chain: Chain, steps: Steps, pair: tuple[Array, Array]) -> tuple[Steps, dict[str, Array]]:
            first, last = pair

            def pending() -> tuple[Steps, dict[str, Array]]:
                at_last, whole = _at(chain, steps, last, mask)
                spectrum = _spectrum(whole, own, finite)
                return at_last, {name: spectrum[name] for name in ("log_singular_values", "error_estimate")}

            nothing = jnp.full(len(mask), jnp.nan, own)
            skipped = {"log_singular_values": nothing, "error_estimate": nothing}
            return jax.lax.cond(last > first, pending, lambda: (steps, skipped))

        def from_start(first: Array) -> dict[str, Array]:
            pairs = (jnp.broadcast_to(first, times.shape), times)
            from_first = chain.starting_at(first)
            return jax.lax.scan(functools.partial(between, from_first), from_first.start(mask, first), pairs)[1]

        by_start = jax.lax.map(from_start, times)
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), by_start)

    results = over_sequences(single, jacobians)
    num_axes = len(jacobians.shape) - 3
    results = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, (num_axes, num_axes + 1), (0, 1)), results)
    return SpectralGrid(times=times, first_non_finite_step=first_non_finite_step(jacobians), **results)
