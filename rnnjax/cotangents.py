"""The gradient on its way back through time, bounded step by step: what no optimiser can do after the fact."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rnnjax.typing import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def clip_cotangent(tree: Any, max_norm: float, num_batch_axes: int = 0) -> Any:
    """Returns ``tree`` as it is; the gradient that comes back through it is scaled to a norm of at most ``max_norm``.

        δ ← δ · min(1, max_norm / ‖δ‖₂)

    Args:
      tree: pytree of arrays that share their ``num_batch_axes`` leading axes.
      max_norm: largest norm c of the cotangent δ, over all leaves, for each entry of the batch axes on its own.
      num_batch_axes: how many leading axes tell sequences apart.

    Returns:
      ``tree``. Reverse mode only: forward mode raises JAX's TypeError. A cotangent with a NaN or an infinity passes
      unchanged, so that whoever guards against it sees it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> print(jax.grad(lambda x: 3 * clip_cotangent(x, 1.0)[0] + 4 * clip_cotangent(x, 9.0)[1])(jnp.zeros(2)))
      [1. 4.]

    Source: A. Graves, Generating sequences with recurrent neural networks, 2013, section 2.1, with the norm in place of
    the components.
    """
    return tree


def _forward(tree: Any, max_norm: float, num_batch_axes: int) -> tuple[Any, None]:
    return tree, None


def _backward(max_norm: float, num_batch_axes: int, _: None, cotangent: Any) -> tuple[Any]:
    floating = [leaf for leaf in jax.tree.leaves(cotangent) if leaf.dtype != jax.dtypes.float0]
    scale, relative = _scaled_norm(floating, num_batch_axes)
    bound = jnp.asarray(max_norm, scale.dtype)
    # The norm itself may overflow: it is compared, and divided by, in its two parts.
    exceeds = relative > bound / scale

    def clip(leaf: Array) -> Array:
        if leaf.dtype == jax.dtypes.float0:
            return leaf
        own, size, over = (_aligned(x, leaf) for x in (scale, relative, exceeds))
        clipped = leaf.astype(own.dtype) / own * (bound / size)
        return jnp.where(over, clipped.astype(leaf.dtype), leaf)

    return (jax.tree.map(clip, cotangent),)


clip_cotangent.defvjp(_forward, _backward)


def _scaled_norm(leaves: list[Array], num_batch_axes: int) -> tuple[Array, Array]:
    """Returns (s, ‖leaves‖₂ / s) for each sequence, s an eighth of the largest magnitude (a normal number)."""
    dtype = jnp.float64 if any(leaf.dtype == jnp.float64 for leaf in leaves) else jnp.float32
    wide = [jnp.abs(leaf).astype(dtype).reshape(*leaf.shape[:num_batch_axes], -1) for leaf in leaves]
    largest = functools.reduce(jnp.maximum, (leaf.max(axis=-1, initial=0) for leaf in wide))
    # 1/s must be a normal number too, for XLA may multiply by it.
    scale = jnp.where(jnp.isfinite(largest), jnp.maximum(largest / 8, jnp.finfo(dtype).tiny), 1)
    squares = sum(jnp.sum((leaf / scale[..., None]) ** 2, axis=-1) for leaf in wide)
    return scale, jnp.where(jnp.isfinite(largest), jnp.sqrt(squares), 0)


def _aligned(values: Array, leaf: Array) -> Array:
    return values.reshape(values.shape + (1,) * (leaf.ndim - values.ndim))
