"""Linear maps with transposes of their own: what JAX makes of them, against matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnnjax.linear_maps import linear_map

M, N = 2, 3


def product(matrix, x, calls=None):
    """A x for x ``[n, ...]``, its transpose written out; ``calls`` gets the name of what is called."""

    def note(name):
        if calls is not None:
            calls.append(name)

    def function(matrix, x):
        note("function")
        return jnp.tensordot(matrix, x, 1)

    def transpose(matrix, cotangent):
        note("transpose")
        return jnp.tensordot(matrix.T, cotangent, 1)

    return linear_map(function, transpose, matrix, x, jnp.zeros((M, *x.shape[1:])), (-1, 1, 1))


def draw(*shape):
    return jax.random.normal(jax.random.key(len(shape)), shape)


def plain(matrix, x):
    return jnp.tensordot(matrix, x, 1)


def test_reverse_mode_calls_the_transpose_and_forward_mode_does_not():
    matrix, x, calls = draw(M, N), draw(N), []
    _, pull_back = jax.vjp(lambda x: product(matrix, x, calls), x)
    assert "transpose" not in calls
    np.testing.assert_allclose(pull_back(jnp.ones(M))[0], matrix.T @ jnp.ones(M), rtol=1e-6)
    assert "transpose" in calls
    calls.clear()
    jax.jvp(lambda x: product(matrix, x, calls), (x,), (x,))
    assert set(calls) == {"function"}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("mapped", ["neither", "x", "matrix", "both", "twice"])
@pytest.mark.parametrize(
    "order", ["value", "gradient", "gradient inside", "forward over reverse", "reverse over reverse"]
)
@pytest.mark.parametrize("by", [(0, 1), (1,)], ids=["by both", "by x"])  # of the first gradient; the second is by both
def test_it_is_a_product(by, order, mapped, jit):
    def over(f):
        axes = {"x": (None, 1), "matrix": (0, None), "both": (0, 1)}
        if mapped == "neither":
            return f
        return jax.vmap(jax.vmap(f, (None, 1)), (0, 2)) if mapped == "twice" else jax.vmap(f, axes[mapped])

    def results(f):
        def loss(matrix, x):
            return jnp.sum(jnp.sin(f(matrix, x)) ** 2)

        def total(matrix, x):
            return jnp.sum(over(loss)(matrix, x) ** 2)

        gradient = jax.grad(total, argnums=by)
        return {
            "value": over(f),
            "gradient": gradient,
            "gradient inside": over(jax.grad(loss, argnums=by)),
            "forward over reverse": lambda *at: jax.jvp(gradient, at, at)[1],
            "reverse over reverse": jax.grad(lambda *at: sum(jnp.sum(g**2) for g in gradient(*at)), argnums=(0, 1)),
        }[order]

    matrix = draw(4, M, N) if mapped in ("matrix", "both", "twice") else draw(M, N)
    x = {"x": draw(N, 4), "both": draw(N, 4), "twice": draw(N, 5, 4)}.get(mapped, draw(N))
    ours, theirs = results(product), results(plain)
    ours = jax.jit(ours) if jit else ours
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max())),
        ours(matrix, x),
        theirs(matrix, x),
    )


def test_a_mapped_axis_becomes_a_batch_axis():
    """The gradient of weights that all sequences share is summed in one product, not made for each."""
    matrix, x = draw(M, N), draw(N, 4)

    def summed(matrix_tangent, x):
        function = lambda x, m: jnp.tensordot(m, x, 1)  # noqa: E731
        transpose = lambda x, c: jnp.tensordot(c, x, axes=(tuple(range(1, c.ndim)), tuple(range(1, x.ndim))))  # noqa: E731
        return linear_map(function, transpose, x, matrix_tangent, jnp.zeros((M, *x.shape[1:])), (1, -1, 1))

    def loss(matrix):
        return jnp.sum(jax.vmap(summed, (None, 1))(matrix, x) ** 2)

    np.testing.assert_allclose(jax.vmap(summed, (None, 1))(matrix, x), (matrix @ x).T, rtol=1e-5)
    expected = jax.grad(lambda m: jnp.sum((m @ x) ** 2))(matrix)
    np.testing.assert_allclose(jax.grad(loss)(matrix), expected, rtol=1e-5)
    shapes = str(jax.make_jaxpr(jax.grad(loss))(matrix))
    assert f"f32[4,{M},{N}]" not in shapes
