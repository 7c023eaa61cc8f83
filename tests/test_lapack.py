"""Factorisations of many matrices against NumPy, and their gradients against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnnjax import lapack, testing

BATCH_SHAPES = [(), (3,), (2, 3)]
FACTORISATIONS = {"qr", "geqrf", "householder_product", "lu", "svd"}
SCALARS = {
    "log_abs_det": (lapack.log_abs_det, lambda matrices: np.linalg.slogdet(matrices)[1]),
    "spectral_norm": (lapack.spectral_norm, lambda matrices: np.linalg.norm(matrices, 2, axis=(-2, -1))),
}
FUNCTIONS = {"qr": lapack.qr} | {name: function for name, (function, _) in SCALARS.items()}


def random_matrices(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def factorised_ranks(jaxpr):
    """Number of axes of what each LAPACK primitive of a program gets, loops and calls included."""
    ranks = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in FACTORISATIONS:
            ranks.append(equation.invars[0].aval.ndim)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda node: hasattr(node, "eqns")):
            if hasattr(inner, "eqns"):
                ranks += factorised_ranks(getattr(inner, "jaxpr", inner))
    return ranks


@pytest.mark.parametrize("batch_shape", BATCH_SHAPES)
@pytest.mark.parametrize("name", SCALARS)
def test_scalars_are_those_of_numpy(name, batch_shape, dtype):
    function, reference = SCALARS[name]
    matrices = jnp.asarray(random_matrices((*batch_shape, 4, 4)), dtype)
    result = jax.jit(function)(matrices)
    assert result.dtype == dtype and result.shape == batch_shape
    exact = np.asarray(matrices, np.float64)
    # Rounding of the entries moves a determinant by up to ε·κ; one of the matrices has κ = 1700.
    allowed = testing.rounding_tolerance(dtype, 60)
    if name == "log_abs_det":
        allowed += testing.rounding_tolerance(dtype, 0.1) * np.linalg.cond(exact)
    assert np.all(np.abs(np.asarray(result, np.float64) - reference(exact)) <= allowed)


@pytest.mark.parametrize("batch_shape", BATCH_SHAPES)
def test_qr_is_a_reduced_factorisation(batch_shape, dtype):
    matrices = jnp.asarray(random_matrices((*batch_shape, 5, 3)), dtype)
    q, r = (np.asarray(factor) for factor in jax.jit(lapack.qr)(matrices))
    limit = testing.rounding_tolerance(dtype, 50)
    assert q.shape == (*batch_shape, 5, 3) and r.shape == (*batch_shape, 3, 3)
    np.testing.assert_allclose(q @ r, matrices, atol=limit)
    np.testing.assert_allclose(np.swapaxes(q, -1, -2) @ q, np.broadcast_to(np.eye(3), r.shape), atol=limit)
    np.testing.assert_array_equal(r, np.triu(r))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (9, 4), (12, 12), (40, 17)])
def test_lu_has_the_rows_in_the_order_of_their_pivots(shape, backend, dtype, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    columns = jnp.asarray(random_matrices(shape), dtype)
    rows, lower, upper = (np.asarray(x) for x in jax.jit(lambda c: lapack.lu(c))(columns))
    assert sorted(rows) == list(range(shape[0]))
    np.testing.assert_allclose(lower @ upper, np.asarray(columns)[rows], atol=testing.rounding_tolerance(dtype, 50))
    assert np.abs(lower).max() == 1 and (np.diagonal(lower) == 1).all()
    np.testing.assert_array_equal(lower, np.tril(lower))
    np.testing.assert_array_equal(upper, np.triu(upper))


def test_spectral_norm_takes_matrices_that_are_not_square():
    matrices = random_matrices((2, 3, 5)).astype(np.float32)
    expected = np.linalg.norm(matrices, 2, axis=(1, 2))
    np.testing.assert_allclose(lapack.spectral_norm(jnp.asarray(matrices)), expected, rtol=1e-5)


def test_singular_and_non_finite_matrices():
    matrices = jnp.stack([jnp.ones((2, 2)), jnp.full((2, 2), jnp.nan), jnp.diag(jnp.array([2.0, 3.0]))])
    np.testing.assert_allclose(lapack.log_abs_det(matrices), [-np.inf, np.nan, np.log(6)], rtol=1e-6)
    np.testing.assert_allclose(lapack.spectral_norm(matrices), [2, np.nan, 3], rtol=1e-6)


def test_inside_scan_a_batch_is_carried_along():
    chain = random_matrices((6, 2, 3, 3))

    def step(frame, matrix):
        frame, triangle = lapack.qr(matrix @ frame)
        return frame, jnp.log(jnp.abs(jnp.diagonal(triangle, axis1=-2, axis2=-1))).sum(axis=-1)

    start = jnp.broadcast_to(jnp.eye(3)[None], (2, 3, 3))
    _, growth = jax.jit(lambda steps: jax.lax.scan(step, start, steps))(jnp.asarray(chain, jnp.float32))
    np.testing.assert_allclose(growth, np.linalg.slogdet(chain)[1], atol=1e-4)


def test_vmap_adds_an_axis():
    matrices = random_matrices((4, 2, 3, 3))
    result = jax.vmap(lapack.spectral_norm, in_axes=1, out_axes=1)(jnp.asarray(matrices, jnp.float32))
    np.testing.assert_allclose(result, np.linalg.norm(matrices, 2, axis=(-2, -1)), rtol=1e-5)


def test_results_may_be_pytrees_of_any_rank():
    array = jnp.arange(24.0).reshape(2, 3, 4)
    result = lapack.over_batch(lambda row: {"sum": row.sum(), "outer": row[:, None] * row[None]}, array, 2)
    np.testing.assert_allclose(result["sum"], np.asarray(array).sum(axis=-1))
    np.testing.assert_allclose(result["outer"], np.einsum("abi,abj->abij", array, array))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("backend", "largest_rank"), [("cpu", 2), ("gpu", 3)])
def test_cpu_gets_one_matrix_a_call_and_accelerators_the_batch(name, backend, largest_rank, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    program = jax.make_jaxpr(lambda matrices: FUNCTIONS[name](matrices))(jnp.ones((2, 3, 4, 4)))
    assert set(factorised_ranks(program.jaxpr)) == {largest_rank}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_ways_give_the_same(name, monkeypatch):
    matrices = jnp.asarray(random_matrices((2, 3, 4, 4)), jnp.float32)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    one_by_one = jax.jit(lambda m: FUNCTIONS[name](m))(matrices)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    at_once = jax.jit(lambda m: FUNCTIONS[name](m))(matrices)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one_by_one, at_once)


def test_gradients_are_those_of_the_closed_forms():
    with jax.enable_x64(True):
        tall, square = jnp.asarray(random_matrices((2, 5, 3))), jnp.asarray(random_matrices((2, 3, 3)))

        def log_volume(matrices):  # Σ log|R_ii| = ½ log det AᵀA, of gradient (A⁺)ᵀ
            return jnp.log(jnp.abs(jnp.diagonal(lapack.qr(matrices)[1], axis1=-2, axis2=-1))).sum()

        volume = jax.jit(jax.grad(log_volume))(tall)
        np.testing.assert_allclose(volume, np.swapaxes(np.linalg.pinv(tall), -1, -2), rtol=1e-10)
        determinant = jax.jit(jax.grad(lambda matrices: lapack.log_abs_det(matrices).sum()))(square)
        np.testing.assert_allclose(determinant, np.swapaxes(np.linalg.inv(square), -1, -2), rtol=1e-10)
        norm = jax.jit(jax.grad(lambda matrices: lapack.spectral_norm(matrices).sum()))(square)
        left, _, right = np.linalg.svd(square)
        np.testing.assert_allclose(norm, left[:, :, :1] * right[:, :1, :], rtol=1e-10)
