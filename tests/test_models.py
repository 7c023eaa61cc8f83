"""Networks against their own definition: a lookup, loops over time, a matrix product."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rnnjax
from rnnjax import testing
from rnnjax.models import RecurrentLayer, RecurrentNetwork, layer_views, zero_perturbations

T, B, D, H, NUM_OUTPUTS = 5, 3, 2, 4, 6
LENGTHS = np.array([5, 2, 0])
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 7, size=(T, B)), jnp.int32)


def features(dtype=np.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=(T, B, D)), dtype)


def network(cell=None, *, input_size=D, seed=0, **options):
    """A network whose biases are random too."""
    if "vocabulary_size" in options:
        input_size = None
    made = RecurrentNetwork(
        cell or rnnjax.VanillaCell(H), NUM_OUTPUTS, input_size=input_size, rngs=nnx.Rngs(seed), **options
    )
    rng = np.random.default_rng(seed)
    for bias in (*(layer.bias for layer in made.layers), made.output.bias):
        bias[...] = jnp.asarray(rng.normal(size=bias.shape), bias.dtype)
    return made


def wide(array):
    return np.asarray(array, np.float64)


def tanh_loop(layer, inputs):
    hidden, outputs = np.zeros((inputs.shape[1], H)), []
    for x in inputs:
        drive = x @ wide(layer.input_kernel[...])[:, 0] + wide(layer.bias[...])[0]
        hidden = np.tanh(drive + hidden @ wide(layer.recurrent_kernel[...])[:, 0])
        outputs.append(hidden)
    return np.stack(outputs)


def by_hand(made, inputs):
    """Inputs of every layer, and the readout of every step, of a network of tanh layers."""
    current, entered = wide(inputs), []
    for index, layer in enumerate(made.layers):
        entered.append(current)
        outputs = tanh_loop(layer, current)
        current = outputs + current if made.skip_connections and index else outputs
    return entered, current @ wide(made.output.kernel[...]) + wide(made.output.bias[...])


@pytest.mark.parametrize("readout", ["last", "every"])
@pytest.mark.parametrize(("num_layers", "skip"), [(1, True), (3, False), (3, True)])
def test_stacked_layers_and_readout(num_layers, skip, readout):
    made = network(num_layers=num_layers, skip_connections=skip, readout=readout)
    expected = by_hand(made, features())[1]
    result = made(features())
    assert (
        result.shape == ((T, B, NUM_OUTPUTS) if readout == "every" else (B, NUM_OUTPUTS))
        and result.dtype == jnp.float32
    )
    np.testing.assert_allclose(result, expected if readout == "every" else expected[-1], atol=1e-5)


def test_skip_connections_are_felt_from_the_second_layer_on():
    one, other = network(num_layers=2, skip_connections=True), network(num_layers=2)
    assert np.abs(by_hand(one, features())[1] - by_hand(other, features())[1]).max() > 0.1
    alone = network(skip_connections=True)
    np.testing.assert_array_equal(alone(features()), network()(features()))


@pytest.mark.parametrize("embedding_size", [None, 3])
def test_tokens_are_looked_up(embedding_size):
    made = network(rnnjax.LSTMCell(H), vocabulary_size=7, embedding_size=embedding_size, readout="every")
    table = made.embedding.embedding[...]
    assert table.shape == (7, embedding_size or H)
    _, hidden = rnnjax.unroll(made.layers[0].cell, made.layers[0].params(), table[TOKENS])
    expected = wide(hidden) @ wide(made.output.kernel[...]) + wide(made.output.bias[...])
    np.testing.assert_allclose(made(TOKENS), expected, atol=1e-5)


def test_last_readout_is_that_of_each_sequence_cut_to_its_length():
    made = network(num_layers=2)
    result = made(features(), lengths=jnp.asarray(LENGTHS))
    for b, length in enumerate(LENGTHS):
        alone = by_hand(made, features()[:length, b : b + 1])[1] if length else wide(made.output.bias[...])[None, None]
        np.testing.assert_allclose(result[b], alone[-1, 0], atol=1e-5)


def test_resets_cut_the_sequence_in_every_layer():
    made = network(num_layers=2)
    resets = jnp.zeros((T, B), bool).at[2].set(True)
    np.testing.assert_allclose(made(features(), resets=resets), by_hand(made, features()[2:])[1][-1], atol=1e-5)


def test_truncation_stops_gradients_alone():
    made = network()
    np.testing.assert_array_equal(made(features(), truncation=3), made(features()))
    gradient = jax.grad(lambda inputs: made(inputs, truncation=3).sum())(features())
    assert not gradient[:3].any() and all(gradient[t].any() for t in (3, 4))


@dataclasses.dataclass(frozen=True)
class LiveCell(rnnjax.VanillaCell):
    """A cell that starts from a carry that is not zero."""

    def initialize_carry(self, batch_shape=(), dtype=jnp.float32):
        return jnp.full((*batch_shape, self.hidden_size), 0.4, dtype)


@dataclasses.dataclass(frozen=True)
class BiasedCell(rnnjax.AffineCell):
    """A field of the name that the LSTM's initial bias has, used in each step."""

    num_gates = 1
    forget_bias: float = 1.0

    def pointwise(self, carry, input_preactivation, recurrent_preactivation):
        return jnp.tanh(input_preactivation[0] + recurrent_preactivation[0] + self.forget_bias)


def test_a_layer_steps_as_its_cell_does():
    cell = BiasedCell(H, forget_bias=2.0)
    layer = RecurrentLayer(cell, D, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(features())[1], rnnjax.unroll(cell, layer.params(), features())[1])


@pytest.mark.parametrize("cell", [rnnjax.VanillaCell(H), LiveCell(H)])
def test_perturbations_are_added_to_hidden_states(cell):
    made = network(cell, num_layers=2)
    zeros = zero_perturbations(made, features())
    assert [(zero.shape, zero.dtype) for zero in zeros] == [((T, B, H), jnp.float32)] * 2
    np.testing.assert_array_equal(made(features(), perturbations=zeros), made(features()))
    shift = np.random.default_rng(5).normal(size=(B, H)).astype(np.float32)
    moved = made(features(), perturbations=[zeros[0], zeros[1].at[-1].set(shift)]) - made(features())
    np.testing.assert_allclose(moved, shift @ wide(made.output.kernel[...]), atol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
def test_layer_views_hold_what_each_layer_gets(skip):
    made = network(num_layers=3, skip_connections=skip)
    entered, _ = by_hand(made, features())
    for views in (made.layer_views(features()), layer_views(*nnx.split(made), features())):
        assert len(views) == 3
        for view, layer, expected in zip(views, made.layers, entered, strict=True):
            np.testing.assert_allclose(view.inputs, expected, atol=1e-5)
            np.testing.assert_array_equal(view.params.recurrent_kernel, layer.recurrent_kernel[...])
            assert view.cell == rnnjax.VanillaCell(H)


def test_layer_views_of_tokens_start_at_the_embedding():
    made = network(vocabulary_size=7)
    np.testing.assert_array_equal(made.layer_views(TOKENS)[0].inputs, wide(made.embedding.embedding[...])[TOKENS])


def test_network_survives_being_split_and_merged():
    made = network(rnnjax.GRUCell(H), num_layers=2, vocabulary_size=7)
    graph, params = nnx.split(made)
    assert graph == nnx.split(network(rnnjax.GRUCell(H), num_layers=2, vocabulary_size=7, seed=1))[0]
    assert hash(graph) == hash(nnx.graphdef(made))
    np.testing.assert_array_equal(nnx.merge(graph, params)(TOKENS), made(TOKENS))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    assert not np.allclose(nnx.merge(graph, doubled)(TOKENS), made(TOKENS))
    per_layer = 3 * (H * H + H * H + 2 * H)  # reset, update and candidate, each with two biases
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(made, nnx.Param)))
    assert count == 7 * H + 2 * per_layer + H * NUM_OUTPUTS + NUM_OUTPUTS


def test_weights_follow_the_seed_and_the_cells_initialiser():
    cell = rnnjax.VanillaCell(H, recurrent_initializer=rnnjax.initializers.Identity(0.3))
    one, same, other = (network(cell, num_layers=2, seed=seed) for seed in (0, 0, 1))
    kernels = [[layer.input_kernel[...] for layer in made.layers] for made in (one, same, other)]
    np.testing.assert_array_equal(kernels[0][1], kernels[1][1])
    assert not np.allclose(kernels[0][1], kernels[2][1])
    assert kernels[0][0].shape == (D, 1, H) and kernels[0][1].shape == (H, 1, H)
    for layer in one.layers:
        np.testing.assert_allclose(layer.recurrent_kernel[:, 0], 0.3 * np.eye(H))


def test_both_precisions(dtype):
    made = network(dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(made))} == {dtype}
    result = made(features(dtype))
    assert result.dtype == dtype
    limit = testing.rounding_tolerance(dtype, 100)
    np.testing.assert_allclose(result, by_hand(made, features(dtype))[1][-1], atol=limit)


def test_bfloat16():
    made = network(vocabulary_size=7, dtype=jnp.bfloat16, readout="every")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(made))} == {jnp.dtype(jnp.bfloat16)}
    result = made(TOKENS)
    assert result.dtype == jnp.bfloat16
    expected = by_hand(made, wide(made.embedding.embedding[...])[TOKENS])[1]
    np.testing.assert_allclose(result.astype(jnp.float32), expected, atol=0.1)


def test_layer_alone_takes_a_carry():
    layer = RecurrentLayer(rnnjax.LSTMCell(H), D, rngs=nnx.Rngs(0))
    carry, outputs = layer(features()[:3])
    carry, rest = layer(features()[3:], carry)
    whole_carry, whole = layer(features())
    np.testing.assert_allclose(jnp.concatenate([outputs, rest]), whole, atol=1e-6)
    np.testing.assert_allclose(carry[1], whole_carry[1], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "^one of input_size and vocabulary_size must be given, got None and None"),
        ({"input_size": 2, "vocabulary_size": 7}, "^one of input_size and vocabulary_size must be given, got 2 and 7"),
        ({"input_size": 0}, "^input_size must be a positive integer, got 0"),
        ({"vocabulary_size": 0}, "^vocabulary_size must be a positive integer, got 0"),
        ({"vocabulary_size": 7, "embedding_size": 0}, "^embedding_size must be a positive integer, got 0"),
        ({"vocabulary_size": 7, "embedding_size": 2.5}, "^embedding_size must be a positive integer, got 2.5"),
        ({"input_size": 2, "num_layers": 0}, "^num_layers must be a positive integer, got 0"),
        ({"input_size": 2, "output_size": -1}, "^output_size must be a positive integer, got -1"),
        ({"input_size": 2, "readout": "lats"}, "^readout must be one of every, last, got 'lats'; did you mean 'last'"),
        ({"input_size": 2, "dtype": jnp.int32}, "^dtype must be a floating-point dtype"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        RecurrentNetwork(rnnjax.VanillaCell(H), **({"output_size": NUM_OUTPUTS} | options), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (jnp.ones((T, B, D + 1)), r"^inputs must be time-major with shape \[T, ..., 2\]"),
        (jnp.ones((T, D), jnp.int32), "^inputs must be floating point"),
        (jnp.ones((0, B, D)), "^inputs must have at least one time step"),
        (jnp.full((T, B, D), jnp.nan), "^inputs must be finite"),
    ],
)
def test_unfit_inputs(inputs, message):
    with pytest.raises(ValueError, match=message):
        network()(inputs)


@pytest.mark.parametrize("inputs", [TOKENS.at[1, 2].set(7), TOKENS.at[1, 2].set(-1), jnp.ones((T, B)), TOKENS[:0]])
def test_unfit_tokens(inputs):
    with pytest.raises(ValueError, match=r"^inputs must be (tokens|whole-number tokens)"):
        network(vocabulary_size=7)(inputs)


@pytest.mark.parametrize("count", [1, 3])
def test_wrong_number_of_perturbations(count):
    with pytest.raises(ValueError, match=f"^perturbations must be one array for each of the 2 layers, got {count}"):
        network(num_layers=2)(features(), perturbations=[jnp.zeros((T, B, H))] * count)


def test_carries_continue_a_stream_and_pass_no_gradient():
    """Two windows of a stream give the states of the whole, and the gradient of truncated backpropagation."""
    made = network(rnnjax.LSTMCell(H), num_layers=2, readout="every")
    inputs, window = jnp.concatenate([features(), features() ** 2])[:6], 3
    first, carries = made.unroll(inputs[:window])
    second, _ = made.unroll(inputs[window:], carries)
    np.testing.assert_allclose(jnp.concatenate([first, second]), made(inputs), atol=1e-6)
    graph, params = nnx.split(made)

    def by_windows(params):
        layers = nnx.merge(graph, params)
        first, carries = layers.unroll(inputs[:window])
        return first.sum() + layers.unroll(inputs[window:], carries)[0].sum()

    def truncated(params):
        return nnx.merge(graph, params)(inputs, truncation=window).sum()

    ours, expected = jax.grad(by_windows)(params), jax.grad(truncated)(params)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    with pytest.raises(ValueError, match="carries must be one for each of the 2 layers, got 1"):
        made.unroll(inputs, carries[:1])
