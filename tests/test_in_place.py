"""Scans that write over what they read: results, derivatives of every order and mapped axes are those of a scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnnjax.in_place import scan_in_place
from tests.test_affine_scan import agree

EVERY_LOOP = pytest.mark.parametrize(
    "options", [{}, {"side_by_side": True}, {"flat": True}], ids=lambda options: "".join(options) or "plain"
)


def step(weights, carry, x, row):
    """A step with all that there may be: more than one carry, rows of several shapes, a number kept of each step."""
    state, total = carry
    first, second = row
    after = jnp.tanh(state @ weights + x * first)
    return (after, total + after.sum()), (state * first, second + total), (after, total)


def arguments():
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = ((3, 3), (2, 3), (), (7, 2, 3), (7, 2, 3), (7,))
    weights, state, total, xs, *rows = (
        jax.random.normal(key, shape, jnp.float64) for key, shape in zip(keys, shapes, strict=True)
    )
    return weights, (state, total), xs, tuple(rows)


def by_scan(reverse, weights, carry, xs, rows):
    def one(carry, entries):
        carry, row, kept = step(weights, carry, *entries)
        return carry, (row, kept)

    carry, (rows, kept) = jax.lax.scan(one, carry, (xs, rows), reverse=reverse)
    return carry, rows, kept


def in_place(reverse, options, weights, carry, xs, rows):
    one = functools.partial(step, weights)
    return scan_in_place(one, carry, xs, rows, xs, reverse=reverse, **options)


@EVERY_LOOP
@pytest.mark.parametrize("reverse", [False, True])
def test_rows_are_read_before_they_are_written(reverse, options):
    with jax.enable_x64():
        ours, plain = functools.partial(in_place, reverse, options), functools.partial(by_scan, reverse)
        agree(ours(*arguments()), plain(*arguments()), 1e-14)
        agree(jax.jit(ours)(*arguments()), plain(*arguments()), 1e-14)


@EVERY_LOOP
def test_derivatives_of_every_order(options):
    def everything(scan):
        def scalar(*args):
            return sum((leaf**2).sum() for leaf in jax.tree.leaves(scan(*args)))

        def squares(*args):
            return sum((leaf**2).sum() for leaf in jax.tree.leaves(jax.grad(scalar, argnums=(0, 1, 2, 3))(*args)))

        tangents = jax.tree.map(jnp.cos, arguments())
        forward = jax.jvp(scan, arguments(), tangents)[1]
        return forward, jax.grad(scalar, argnums=(0, 1, 2, 3))(*arguments()), jax.grad(squares)(*arguments())

    with jax.enable_x64():
        plain = functools.partial(by_scan, False)
        agree(everything(functools.partial(in_place, False, options)), everything(plain), 1e-12)


@EVERY_LOOP
@pytest.mark.parametrize("mapped", [(0, None, None, None), (None, None, 1, None), (2, (1, 0), None, (2, 0))])
def test_mapped_axes(mapped, options):
    """Whatever is mapped, along whichever axis, and differentiated after that."""

    def spread(array, axis):
        copies = jnp.stack([array, 2 * array, -array])
        return array if axis is None else jnp.moveaxis(copies, 0, axis)

    def tree_spread(tree, axes):
        axes = jax.tree.map(lambda _: axes, tree) if axes is None or isinstance(axes, int) else axes
        return jax.tree.map(spread, tree, axes, is_leaf=lambda x: x is None)

    def everything(scan):
        over_all = jax.vmap(scan, mapped)
        own = [tree_spread(*pair) for pair in zip(arguments(), mapped, strict=True)]

        def scalar(*args):
            return sum((leaf**2).sum() for leaf in jax.tree.leaves(over_all(*args)))

        return over_all(*own), jax.grad(scalar, argnums=(0, 1, 2, 3))(*own)

    with jax.enable_x64():
        plain = functools.partial(by_scan, True)
        agree(everything(functools.partial(in_place, True, options)), everything(plain), 1e-12)


@EVERY_LOOP
def test_nothing_is_set_to_zero_and_no_row_is_copied_whole(options):
    """What is written to is what was given, where nobody reads it afterwards: no memory but for what is kept."""
    num_steps, width = 400, 4096

    def program(xs, rows):
        def one(carry, x, row):
            return carry + x, row * carry, carry

        _, rows, kept = scan_in_place(one, jnp.zeros(width), xs, rows, xs, **options)
        return rows, kept

    rows = jnp.ones((num_steps, width))
    compiled = jax.jit(program, donate_argnums=1).lower(rows, rows).compile()
    array = num_steps * width * np.dtype(np.float32).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < array / 8
    assert "dynamic-update-slice" in compiled.as_text()
