"""Clipping by step against a backward pass written out in NumPy; where a non-finite value arose."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rnnjax
from rnnjax.backpropagation import BackpropagationSettings, locate_non_finite, loss_and_gradient
from rnnjax.cotangents import clip_cotangent
from rnnjax.models import RecurrentNetwork
from rnnjax.tasks import AddingTask, Batch

T, B, D, H = 6, 2, 2, 3
TASK = AddingTask(sequence_length=T)
PLAIN = BackpropagationSettings()


def clipped(vector, bound):
    norm = np.linalg.norm(vector)
    return vector if norm <= bound else vector * (bound / norm)


@pytest.mark.parametrize("bound", [1e-3, 0.3, 1e6])
def test_clipping_by_step_is_that_of_a_loop(bound):
    """Vanilla network, loss Σ w · h: what step t + 1 hands back is cut to the bound before h_t's own part is added."""
    rng = np.random.default_rng(0)
    cell, weights = rnnjax.VanillaCell(H), rng.normal(size=(T, B, H))
    with jax.enable_x64(True):
        params = cell.init(jax.random.key(0), D, jnp.float64)
        params = params.replace(recurrent_kernel=3 * params.recurrent_kernel)
        inputs = jnp.asarray(rng.normal(size=(T, B, D)))

        def loss(params):
            return jnp.sum(rnnjax.unroll(cell, params, inputs, max_carry_gradient=bound)[1] * weights)

        found = jax.jit(jax.grad(loss))(params)
        states = np.asarray(rnnjax.trajectory(cell, params, inputs).carries)
        kernel = np.asarray(params.recurrent_kernel)[:, 0]
        found = np.asarray(found.recurrent_kernel)[:, 0]
    expected = np.zeros((H, H))
    for sequence in range(B):
        error = np.zeros(H)
        for t in reversed(range(T)):
            error = (error + weights[t, sequence]) * (1 - states[t + 1, sequence] ** 2)
            expected += np.outer(states[t, sequence], error)
            error = clipped(error @ kernel.T, bound)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("cell", [rnnjax.LSTMCell(H), rnnjax.SkipCell(H, span=2)], ids=["lstm", "skip"])
def test_a_bound_that_is_not_reached_changes_nothing(cell):
    params = cell.init(jax.random.key(0), D)
    inputs = jax.random.normal(jax.random.key(1), (T, B, D))
    options = {"lengths": np.array([6, 3]), "resets": np.zeros((T, B), bool), "truncation": 4}

    def gradient(bound):
        def loss(params):
            return jnp.sum(rnnjax.unroll(cell, params, inputs, max_carry_gradient=bound, **options)[1] ** 2)

        return jax.grad(loss)(params)

    for free, bounded, looser in zip(*map(jax.tree.leaves, map(gradient, (None, 1e9, 1e12))), strict=True):
        np.testing.assert_array_equal(bounded, looser)
        # Without a bound the derivative takes another route, which rounds otherwise.
        np.testing.assert_allclose(free, bounded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30, 3e38])
def test_every_sequence_is_bounded_on_its_own_at_any_size(size):
    tree = (jnp.zeros((2, 3)), jnp.zeros((2, 4)))
    first, second = jnp.array([[0.75, 0.0, 0.0], [0.0075, 0.0, 0.0]]), jnp.array([[1.0, 0.0, 0.0, 0.0]] * 2)
    cotangent = (first * size, second * size)
    bound = size if size < 1e30 else 2.0
    back = jax.vjp(lambda tree: clip_cotangent(tree, bound, 1), tree)[1](cotangent)[0]
    norms = np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2, axis=1) for leaf in back))
    np.testing.assert_allclose(norms, np.minimum(np.array([1.25, 1.00003]) * size, bound), rtol=1e-4)
    ratio = np.asarray(back[0][0], np.float64) / np.asarray(back[1][0], np.float64)[0]
    np.testing.assert_allclose(ratio, [0.75, 0, 0], rtol=1e-5)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_cotangent_that_is_no_number_passes_for_the_guard_to_see(value):
    back = jax.vjp(lambda x: clip_cotangent(x, 1.0, 1), jnp.zeros((2, 2)))[1](jnp.array([[value, 1.0], [3.0, 4.0]]))[0]
    np.testing.assert_array_equal(back[0], [value, 1.0])
    np.testing.assert_allclose(back[1], [0.6, 0.8], rtol=1e-6)


def test_integer_carries_pass():
    def step(weight, carry, inputs):
        hidden, count = carry
        hidden = jnp.tanh(weight * hidden + inputs)
        return (hidden, count + 1), hidden

    cell = rnnjax.StepCell(step, (jnp.zeros(2), jnp.zeros((), jnp.int32)))

    def loss(weight):
        return jnp.sum(rnnjax.unroll(cell, weight, jnp.ones((T, 2)), max_carry_gradient=1e9)[1])

    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(0.5)), jax.grad(loss)(jnp.float32(0.5)))


@pytest.mark.parametrize("bound", [0, -1.0, np.nan, np.inf])
def test_bad_bounds_are_named(bound):
    cell = rnnjax.VanillaCell(H)
    with pytest.raises(ValueError, match="max_carry_gradient must be a positive finite number, got"):
        rnnjax.unroll(cell, cell.init(jax.random.key(0), D), jnp.ones((T, D)), max_carry_gradient=bound)


def network(activation="tanh", num_layers=2):
    cell = rnnjax.VanillaCell(H, activation=activation)
    return nnx.split(RecurrentNetwork(cell, 1, num_layers=num_layers, input_size=2, rngs=nnx.Rngs(0)))


def batch_with(change=lambda inputs: inputs):
    batch = TASK.batch(0, 0, B)
    return Batch(change(batch.inputs), batch.targets)


def with_layer(graph, params, layer, **arrays):
    made = nnx.merge(graph, params)
    for name, change in arrays.items():
        weight = getattr(made.layers[layer], name)
        weight[...] = change(weight[...])
    return nnx.split(made)[1]


def test_clipping_by_step_reaches_the_network():
    graph, params = network()
    small = BackpropagationSettings(max_carry_gradient=1e-8)
    gradients = [loss_and_gradient(graph, TASK, kind, params, TASK.batch(0, 0, B))[1] for kind in (PLAIN, small)]
    (free, cut) = (nnx.merge(graph, gradient).layers[0].recurrent_kernel[...] for gradient in gradients)
    assert np.abs(free - cut).max() > 1e-3 * np.abs(free).max()


def test_finite_steps_are_said_to_be_finite():
    graph, params = network()
    assert locate_non_finite(graph, TASK, PLAIN, params, batch_with()) == {"non_finite_pass": "none"}


def test_bad_weights_and_inputs_are_told_apart():
    graph, params = network()
    spoilt = with_layer(graph, params, 1, bias=lambda b: b.at[0, 0].set(jnp.nan))
    assert locate_non_finite(graph, TASK, PLAIN, spoilt, batch_with()) == {"non_finite_pass": "weights"}
    graph, params = network()
    inputs = batch_with(lambda x: x.at[2, 0, 0].set(jnp.inf))
    assert locate_non_finite(graph, TASK, PLAIN, params, inputs) == {"non_finite_pass": "inputs"}


@pytest.mark.parametrize("layer", [0, 1])
def test_overflow_on_the_way_forward_is_located(layer):
    """h_t = g h_{t−1} + …, g = 10^15: from inputs of size 1 step 3, counted from 0, is the first beyond 10^38."""
    graph, params = network("identity")
    for index in (0, 1):
        params = with_layer(graph, params, index, recurrent_kernel=jnp.zeros_like)
    grow = {"recurrent_kernel": lambda u: 1e15 * jnp.eye(H)[:, None], "input_kernel": jnp.ones_like}
    params = with_layer(graph, params, layer, **grow)
    found = locate_non_finite(graph, TASK, PLAIN, params, batch_with(jnp.ones_like))
    assert found == {"non_finite_pass": "forward", "non_finite_layer": layer, "non_finite_step": 3}


def test_overflow_on_the_way_back_is_located():
    """States stay zero where inputs are; the gradient grows by 10^15 a step back and is infinite at step T − 4."""
    graph, params = network("identity", num_layers=1)
    params = with_layer(
        graph, params, 0, recurrent_kernel=lambda u: 1e15 * jnp.eye(H)[:, None], input_kernel=jnp.zeros_like
    )
    found = locate_non_finite(graph, TASK, PLAIN, params, batch_with(jnp.zeros_like))
    assert found == {"non_finite_pass": "backward", "non_finite_layer": 0, "non_finite_step": T - 4}


def test_a_loss_that_overflows_alone_is_told():
    graph, params = network("identity", num_layers=1)
    large = Batch(TASK.batch(0, 0, B).inputs, jnp.full((B, 1), 1e30))
    assert locate_non_finite(graph, TASK, PLAIN, params, large) == {"non_finite_pass": "loss"}


def test_settings_are_values():
    settings = BackpropagationSettings(truncation=3, penalty=rnnjax.GradientFlossing())
    assert settings == dataclasses.replace(settings) and hash(settings) == hash(dataclasses.replace(settings))
