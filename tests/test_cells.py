"""Cells against their printed equations in NumPy, Flax's cells, and one another."""

import dataclasses
from typing import ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnjax
from rnnjax import testing
from rnnjax.activations import sigmoid, tanh

D, H = 3, 4


@dataclasses.dataclass(frozen=True)
class MinimalGatedCell(rnnjax.AffineCell):
    """A user's own cell (Zhou et al. 2016): f = σ(u_f + r_f), h' = (1 − f) h + f tanh(u_n + f r_n)."""

    num_gates: ClassVar[int] = 2
    has_recurrent_bias: ClassVar[bool] = True

    def pointwise(self, carry, input_preactivation, recurrent_preactivation):
        forget = sigmoid(input_preactivation[0] + recurrent_preactivation[0])
        candidate = tanh(input_preactivation[1] + forget * recurrent_preactivation[1])
        return (1 - forget) * carry + forget * candidate


def logistic(a):
    return 1 / (1 + np.exp(-a))


def gates(vector, kernel, bias):
    return [vector @ kernel[:, gate] + bias[gate] for gate in range(kernel.shape[1])]


def vanilla_equations(p, h, x):
    return np.tanh(x @ p.input_kernel[:, 0] + h @ p.recurrent_kernel[:, 0] + p.bias[0])


def leaky_equations(p, h, x):
    return 0.7 * h + 0.3 * np.maximum(x @ p.input_kernel[:, 0] + h @ p.recurrent_kernel[:, 0] + p.bias[0], 0)


def skip_equations(p, carry, x):
    last, _, oldest = carry
    new = 0.8 * last + 0.2 * np.tanh(x @ p.input_kernel[:, 0] + last @ p.recurrent_kernel[:, 0] + p.bias[0])
    return 0.6 * oldest + 0.4 * new, last, carry[1]


def lstm_equations(p, carry, x):
    h, c = carry
    i, f, g, o = np.add(gates(x, p.input_kernel, p.bias), gates(h, p.recurrent_kernel, np.zeros(4)))
    c = logistic(f) * c + logistic(i) * np.tanh(g)
    return logistic(o) * np.tanh(c), c


def gru_equations(p, h, x):
    u, r = gates(x, p.input_kernel, p.bias), gates(h, p.recurrent_kernel, p.recurrent_bias)
    reset, update = logistic(u[0] + r[0]), logistic(u[1] + r[1])
    return (1 - update) * np.tanh(u[2] + reset * r[2]) + update * h


def minimal_gated_equations(p, h, x):
    u, r = gates(x, p.input_kernel, p.bias), gates(h, p.recurrent_kernel, p.recurrent_bias)
    f = logistic(u[0] + r[0])
    return (1 - f) * h + f * np.tanh(u[1] + f * r[1])


CASES = {
    "vanilla": (rnnjax.VanillaCell(H), vanilla_equations),
    "leaky": (rnnjax.LeakyCell(H, activation="relu", leak=0.3), leaky_equations),
    "gru": (rnnjax.GRUCell(H), gru_equations),
    "skip": (rnnjax.SkipCell(H, span=3, skip=0.6, leak=0.2), skip_equations),
    "lstm": (rnnjax.LSTMCell(H), lstm_equations),
    "minimal gated": (MinimalGatedCell(H), minimal_gated_equations),
}
CELLS = {name: cell for name, (cell, _) in CASES.items()}


def random_arrays(cell, batch_shape=(), dtype=np.float32, seed=0):
    """Weights (biases too), a carry and inputs, all random, drawn by NumPy."""
    rng = np.random.default_rng(seed)
    random = lambda shape: jnp.asarray(rng.normal(size=shape) * 0.8, dtype)  # noqa: E731
    params = jax.tree.map(lambda leaf: random(leaf.shape), jax.eval_shape(lambda: cell.init(jax.random.key(0), D)))
    carry = jax.tree.map(lambda leaf: random(leaf.shape), cell.initialize_carry(batch_shape))
    return params, carry, random((*batch_shape, D))


def in_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("name", CASES)
def test_a_step_follows_the_equations(name, batch_shape, dtype):
    cell, equations = CASES[name]
    params, carry, inputs = random_arrays(cell, batch_shape, dtype)
    new_carry, output = cell.apply(params, carry, inputs)
    expected = equations(*map(in_float64, (params, carry, inputs)))
    assert jax.tree.structure(new_carry) == jax.tree.structure(carry)
    for actual, exact in zip(jax.tree.leaves(new_carry), jax.tree.leaves(expected), strict=True):
        assert actual.dtype == dtype
        assert actual.shape == (*batch_shape, H)
        np.testing.assert_allclose(actual, exact, atol=testing.rounding_tolerance(dtype, 40))
    np.testing.assert_array_equal(output, jax.tree.leaves(new_carry)[0])


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_weights_keep_everything_in_bfloat16(name):
    cell, equations = CASES[name]
    params, carry, inputs = random_arrays(cell, (2,), jnp.bfloat16)
    new_carry, output = cell.apply(params, carry, inputs)
    assert {leaf.dtype for leaf in (*jax.tree.leaves(new_carry), output)} == {jnp.dtype(jnp.bfloat16)}
    expected = equations(*map(in_float64, (params, carry, inputs)))
    np.testing.assert_allclose(np.asarray(output, np.float64), jax.tree.leaves(expected)[0], atol=0.05)


def flax_lstm_weights(params):
    dense = {}
    for gate, letter in enumerate("ifgo"):
        dense[f"i{letter}"] = {"kernel": params.input_kernel[:, gate]}
        dense[f"h{letter}"] = {"kernel": params.recurrent_kernel[:, gate], "bias": params.bias[gate]}
    return {"params": dense}


def flax_gru_weights(params):
    """Flax's GRU has a bias on the recurrent side of the candidate alone: the two of each gate act as their sum."""
    bias = params.bias.at[:2].add(params.recurrent_bias[:2])
    dense = {}
    for gate, letter in enumerate("rzn"):
        dense[f"i{letter}"] = {"kernel": params.input_kernel[:, gate], "bias": bias[gate]}
        dense[f"h{letter}"] = {"kernel": params.recurrent_kernel[:, gate]}
    dense["hn"]["bias"] = params.recurrent_bias[2]
    return {"params": dense}


@pytest.mark.parametrize(
    ("name", "module", "weights"),
    [
        ("lstm", nn.OptimizedLSTMCell(H), flax_lstm_weights),
        ("lstm", nn.LSTMCell(H), flax_lstm_weights),
        ("gru", nn.GRUCell(H), flax_gru_weights),
    ],
)
def test_sequences_equal_those_of_flax(name, module, weights):
    cell = CELLS[name]
    params, carry, _ = random_arrays(cell, (2,))
    inputs = jax.random.normal(jax.random.key(3), (5, 2, D))
    _, outputs = rnnjax.unroll(cell, params, inputs, carry)
    theirs = carry[::-1] if name == "lstm" else carry  # Flax carries (c, h)
    for step in range(5):
        theirs, expected = module.apply(weights(params), theirs, inputs[step])
        np.testing.assert_allclose(outputs[step], expected, atol=2e-6)


@pytest.mark.parametrize(("cell_type", "default"), [(rnnjax.LSTMCell, 1.0), (rnnjax.GRUCell, 0.0)])
def test_forget_bias_opens_the_gate_that_remembers(cell_type, default):
    assert cell_type(H).forget_bias == default
    params = cell_type(H, forget_bias=50.0).init(jax.random.key(0), D)
    np.testing.assert_array_equal(np.flatnonzero(params.bias.any(axis=1)), [1])
    np.testing.assert_array_equal(params.bias[1], 50.0)
    cell = cell_type(H)
    _, carry, inputs = random_arrays(cell)
    if cell_type is rnnjax.GRUCell:
        np.testing.assert_allclose(cell.apply(params, carry, inputs)[0], carry, atol=1e-6)
    else:  # With input gates shut as well, the memory is kept unchanged.
        shut = params.replace(bias=params.bias.at[0].set(-50.0))
        np.testing.assert_allclose(cell.apply(shut, carry, inputs)[0][1], carry[1], atol=1e-6)


@pytest.mark.parametrize("name", CELLS)
def test_initial_weights_have_the_contracts_shapes(name, dtype):
    cell = CELLS[name]
    params = cell.init(jax.random.key(0), D, dtype)
    assert params.input_kernel.shape == (D, cell.num_gates, H)
    assert params.recurrent_kernel.shape == (H, cell.num_gates, H)
    assert params.bias.shape == (cell.num_gates, H)
    assert (params.recurrent_bias is not None) == (name in ("gru", "minimal gated"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {dtype}
    for gate in range(cell.num_gates):
        kernel = np.asarray(params.recurrent_kernel[:, gate], np.float64)
        np.testing.assert_allclose(kernel @ kernel.T, np.eye(H), atol=testing.rounding_tolerance(dtype, 40))
    carry = cell.initialize_carry((2, 3), dtype)
    assert all(leaf.shape == (2, 3, H) and leaf.dtype == dtype and not leaf.any() for leaf in jax.tree.leaves(carry))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rnnjax.LSTMCell(0), "hidden_size must be a positive integer, got 0"),
        (lambda: rnnjax.GRUCell(2.0), "hidden_size must be a positive integer, got 2.0"),
        (lambda: rnnjax.VanillaCell(2, activation="step"), "activation must be one of"),
        (lambda: rnnjax.LeakyCell(2, leak=0.0), r"leak must be a number in \(0, 1\], got 0.0"),
        (lambda: rnnjax.SkipCell(2, span=1), "span must be an integer of at least 2, got 1"),
        (lambda: rnnjax.SkipCell(2, skip=1.5), r"skip must be a number in \[0, 1\], got 1.5"),
        (lambda: rnnjax.SkipCell(2, leak=0.0), r"leak must be a number in \(0, 1\], got 0.0"),
        (lambda: rnnjax.SkipCell(2, activation="tan"), "activation must be one of"),
        (lambda: rnnjax.LeakyCell(2, leak=np.nan), r"leak must be a number in \(0, 1\], got nan"),
        (lambda: CELLS["gru"].init(jax.random.key(0), 0), "input_size must be a positive integer, got 0"),
        (lambda: CELLS["gru"].init(jax.random.key(0), D, int), "dtype must be a floating-point dtype"),
        (lambda: CELLS["gru"].init(jax.random.key(0), D, "float31"), "dtype must be a floating-point dtype"),
        (lambda: CELLS["gru"].init(jax.random.key(0), D, "float64"), "dtype can be float64 only when"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", CELLS)
def test_cells_compare_by_value_and_do_not_retrace(name):
    cell = CELLS[name]
    twin = dataclasses.replace(cell)
    assert twin == cell
    assert hash(twin) == hash(cell)
    assert cell != dataclasses.replace(cell, hidden_size=H + 1)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(lambda cell, *rest: cell.apply(*rest), 1), static_argnums=0)
    arguments = random_arrays(cell)
    np.testing.assert_array_equal(step(cell, *arguments)[1], step(twin, *arguments)[1])


def test_a_leak_of_one_is_the_vanilla_cell():
    arguments = random_arrays(CELLS["vanilla"], (2,))
    expected = CELLS["vanilla"].apply(*arguments)[1]
    np.testing.assert_array_equal(rnnjax.LeakyCell(H, leak=1.0).apply(*arguments)[1], expected)


def test_a_users_cell_works_everywhere(dtype):
    cell = CELLS["minimal gated"]
    params, carry, _ = random_arrays(cell, (2,), dtype)
    inputs = jax.random.normal(jax.random.key(1), (6, 2, D), dtype)
    state = in_float64(carry)
    for step in range(6):
        state = minimal_gated_equations(in_float64(params), state, np.asarray(inputs[step], np.float64))
    final, _ = rnnjax.unroll(cell, params, inputs, carry)
    np.testing.assert_allclose(final, state, atol=testing.rounding_tolerance(dtype, 200))
    path = rnnjax.trajectory(cell, params, inputs, carry)
    jacobians = rnnjax.step_jacobians(cell, params, path)
    expected = rnnjax.autodiff_step_jacobians(cell, params, path)
    np.testing.assert_allclose(jacobians, expected, atol=testing.rounding_tolerance(dtype, 20))
    profile = rnnjax.spectral_profile(cell, params, inputs, carry, lags=[6])
    exact = testing.exact_log_singular_values(np.asarray(jacobians[:, 1]))
    np.testing.assert_allclose(profile.log_singular_values[0, 1], exact, atol=testing.rounding_tolerance(dtype, 500))


def with_own_memory(params, carry, inputs):
    """A step with a nested carry and an output of its own, written for one sequence."""
    hidden = jnp.tanh(params @ carry["memory"][0] + inputs)
    return {"hidden": hidden, "memory": [0.5 * carry["memory"][0] + hidden[:2]]}, hidden.sum()


@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3)])
def test_step_cells_take_any_carry_and_any_batch(batch_shape):
    example = {"hidden": jnp.zeros(D), "memory": [jnp.ones(2)]}
    cell = rnnjax.StepCell(with_own_memory, example)
    params = jax.random.normal(jax.random.key(0), (D, 2))
    inputs = jax.random.normal(jax.random.key(1), (4, *batch_shape, D))
    carry, outputs = rnnjax.unroll(cell, params, inputs)
    assert outputs.shape == (4, *batch_shape)
    for index in np.ndindex(*batch_shape):
        single = example
        for step in range(4):
            single, output = with_own_memory(params, single, inputs[(step, *index)])
            np.testing.assert_allclose(outputs[(step, *index)], output, atol=1e-6)
        np.testing.assert_allclose(carry["memory"][0][index], single["memory"][0], atol=1e-6)
