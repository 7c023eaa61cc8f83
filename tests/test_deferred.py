"""Functions with a derivative of their own: what ``jax.custom_jvp`` does, without tracing what is not computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import rnnjax
from rnnjax.deferred import call_with_jvp


@jax.custom_jvp
def reference(pair, factor):
    return {"product": pair[0] * factor, "sum": pair[1].sum() + jnp.sin(factor)}


@reference.defjvp
def _reference_jvp(primals, tangents):
    return reference(*primals), tangent_of(primals, tangents)


def tangent_of(primals, tangents):
    """Not the derivative."""
    ((first, second), factor), ((d_first, d_second), d_factor) = primals, tangents
    return {"product": 3 * d_first * factor + first * d_factor, "sum": (second * d_second).sum() + 2 * d_factor}


def deferred(pair, factor):
    def value(pair, factor):
        return {"product": pair[0] * factor, "sum": pair[1].sum() + jnp.sin(factor)}

    def jvp(primals, tangents):
        tangents = jax.tree.map(
            lambda x, dx: jnp.zeros_like(x) if dx is None else dx, primals, tangents, is_leaf=lambda x: x is None
        )
        return deferred(*primals), tangent_of(primals, tangents)

    return call_with_jvp(value, jvp, (pair, factor), jax.eval_shape(value, pair, factor))


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


PAIR, FACTOR = (jnp.arange(3.0), jnp.array([1.0, -2.0])), jnp.array(0.5)


def scalar(function):
    return lambda pair, factor: sum((leaf**2).sum() for leaf in jax.tree.leaves(function(pair, factor)))


@pytest.mark.parametrize("argnums", [0, 1, (0, 1)])
def test_values_and_derivatives(argnums):
    close(deferred(PAIR, FACTOR), reference(PAIR, FACTOR))
    close(*(jax.jit(jax.grad(scalar(f), argnums))(PAIR, FACTOR) for f in (deferred, reference)))
    hessians = (jax.jacfwd(jax.grad(scalar(f), argnums), argnums)(PAIR, FACTOR) for f in (deferred, reference))
    close(*hessians)


@pytest.mark.parametrize("axes", [(0, None), ((None, 1), 0), ((1, None), 0)])
def test_mapped_axes(axes):
    def spread(array, axis):
        return array if axis is None else jnp.moveaxis(jnp.stack([array, 2 * array]), 0, axis)

    first, second = axes if isinstance(axes[0], tuple) else ((axes[0],) * 2, axes[1])
    own = tuple(map(spread, PAIR, first)), spread(FACTOR, second)
    mapped = [jax.vmap(f, (first, second)) for f in (deferred, reference)]
    close(*(f(*own) for f in mapped))
    close(*(jax.grad(scalar(f), argnums=(0, 1))(*own) for f in mapped))
    close(*(jax.vmap(jax.grad(scalar(f)), (first, second))(*own) for f in (deferred, reference)))


def test_the_function_is_not_traced_for_its_derivative():
    calls = []

    def value(x):
        calls.append("value")
        return 2 * x

    def of(x):
        return call_with_jvp(value, lambda x, dx: (2 * x[0], 2 * dx[0]), (x,), x)

    assert jax.jit(jax.grad(jax.jit(of)))(1.0) == 2 and not calls
    assert jax.jit(of)(1.0) == 2 and calls == ["value"]


@pytest.mark.parametrize("differentiate", [False, True])
def test_networks_spread_by_hand_over_a_mesh(differentiate):
    """JAX's check of what varies over a mesh is refused by name; without it, devices do their parts."""
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
    cell = rnnjax.GRUCell(3)
    params, inputs = cell.init(jax.random.key(0), 2), jnp.ones((5, 4, 2))
    split = PartitionSpec(None, "batch")

    def run(params, inputs):
        return rnnjax.unroll(cell, params, inputs)[1]

    def spread(check):
        part = jax.shard_map(run, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split, check_vma=check)
        if not differentiate:
            return part(params, inputs)
        return jax.grad(lambda params: (part(params, inputs) ** 2).sum())(params)

    with pytest.raises(ValueError, match=r"check_vma of jax.shard_map must be False .*, got True"):
        spread(True)
    expected = jax.grad(lambda p: (run(p, inputs) ** 2).sum())(params) if differentiate else run(params, inputs)
    close(spread(False), expected)
