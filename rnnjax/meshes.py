"""Arrays on a mesh of devices whose axes are explicit: part of every array's type, as JAX's own meshes have them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rnnjax.typing import Array


def check_not_spread(name: str, tree: Any) -> None:
    """Raises ValueError that names the argument if an array is spread over explicit axes of a mesh."""
    for leaf in jax.tree.leaves(tree):
        sharding = jax.typeof(leaf).sharding
        if AxisType.Explicit in sharding.mesh.axis_types and any(part is not None for part in sharding.spec):
            raise ValueError(
                f"{name} must not be spread over explicit axes of a mesh, got {jax.typeof(leaf)}; "
                "a mesh with axis_types=(jax.sharding.AxisType.Auto,), one for each of its axes, will do"
            )


def on_any_mesh(function: Callable[..., Any], like: Array, num_batch_axes: int, time_major: tuple[bool, ...]) -> Any:
    """Returns a function that leaves it to the compiler how its arrays are spread, where JAX would want to be told.

    Args:
      function: takes arrays, and returns a tuple; the same object for every call, or each would be compiled again.
      like: time-major ``[T, ..., D]``; results are spread over the devices along the batch axes like it.
      num_batch_axes: how many there are.
      time_major: for each result, whether its leaves have time before the batch axes.

    Returns:
      The function itself where no array is on a mesh with explicit axes.
    """

    def run(*arrays: Any, **options: Any) -> Any:
        meshes = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(arrays))
        mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
        if mesh is None:
            return function(*arrays, **options)
        batch = jax.typeof(like).sharding.spec[1 : 1 + num_batch_axes]
        out = (PartitionSpec(None, *batch) if with_time else PartitionSpec(*batch) for with_time in time_major)
        shardings = tuple(NamedSharding(mesh, spec) for spec in out)
        return _with_automatic_axes(function, tuple(options.items()), shardings, *arrays)

    return run


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _with_automatic_axes(
    function: Callable[..., Any],
    options: tuple[tuple[str, Any], ...],
    shardings: tuple[NamedSharding, ...],
    *arrays: Any,
) -> Any:
    return jax.sharding.auto_axes(functools.partial(function, **dict(options)), out_sharding=shardings)(*arrays)
