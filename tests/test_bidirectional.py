"""Both directions in one scan against two scans, and arrays with the batch first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rnnjax
from rnnjax import batch_major, unroll, unroll_bidirectional
from rnnjax.configuration import RunConfig
from rnnjax.models import RecurrentNetwork, layer_views, zero_carry_perturbations
from rnnjax.train import fit

T, B, D, H = 6, 3, 2, 4
CELLS = {"vanilla": rnnjax.VanillaCell(H), "gru": rnnjax.GRUCell(H), "lstm": rnnjax.LSTMCell(H)}
LENGTHS = np.array([6, 0, 4])
RESETS = np.random.default_rng(4).random((T, B)) < 0.3
OPTIONS = [
    {},
    {"lengths": LENGTHS},
    {"resets": RESETS},
    {"lengths": LENGTHS, "resets": RESETS, "truncation": 2},
    {"checkpoint_every": 4, "truncation": 3},
    {"max_carry_gradient": 0.3},
]


def problem(name, dtype=np.float64):
    cell = CELLS[name]
    pair = tuple(cell.init(jax.random.key(seed), D, dtype) for seed in (0, 1))
    rng = np.random.default_rng(2)
    inputs = jnp.asarray(rng.normal(size=(T, B, D)), dtype)
    carries = tuple(
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, dtype), cell.initialize_carry((B,)))
        for _ in range(2)
    )
    return cell, pair, inputs, carries


def two_scans(cell, pair, inputs, carries, **options):
    forwards, backwards = (
        unroll(cell, params, inputs, carry, reverse=reverse, **options)
        for params, carry, reverse in zip(pair, carries, (False, True), strict=True)
    )
    return (forwards[0], backwards[0]), jnp.concatenate([forwards[1], backwards[1]], axis=-1)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", CELLS)
def test_one_scan_is_two(name, options):
    with jax.enable_x64():
        cell, pair, inputs, carries = problem(name)

        def loss(run, pair, inputs):
            last, outputs = run(cell, pair, inputs, carries, **options)
            weights = jnp.sin(jnp.arange(outputs.size, dtype=outputs.dtype)).reshape(outputs.shape)
            return jnp.sum(outputs * weights) + sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(last)), outputs

        ours, theirs = (
            jax.value_and_grad(functools.partial(loss, run), argnums=(0, 1), has_aux=True)(pair, inputs)
            for run in (unroll_bidirectional, two_scans)
        )
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_both_directions_share_one_scan():
    cell, pair, inputs, _ = problem("gru", np.float32)
    program = str(jax.make_jaxpr(lambda p: unroll_bidirectional(cell, p, inputs)[1])(pair))
    assert program.count("scan[") == str(jax.make_jaxpr(lambda p: unroll(cell, p, inputs)[1])(pair[0])).count("scan[")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": rnnjax.StepCell(lambda params, h, x: (h, h), jnp.zeros(2))}, "cell must be an affine cell"),
        ({"params": "one"}, "params must be a pair"),
        ({"carry": jnp.zeros((B, H))}, "carry must be a pair"),
        ({"inputs": jnp.full((T, B, D), jnp.nan)}, "inputs"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    cell, pair, inputs, _ = problem("gru", np.float32)
    arguments = {"cell": cell, "params": pair, "inputs": inputs, "carry": None} | change
    if arguments["params"] == "one":
        arguments["params"] = pair[0]
    with pytest.raises(ValueError, match=message):
        unroll_bidirectional(**arguments)
    with pytest.raises(ValueError, match="params"):
        unroll_bidirectional(cell, (pair[0], CELLS["lstm"].init(jax.random.key(0), D)), inputs)


@pytest.mark.parametrize("run", [unroll, unroll_bidirectional])
def test_batch_major(run):
    cell, pair, inputs, _ = problem("lstm", np.float32)
    params = pair if run is unroll_bidirectional else pair[0]
    carry, outputs = run(cell, params, inputs, lengths=LENGTHS, resets=RESETS)
    swapped = batch_major(run)(cell, params, jnp.swapaxes(inputs, 0, 1), lengths=LENGTHS, resets=RESETS.T.tolist())
    for a, b in zip(jax.tree.leaves(swapped), jax.tree.leaves((carry, jnp.swapaxes(outputs, 0, 1))), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="inputs must have a batch axis"):
        batch_major(run)(cell, params, inputs[0])


def network(**options):
    return RecurrentNetwork(CELLS["gru"], 5, input_size=D, bidirectional=True, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("readout", ["last", "every"])
@pytest.mark.parametrize("skip", [False, True])
def test_network_of_two_layers(readout, skip, lengths):
    _, _, inputs, _ = problem("gru", np.float32)
    made = network(num_layers=2, readout=readout, skip_connections=skip)
    outputs, carries = made.unroll(inputs, lengths=lengths)
    features, last = inputs, []
    for level in range(2):
        backwards, forwards = made.layers[2 * level], made.layers[2 * level + 1]
        before, after = (
            unroll(layer.cell, layer.params(), features, reverse=reverse, lengths=lengths)
            for layer, reverse in ((backwards, True), (forwards, False))
        )
        both = jnp.concatenate([after[1], before[1]], axis=-1)
        features = both + features if skip and level else both
        last += [before[0], after[0]]
    if readout == "last":
        ends = LENGTHS - 1 if lengths is not None else np.full(B, T - 1)
        there = np.stack([np.where(end >= 0, features[end, b, :H], 0) for b, end in enumerate(ends)])
        features = jnp.concatenate([there, features[0, :, H:]], axis=-1)
    np.testing.assert_allclose(outputs, made.output(features), rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(carries), jax.tree.leaves(last), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_views_and_hidden_gradients_are_in_the_order_of_processing():
    _, _, inputs, _ = problem("gru", np.float32)
    made = network(num_layers=2, readout="every")
    graph, params = nnx.split(made)
    views = layer_views(graph, params, inputs)
    assert len(views) == len(made.layers) == 4
    np.testing.assert_array_equal(views[0].inputs, inputs[::-1])
    zeros = zero_carry_perturbations(made, inputs)
    hidden = jax.grad(lambda p: jnp.sum(made(inputs, perturbations=p)[3] ** 2))(zeros)
    # The loss is at input step 3 alone: forwards nothing comes from later steps, backwards nothing from earlier ones.
    assert not np.any(hidden[3][4:]) and np.all(np.any(hidden[3][:4], axis=(1, 2)))
    assert not np.any(hidden[2][3:]) and np.all(np.any(hidden[2][:3], axis=(1, 2)))


def test_reverse_of_both_directions_is_refused():
    with pytest.raises(ValueError, match="reverse must be False"):
        network()(jnp.ones((T, B, D)), reverse=True)


@pytest.mark.slow
def test_training_and_monitoring():
    config = RunConfig(
        task="adding",
        length=8,
        cell="gru",
        hidden_size=4,
        num_layers=2,
        bidirectional=True,
        checkpoint_every=3,
        compute_dtype="bfloat16",
        penalty="flossing",
        steps=3,
        batch_size=4,
        monitor_every=2,
        evaluate_every=3,
    )
    task, monitor = config.make_task(), config.make_monitor()
    with jax.numpy_dtype_promotion("standard"):  # as Optax needs it
        result = fit(config.make_network(task), task, config.make_optimizer(), config.fit_settings(), monitor=monitor)
    assert int(result.state.step) == 3 and np.isfinite(result.evaluations[-1]["loss"])
    assert result.readings[0].log_spectral_norms.shape[0] == 4


def test_both_directions_cannot_be_reversed():
    cell = rnnjax.GRUCell(2)
    params = (cell.init(jax.random.key(0), 1),) * 2
    with pytest.raises(ValueError, match="reverse must be left out, both directions are run, got True"):
        unroll_bidirectional(cell, params, jnp.ones((3, 1)), reverse=True)
