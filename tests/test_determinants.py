"""Determinants of all steps of a batch beside other work: against NumPy, and in a loop that waits for no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnjax
from rnnjax import determinants, lapack, testing
from rnnjax.jacobians import jacobian_operator
from rnnjax.operators import DenseJacobians, LinearizedJacobians
from rnnjax.structured import StructuredJacobians
from tests.test_side_by_side import check_two_threads

H, T, BATCH = 4, 7, (2, 3)


@pytest.fixture(params=[False, True], ids=["one core", "two cores"])
def spare(request, monkeypatch):
    monkeypatch.setattr(determinants, "has_spare_core", lambda: request.param and jax.default_backend() == "cpu")
    return request.param


def own_step(params, carry, inputs):
    state = jnp.tanh(carry @ params["recurrent"] + inputs)
    return state, state


def jacobians_of(name, dtype):
    """Jacobians ``[T, 2, 3, S, S]`` of each form, far from singular."""
    rng = np.random.default_rng(0)
    if name == "dense":
        return DenseJacobians(jnp.asarray(rng.normal(size=(T, *BATCH, H, H)), dtype))
    if name == "three carries":
        shapes = [(T, *BATCH, 3, 3, H), (T, *BATCH, 3, 2, H), (H, 2, H)]
        return StructuredJacobians.from_factors(*(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes))
    if name == "step":
        cell, features = rnnjax.StepCell(own_step, jnp.zeros(H, dtype)), H
        params = {"recurrent": jnp.asarray(rng.normal(size=(H, H)), dtype)}
    else:
        cell, features = {"tanh": rnnjax.VanillaCell, "gru": rnnjax.GRUCell, "lstm": rnnjax.LSTMCell}[name](H), 3
        params = jax.tree.map(lambda a: 2 * a, cell.init(jax.random.key(0), features, dtype))
    inputs = jnp.asarray(rng.normal(size=(T, *BATCH, features)), dtype)
    return jacobian_operator(cell, params, rnnjax.trajectory(cell, params, inputs))


def sums_and_totals(jacobians, reverse=False):
    @jax.jit
    def both(jacobians):
        return determinants.with_log_abs_dets(
            lambda chain: chain.dense().sum(), jacobians, jacobians.dtype, reverse=reverse
        )

    return both(jacobians)


@pytest.mark.parametrize(
    ("name", "spare", "reverse"),
    [(name, True, name in ("tanh", "dense")) for name in ("tanh", "gru", "lstm", "three carries", "dense", "step")]
    + [("gru", False, True), ("lstm", False, False)],
    indirect=["spare"],
)
def test_totals_are_those_of_numpy(name, spare, reverse, dtype):
    jacobians = jacobians_of(name, dtype)
    assert isinstance(jacobians, LinearizedJacobians) == (name == "step")
    sums, totals = sums_and_totals(jacobians, reverse)
    matrices = np.asarray(jacobians.dense(), np.float64)
    logs = np.linalg.slogdet(matrices)[1]
    limit = testing.rounding_tolerance(dtype, 50) * np.linalg.cond(matrices).max()
    np.testing.assert_allclose(totals, np.cumsum(logs[::-1] if reverse else logs, axis=0), atol=limit)
    np.testing.assert_allclose(sums, matrices.sum(axis=(0, -1, -2)), rtol=1e-4, atol=limit)


@pytest.mark.usefixtures("spare")
def test_a_singular_step_is_of_its_sequence_alone():
    matrices = np.random.default_rng(1).normal(size=(T, 3, H, H))
    matrices[4, 1, :, 2] = 0
    matrices[2, 2, 0, 0] = np.nan
    _, totals = sums_and_totals(DenseJacobians(jnp.asarray(matrices, jnp.float32)))
    logs = np.linalg.slogdet(matrices[:, 0].astype(np.float32).astype(np.float64))[1]
    np.testing.assert_allclose(totals[:, 0], np.cumsum(logs), atol=1e-4)
    assert np.isfinite(totals[:4, 1]).all() and np.isneginf(totals[4:, 1]).all()
    assert np.isfinite(totals[:2, 2]).all() and np.isnan(totals[2:, 2]).all()


@pytest.mark.usefixtures("spare")
def test_derivatives_and_batches_of_batches():
    """d log|det A_t| = tr(A_t⁻¹ dA_t)."""
    matrices, change = np.random.default_rng(2).normal(size=(2, T, 3, H, H))

    def last(matrices):
        return sums_and_totals(DenseJacobians(matrices))[1][-1]

    with jax.enable_x64():
        tangent = jax.jvp(last, (jnp.asarray(matrices),), (jnp.asarray(change),))[1]
        np.testing.assert_allclose(tangent, np.trace(np.linalg.solve(matrices, change), axis1=-2, axis2=-1).sum(0))
        stacked = jnp.asarray(np.stack([matrices, 2 * matrices]))
        expected = np.linalg.slogdet(stacked)[1].sum(axis=1)
        np.testing.assert_allclose(jax.vmap(last)(stacked), expected, rtol=1e-12)


def test_in_place_factors_are_those_of_the_transpose(dtype):
    with jax.default_device(jax.devices("cpu")[0]):  # where LAPACK is
        check_in_place_factors(dtype)


def check_in_place_factors(dtype):
    matrix = jnp.asarray(np.random.default_rng(3).normal(size=(5, 5)), dtype)
    packed, exchanges, status = jax.jit(lapack.lu_of_transpose_in_place)(matrix)
    lower, upper = np.tril(packed.T, -1) + np.eye(5), np.triu(packed.T)
    expected = np.array(matrix.T)
    for row, other in enumerate(np.asarray(exchanges) - 1):
        expected[[row, other]] = expected[[other, row]]
    np.testing.assert_allclose(lower @ upper, expected, atol=testing.rounding_tolerance(dtype, 20))
    assert status == 0
    assert lapack.lu_of_transpose_in_place(jnp.zeros((2, 2), dtype))[2] == 1


_PROGRAM = """
import jax, rnnjax
from rnnjax import side_by_side
from rnnjax.jacobians import jacobian_operator
side_by_side._number_of_cores = lambda: 2
cell = rnnjax.{cell}(32)
params = cell.init(jax.random.key(0), input_size=2)

def all_values(inputs):
    jacobians = jacobian_operator(cell, params, rnnjax.trajectory(cell, params, inputs))
    return rnnjax.singular_spectrum(rnnjax.factor_product(jacobians))

jax.jit(all_values).lower(jax.numpy.ones((50, 4, 2))).compile()
"""


@pytest.mark.slow  # compiled as for users
@pytest.mark.parametrize("cell", ["VanillaCell", "GRUCell", "LSTMCell"])
def test_xla_has_determinants_and_products_on_two_threads(cell):
    check_two_threads(_PROGRAM.format(cell=cell))
