"""Linear maps whose transpose is written out, where the one that JAX would derive is slow."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

Arrays = Sequence[Any]


def linear_map(
    function: Callable[[Any, Any], Any],
    transpose: Callable[[Any, Any], Any],
    residuals: Any,
    tangents: Any,
    like: Any,
    batch_axes: tuple[Any, Any, Any],
) -> Any:
    """Returns ``function(residuals, tangents)``, which reverse mode transposes by ``transpose``.

    Derivatives of either by the residuals, and so second derivatives, are those of ``function`` and of its transpose as
    JAX derives it. So is what ``vmap`` makes of them, unless the mapped axis can be one more batch axis.

    Args:
      function: linear in the tangents.
      transpose: ``transpose(residuals, cotangents)``, linear in the cotangents of what ``function`` returns, gives a
        tree as ``tangents`` is.
      residuals: pytree of arrays.
      tangents: pytree of arrays.
      like: a pytree of arrays of the shapes and dtypes of what ``function`` returns.
      batch_axes: for residuals, tangents and outputs, a tree of integers: the axis of an array before which ``vmap``
        may put one of its own, with both functions as they are; −1 where an array has no batch axes.

    Returns:
      A tree as ``like`` is.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def scale(factor, x):
      ...     return linear_map(lambda f, t: f * t, lambda f, c: f * c, factor, x, x, (-1, 0, 0))
      >>> jax.grad(lambda x: scale(jnp.asarray(3.0), x))(jnp.asarray(2.0)).item()
      3.0
    """
    known, residual_tree = jax.tree.flatten(residuals)
    moved, tangent_tree = jax.tree.flatten(tangents)
    outputs, output_tree = jax.tree.flatten(like)

    def forwards(residuals: Arrays, tangents: Arrays) -> list[Any]:
        trees = jax.tree.unflatten(residual_tree, residuals), jax.tree.unflatten(tangent_tree, tangents)
        return jax.tree.leaves(function(*trees))

    def backwards(residuals: Arrays, cotangents: Arrays) -> list[Any]:
        trees = jax.tree.unflatten(residual_tree, residuals), jax.tree.unflatten(output_tree, cotangents)
        return jax.tree.leaves(transpose(*trees))

    residual_axes, tangent_axes, output_axes = (tuple(jax.tree.leaves(axes)) for axes in batch_axes)
    pair = _Pair(forwards, backwards, _shapes(moved), _shapes(outputs), residual_axes, tangent_axes, output_axes)
    return jax.tree.unflatten(output_tree, _bind([*known, *moved], pair))


def _shapes(arrays: Arrays) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in arrays)


@dataclasses.dataclass(frozen=True, eq=False)
class _Pair:
    """Two linear maps, each the transpose of the other, on lists of arrays; the first is the one to call.

    One of them is what JAX derives derivatives by the residuals from: the other may be written for speed alone.
    """

    function: Callable[[Arrays, Arrays], list[Any]]
    transpose: Callable[[Arrays, Arrays], list[Any]]
    tangents: tuple[jax.ShapeDtypeStruct, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    residual_axes: tuple[int, ...]
    tangent_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    is_transposed: bool = False

    def transposed(self) -> "_Pair":
        return _Pair(
            function=self.transpose,
            transpose=self.function,
            tangents=self.outputs,
            outputs=self.tangents,
            residual_axes=self.residual_axes,
            tangent_axes=self.output_axes,
            output_axes=self.tangent_axes,
            is_transposed=not self.is_transposed,
        )

    def derived(self, residuals: Arrays, tangents: Arrays) -> Any:
        """Returns what ``function`` does, in terms of the map that is not the transposed one."""
        if not self.is_transposed:
            return self.function(residuals, tangents)
        return list(jax.linear_transpose(lambda *moved: self.transpose(residuals, moved), *self.outputs)(tangents))

    def split(self, args: Arrays) -> tuple[list[Any], list[Any]]:
        """Returns the residuals and the tangents."""
        number = len(self.residual_axes)
        return list(args[:number]), list(args[number:])


_linear_map_p = core.Primitive("linear_map")
_linear_map_p.multiple_results = True


def _bind(args: Arrays, pair: _Pair) -> list[Any]:
    return _linear_map_p.bind(*args, pair=pair)


def _called(*args: Any, pair: _Pair) -> list[Any]:
    return pair.function(*pair.split(args))


def _abstract(*_: Any, pair: _Pair) -> list[Any]:
    return [jax.core.ShapedArray(like.shape, like.dtype) for like in pair.outputs]


def _jvp(primals: Arrays, tangents: Arrays, *, pair: _Pair) -> tuple[list[Any], list[Any]]:
    results = _bind(primals, pair)
    residuals, _ = pair.split(primals)
    by_residuals, by_moved = pair.split(tangents)
    if all(isinstance(tangent, ad.Zero) for tangent in by_residuals):
        return results, _bind([*residuals, *map(ad.instantiate_zeros, by_moved)], pair)
    varied = [index for index, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def of_varied(*values: Any) -> list[Any]:
        args = list(primals)
        for index, value in zip(varied, values, strict=True):
            args[index] = value
        return pair.derived(*pair.split(args))

    at, along = ([of[index] for index in varied] for of in (primals, tangents))
    return results, jax.jvp(of_varied, at, along)[1]


def _transpose(cotangents: Arrays, *args: Any, pair: _Pair) -> list[Any]:
    residuals, moved = pair.split(args)
    results = _bind([*residuals, *map(ad.instantiate_zeros, cotangents)], pair.transposed())
    wanted = [r if ad.is_undefined_primal(m) else None for r, m in zip(results, moved, strict=True)]
    return [None] * len(residuals) + wanted


def _batch(args: Arrays, dims: Sequence[int | None], *, pair: _Pair) -> tuple[list[Any], list[int]]:
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)
    residual_dims, _ = pair.split(dims)
    axes = [*pair.residual_axes, *pair.tangent_axes]
    movable = all(axis >= 0 for axis, dim in zip(axes, dims, strict=True) if dim is not None)
    if movable and min(pair.output_axes) >= 0 and any(dim is not None for dim in residual_dims):
        placed = [_placed(*entry, size) for entry in zip(args, dims, axes, strict=True)]
        wider = dataclasses.replace(
            pair,
            tangents=_widened(pair.tangents, pair.tangent_axes, size),
            outputs=_widened(pair.outputs, pair.output_axes, size),
        )
        return _bind(placed, wider), list(pair.output_axes)
    residuals, moved = pair.split(args)
    _, moved_dims = pair.split(dims)
    moved = [_placed(*entry, 0, size) for entry in zip(moved, moved_dims, strict=True)]
    over_all = _Pair(
        function=jax.vmap(pair.derived, (residual_dims, 0)),
        transpose=jax.vmap(pair.transposed().derived, (residual_dims, 0)),
        tangents=_widened(pair.tangents, [0] * len(pair.tangents), size),
        outputs=_widened(pair.outputs, [0] * len(pair.outputs), size),
        residual_axes=(-1,) * len(pair.residual_axes),
        tangent_axes=(-1,) * len(pair.tangent_axes),
        output_axes=(-1,) * len(pair.output_axes),
        is_transposed=pair.is_transposed,
    )
    return _bind([*residuals, *moved], over_all), [0] * len(pair.outputs)


def _placed(array: Any, dim: int | None, axis: int, size: int) -> Any:
    """Returns the array with its mapped axis, or a new one of its copies, at ``axis``; −1 for an array without."""
    if axis < 0:
        return array
    if dim is not None:
        return jnp.moveaxis(array, dim, axis)
    shape = jnp.shape(array)
    return jnp.broadcast_to(jnp.expand_dims(array, axis), (*shape[:axis], size, *shape[axis:]))


def _widened(arrays: Arrays, axes: Sequence[int], size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns the shapes with one axis more at ``axes``, or as they are where that is −1."""
    return tuple(
        x if axis < 0 else jax.ShapeDtypeStruct((*x.shape[:axis], size, *x.shape[axis:]), x.dtype)
        for x, axis in zip(arrays, axes, strict=True)
    )


_linear_map_p.def_impl(_called)
_linear_map_p.def_abstract_eval(_abstract)
ad.primitive_jvps[_linear_map_p] = _jvp
ad.primitive_transposes[_linear_map_p] = _transpose
batching.primitive_batchers[_linear_map_p] = _batch
mlir.register_lowering(_linear_map_p, mlir.lower_fun(_called, multiple_results=True))
