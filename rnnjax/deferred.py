"""Functions with a derivative of their own that are traced where they are computed, and not before.

``jax.custom_jvp`` traces a function, within ``jit``, even where its derivative's rule computes the value too and the
function itself is not needed. For a scan, that is a fifth of what it takes to trace a gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir


def call_with_jvp(
    function: Callable[..., Any], jvp: Callable[[Any, Any], tuple[Any, Any]], args: tuple[Any, ...], like: Any
) -> Any:
    """Returns ``function(*args)``, differentiated by ``jvp``.

    Args:
      function: takes pytrees of arrays, closes over no array.
      jvp: ``jvp(args, tangents)``, both tuples of pytrees, a tangent that is zero as None, gives what ``function`` does
        and its tangent. Linear in the tangents, and differentiable as often as derivatives are wanted.
      args: what to call the function with.
      like: a pytree of arrays or shapes, those of what the function returns.

    Returns:
      A tree as ``like`` is.

    Raises:
      ValueError: arrays that vary over manual axes of a mesh, which JAX would want to be told of the results.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> double = lambda x: call_with_jvp(lambda x: 2 * x, lambda x, dx: (2 * x[0], 5 * dx[0]), (x,), x)
      >>> double(jnp.asarray(1.0)).item(), jax.grad(double)(1.0).item()
      (2.0, 5.0)
    """
    leaves, structure = jax.tree.flatten(args)
    shapes, results = jax.tree.flatten(like)

    def run(leaves: list[Any]) -> list[Any]:
        return jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves)))

    def rule(leaves: list[Any], tangents: list[Any]) -> tuple[list[Any], list[Any]]:
        value, tangent = jvp(*(jax.tree.unflatten(structure, flat) for flat in (leaves, tangents)))
        return jax.tree.leaves(value), jax.tree.leaves(tangent)

    like = tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in shapes)
    return jax.tree.unflatten(results, _call_p.bind(*leaves, call=_Call(run, rule, like)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """A function of a list of arrays, its derivative, and the shapes of what it returns."""

    run: Callable[[list[Any]], list[Any]]
    rule: Callable[[list[Any], list[Any]], tuple[list[Any], list[Any]]]
    like: tuple[jax.ShapeDtypeStruct, ...]


_call_p = core.Primitive("call_with_jvp")
_call_p.multiple_results = True


def _called(*leaves: Any, call: _Call) -> list[Any]:
    return call.run(list(leaves))


def _abstract(*leaves: Any, call: _Call) -> list[Any]:
    if any(getattr(getattr(x, "mat", None), "varying", None) for x in leaves):
        raise ValueError("check_vma of jax.shard_map must be False around an unroll, got True")
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in call.like]


def _jvp(primals: Any, tangents: Any, *, call: _Call) -> tuple[list[Any], list[Any]]:
    return call.rule(list(primals), [None if isinstance(tangent, ad.Zero) else tangent for tangent in tangents])


def _batch(leaves: Any, dims: Any, *, call: _Call) -> tuple[list[Any], list[int]]:
    size = next(x.shape[dim] for x, dim in zip(leaves, dims, strict=True) if dim is not None)
    axes = list(dims)

    def rule(leaves: list[Any], tangents: list[Any]) -> tuple[list[Any], list[Any]]:
        moved = [None if tangent is None else axis for tangent, axis in zip(tangents, axes, strict=True)]
        return jax.vmap(call.rule, (axes, moved))(leaves, tangents)

    like = tuple(jax.ShapeDtypeStruct((size, *x.shape), x.dtype) for x in call.like)
    results = _call_p.bind(*leaves, call=_Call(jax.vmap(call.run, (axes,)), rule, like))
    return results, [0] * len(results)


_call_p.def_impl(_called)
_call_p.def_abstract_eval(_abstract)
ad.primitive_jvps[_call_p] = _jvp
batching.primitive_batchers[_call_p] = _batch
mlir.register_lowering(_call_p, mlir.lower_fun(_called, multiple_results=True))
