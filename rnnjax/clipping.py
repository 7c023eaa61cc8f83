"""Gradient clipping for any Optax optimiser, with a guard against non-finite gradients and telemetry in the state.

A step tests the raw gradient g for finiteness, clips it by value, then each unit's part of it against the unit's
weights, then by global norm, then calls the optimiser:

    g₁ = min(max(g, −max_value), max_value)     g₂ = g₁ · min(1, max_ratio · ‖θ_unit‖₂ / ‖g₁,unit‖₂)
    g₃ = g₂ · min(1, max_norm / ‖g₂‖₂)

The global norm comes last, so that the gradient handed on has norm at most ``max_norm``. Norms are those of the whole
tree, ‖g‖₂ = s · √Σ(g/s)² with s of the size of max|g|, so that no square overflows or underflows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rnnjax import validation
from rnnjax.typing import Array, DType


class ClippedState(NamedTuple):
    """State of `clipped`; structure, shapes and dtypes are those of ``init`` for ever.

    Attributes:
      inner_state: state of the wrapped optimiser.
      norm_before: global norm of the last gradient as it arrived, float32 scalar; NaN if the gradient held a NaN, else
        inf if it held an infinity (or if the norm of a finite gradient is beyond float32).
      norm_after: global norm of what the optimiser received, float32 scalar; 0 on a skipped step.
      was_clipped: whether the last step changed a finite gradient, bool scalar.
      was_skipped: whether the last gradient was non-finite, so that its step was skipped, bool scalar.
      num_steps: gradients seen, skipped ones included, int32 scalar.
      num_clipped: steps with ``was_clipped``, int32 scalar.
      num_nonfinite: steps with ``was_skipped``, int32 scalar.
    """

    inner_state: Any
    norm_before: Array
    norm_after: Array
    was_clipped: Array
    was_skipped: Array
    num_steps: Array
    num_clipped: Array
    num_nonfinite: Array


def clipped(
    optimizer: optax.GradientTransformation,
    *,
    max_norm: float | None = None,
    max_value: float | None = None,
    max_ratio: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns ``optimizer`` behind a non-finite guard and gradient clipping: by value, adaptive, then by global norm.

    A gradient with a NaN or an infinity is skipped: the update is exactly zero, the optimiser's state stays as it was,
    and the step is counted. With neither bound given, the guard and the telemetry remain. Integer and boolean leaves
    have no norm and pass through. To accumulate gradients, wrap the result,
    ``optax.MultiSteps(clipped(optimizer), k)``: clipping then happens once, on the accumulated gradient (the other way
    round would clip each micro-batch). MultiSteps itself never forgets a NaN that it has accumulated; give it
    ``should_skip_update_fn=optax.skip_not_finite`` as well.

    Args:
      optimizer: any Optax transformation; extra arguments of ``update`` are passed on to it.
      max_norm: largest allowed global norm, positive; None for no bound.
      max_value: largest allowed absolute value of a component, positive; None for no bound.
      max_ratio: largest allowed ratio of the norm of a unit's gradient to the norm of its weights, positive; None for
        no bound. This is ``optax.adaptive_grad_clip``, which counts weights shorter than 1e-3 as that long; ``update``
        must then be given ``params``.

    Returns:
      An Optax transformation whose state is a `ClippedState`; `clipping_state` finds it in larger states.

    Raises:
      ValueError: a bound that is not a positive finite number, or an ``optimizer`` that is none.

    Example:
      >>> optimizer = clipped(optax.sgd(1.0), max_norm=1.0)
      >>> params = jnp.zeros(2)
      >>> updates, state = optimizer.update(jnp.array([3.0, 4.0]), optimizer.init(params), params)
      >>> print(updates, state.norm_before, state.norm_after)
      [-0.6 -0.8] 5.0 1.0

    Source: Pascanu, Mikolov, Bengio (2013), On the difficulty of training recurrent neural networks, Algorithm 1; for
    ``max_ratio`` A. Brock et al., High-performance large-scale image recognition without normalization, 2021, eq. 3.
    """
    if not callable(getattr(optimizer, "init", None)) or not callable(getattr(optimizer, "update", None)):
        raise ValueError(f"optimizer must be an Optax transformation (init and update), got {optimizer!r}")
    norm_bound = None if max_norm is None else validation.positive_number("max_norm", max_norm)
    value_bound = None if max_value is None else validation.positive_number("max_value", max_value)
    ratio_bound = None if max_ratio is None else validation.positive_number("max_ratio", max_ratio)
    adaptive = None if ratio_bound is None else optax.adaptive_grad_clip(ratio_bound)
    inner = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> ClippedState:
        if any(jnp.iscomplexobj(x) for x in jax.tree.leaves(params)):
            raise ValueError(
                "params must be real, got a complex leaf; optax.contrib.split_real_and_imaginary makes them real"
            )
        inner_state = jax.tree.map(_as_array, inner.init(params))
        norm, flag, count = jnp.zeros((), jnp.float32), jnp.zeros((), bool), jnp.zeros((), jnp.int32)
        return ClippedState(inner_state, norm, norm, flag, flag, count, count, count)

    def update(
        updates: optax.Updates, state: ClippedState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ClippedState]:
        largest = _largest_magnitude(updates)
        finite = jnp.isfinite(largest)
        # Zeros stand in for a non-finite gradient, so that no arithmetic below ever meets it.
        gradient = _select(finite, updates, _zeros_like(updates))
        norm_before = _global_norm(gradient)
        gradient, was_clipped = _clip(gradient, params, value_bound, adaptive, norm_bound)
        inner_updates, inner_state = inner.update(gradient, state.inner_state, params, **extra_args)
        return _select(finite, inner_updates, _zeros_like(inner_updates)), ClippedState(
            inner_state=_select(finite, inner_state, state.inner_state),
            norm_before=jnp.where(finite, norm_before, largest).astype(jnp.float32),
            norm_after=_global_norm(gradient).astype(jnp.float32),
            was_clipped=was_clipped,
            was_skipped=~finite,
            num_steps=optax.safe_increment(state.num_steps),
            num_clipped=_increment_where(was_clipped, state.num_clipped),
            num_nonfinite=_increment_where(~finite, state.num_nonfinite),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def clipping_state(opt_state: Any) -> ClippedState:
    """Returns the `ClippedState` inside ``opt_state``, however deep other transformations have nested it.

    Args:
      opt_state: state of an optimiser that contains `clipped` once.

    Raises:
      ValueError: there is no `ClippedState`, or there are several side by side.

    Example:
      >>> optimizer = optax.chain(optax.add_decayed_weights(1e-4), clipped(optax.adam(1e-3), max_norm=1.0))
      >>> int(clipping_state(optimizer.init(jnp.zeros(2))).num_steps)
      0
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, ClippedState))
    found = [leaf for leaf in leaves if isinstance(leaf, ClippedState)]
    if len(found) != 1:
        kind = type(opt_state).__name__
        raise ValueError(f"opt_state must hold the state of exactly one clipped(...), got {kind} with {len(found)}")
    return found[0]


def _clip(
    gradient: optax.Updates,
    params: optax.Params | None,
    max_value: float | None,
    adaptive: optax.GradientTransformation | None,
    max_norm: float | None,
) -> tuple[optax.Updates, Array]:
    """Returns the clipped gradient and whether it differs from ``gradient``."""
    was_clipped, unclipped = jnp.zeros((), bool), gradient
    if max_value is not None:
        gradient = _clip_by_value(gradient, max_value)
    if adaptive is not None:
        gradient = _clip_adaptively(gradient, params, adaptive)
    for x, y in zip(_floating_leaves(unclipped), _floating_leaves(gradient), strict=True):
        was_clipped |= jnp.any(x != y)
    if max_norm is not None:
        gradient, exceeded = _clip_by_global_norm(gradient, max_norm)
        was_clipped |= exceeded
    return gradient, was_clipped


def _clip_adaptively(
    gradient: optax.Updates, params: optax.Params | None, adaptive: optax.GradientTransformation
) -> optax.Updates:
    if params is None:
        raise ValueError("params must be given to update where max_ratio is set: it bounds a gradient by its weights")
    # In leaves, since Optax reads a tree's own containers by their names.
    leaves, structure = jax.tree.flatten(gradient)
    floating = [index for index, leaf in enumerate(leaves) if _is_floating(leaf)]
    weights = jax.tree.leaves(params)
    own = [weights[index] for index in floating]
    clipped_leaves, _ = adaptive.update([leaves[index] for index in floating], adaptive.init(own), own)
    for index, leaf in zip(floating, clipped_leaves, strict=True):
        leaves[index] = leaf.astype(leaves[index].dtype)
    return jax.tree.unflatten(structure, leaves)


def _clip_by_value(tree: Any, max_value: float) -> Any:
    def clip(x: Array) -> Array:
        bound = _representable(max_value, x.dtype)
        return jnp.clip(x, -bound, bound)

    return jax.tree.map(lambda x: clip(x) if _is_floating(x) else x, tree)


def _clip_by_global_norm(tree: Any, max_norm: float) -> tuple[Any, Array]:
    scale, relative_norm = _scaled_norm(tree)
    bound = _representable(max_norm, scale.dtype)
    exceeds = scale * relative_norm > bound
    # g/s and bound/(‖g‖/s) are of moderate size where the one factor bound/‖g‖ may underflow to zero.
    factor = bound / jnp.maximum(relative_norm, 1)

    def rescale(x: Array) -> Array:
        return jnp.where(exceeds, (x.astype(scale.dtype) / scale * factor).astype(x.dtype), x)

    return jax.tree.map(lambda x: rescale(x) if _is_floating(x) else x, tree), exceeds


def _representable(bound: float, dtype: DType) -> float:
    return min(bound, float(jnp.finfo(dtype).max))


def _global_norm(tree: Any) -> Array:
    scale, relative_norm = _scaled_norm(tree)
    return scale * relative_norm


def _scaled_norm(tree: Any) -> tuple[Array, Array]:
    """Returns (s, ‖tree‖₂ / s), s an eighth of the largest magnitude, or the smallest normal number if that is more."""
    largest = _largest_magnitude(tree)
    # XLA may turn g/s into g · (1/s), and 1/s must not be subnormal (flushed to zero) for the largest finite g either.
    scale = jnp.maximum(largest / 8, jnp.finfo(largest.dtype).tiny)
    squares = [jnp.sum(jnp.square(jnp.abs(x).astype(scale.dtype) / scale)) for x in _floating_leaves(tree)]
    return scale, jnp.sqrt(sum(squares, start=jnp.zeros((), scale.dtype)))


def _largest_magnitude(tree: Any) -> Array:
    """Returns max|x| over the leaves in float32, or float64 where a leaf is; NaN and inf propagate."""
    leaves = _floating_leaves(tree)
    dtype = jnp.float64 if any(jnp.finfo(x.dtype).bits == 64 for x in leaves) else jnp.float32
    largest = jnp.zeros((), dtype)
    for x in leaves:
        largest = jnp.maximum(largest, jnp.max(jnp.abs(x), initial=0).astype(dtype))
    return largest


def _floating_leaves(tree: Any) -> list[Array]:
    return [x for x in jax.tree.leaves(tree) if _is_floating(x)]


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _as_array(x: Any) -> Array:
    # The explicit dtype makes Python scalars strongly typed, as they will be after the first update.
    return x if isinstance(x, jax.Array) else jnp.asarray(x, jnp.result_type(x))


def _zeros_like(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def _select(condition: Array, if_true: Any, if_false: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), if_true, if_false)


def _increment_where(condition: Array, count: Array) -> Array:
    return jnp.where(condition, optax.safe_increment(count), count)
