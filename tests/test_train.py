"""Training against a plain loop, finite differences and Optax alone; the loop against its own contract."""

import dataclasses
import functools
import itertools
import json
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rnnjax
from rnnjax.backpropagation import BackpropagationSettings
from rnnjax.metrics import MetricsWriter, read_metrics
from rnnjax.models import RecurrentNetwork
from rnnjax.monitor import Monitor
from rnnjax.tasks import AddingTask
from rnnjax.train import FitSettings, Timing, create_state, fit, monitored_train_step, train_step

T, B, H = 8, 3, 4
SETTINGS = FitSettings(steps=8, batch_size=B, evaluate_every=3, seed=7)
MONITOR = Monitor(every=3, num_sequences=2, num_exponents=2)
MAX_NORM = 0.5
TRAINING_KEYS = {
    *(
        "step",
        "seconds",
        "loss",
        "accuracy",
        "gradient_norm",
        "gradient_norm_clipped",
        "clipped",
        "skipped",
        "nonfinite_steps",
    )
}
HELD_OUT_KEYS = {"held_out_loss", "held_out_accuracy"}
MONITOR_KEYS = {
    *(
        "regime",
        "regime_confidence",
        "exponent",
        "exponent_standard_error",
        "log_spectral_norm",
        "finite_time_exponents",
        "saturated_share",
    ),
    *("hidden_gradient_norm_first", "hidden_gradient_norm_last", "kernel_spectral_norm", "kernel_spectral_radius"),
}


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam needs implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


BROKEN_SEED = 13


@dataclasses.dataclass(frozen=True)
class CountingTask(AddingTask):
    """The adding problem, counting how often its loss is traced; one seed has infinite targets at step 2."""

    traces: ClassVar[list[int]] = []

    def batch(self, seed, step, batch_size):
        batch = super().batch(seed, step, batch_size)
        return batch.replace(targets=batch.targets + jnp.inf) if (seed, step) == (BROKEN_SEED, 2) else batch

    def loss(self, outputs, batch):
        self.traces.append(1)
        return super().loss(outputs, batch)


TASK = CountingTask(sequence_length=T)
OPTIMIZER = rnnjax.clipped(optax.adam(0.05), max_norm=MAX_NORM)


def make_network(num_layers=1, cell=None, **options):
    return RecurrentNetwork(
        cell or rnnjax.VanillaCell(H), 1, input_size=2, num_layers=num_layers, rngs=nnx.Rngs(0), **options
    )


@dataclasses.dataclass
class Run:
    """A run of ``fit``, what its callback saw and the metrics file it left."""

    network: RecurrentNetwork
    result: object
    calls: list
    lines: list
    traces: int


@pytest.fixture(scope="module", autouse=True)
def run(tmp_path_factory):
    """The first to compile anything, so that it counts every trace; other tests use what it compiled."""
    directory = tmp_path_factory.mktemp("run")
    calls, network = [], make_network()
    CountingTask.traces.clear()
    with jax.numpy_dtype_promotion("standard"), MetricsWriter(directory) as metrics:
        result = fit(
            network, TASK, OPTIMIZER, SETTINGS, monitor=MONITOR, metrics=metrics, on_step=lambda *row: calls.append(row)
        )
    lines = (directory / "metrics.jsonl").read_text("utf-8").splitlines()
    return Run(network, result, calls, lines, len(CountingTask.traces))


def plain_weights(graph, params):
    """The weights of a network of one tanh layer as a dictionary of matrices and rows."""
    network = nnx.merge(graph, params)
    layer = network.layers[0]
    return {
        "input": layer.input_kernel[:, 0],
        "recurrent": layer.recurrent_kernel[:, 0],
        "bias": layer.bias[...],
        "output": network.output.kernel[...],
        "output_bias": network.output.bias[...][None],
    }


def plain_loss(weights, batch, truncation=None):
    hidden = jnp.zeros((batch.inputs.shape[1], H))
    for t, x in enumerate(batch.inputs):
        if truncation and t % truncation == 0:
            hidden = jax.lax.stop_gradient(hidden)
        hidden = jnp.tanh(x @ weights["input"] + hidden @ weights["recurrent"] + weights["bias"])
    return jnp.mean((hidden @ weights["output"] + weights["output_bias"] - batch.targets) ** 2)


PLAIN_OPTIMIZER = optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adam(0.05))


@functools.partial(jax.jit, static_argnames="truncation")
def plain_step(weights, state, batch, truncation=None):
    """Weights and optimiser state after a step, its loss and the norm of its gradient."""
    loss, gradient = jax.value_and_grad(plain_loss)(weights, batch, truncation)
    updates, state = PLAIN_OPTIMIZER.update(gradient, state, weights)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in gradient.values()))
    return optax.apply_updates(weights, updates), state, loss, norm


def assert_trees_close(actual, expected, **limits):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **limits), actual, expected)


@pytest.mark.parametrize("truncation", [None, 3])
def test_steps_are_those_of_optax_on_plain_functions(truncation):
    graph, _ = nnx.split(make_network())
    state = create_state(make_network(), OPTIMIZER)
    weights = plain_weights(graph, state.params)
    plain_state = PLAIN_OPTIMIZER.init(weights)
    for step in range(3):
        batch = TASK.batch(0, step, B)
        state, metrics = train_step(graph, TASK, OPTIMIZER, BackpropagationSettings(truncation), state, batch)
        weights, plain_state, loss, norm = plain_step(weights, plain_state, batch, truncation)
        assert int(state.step) == step + 1
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
        np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-4)
        np.testing.assert_allclose(metrics["gradient_norm_clipped"], min(norm, MAX_NORM), rtol=1e-4)
        assert bool(metrics["clipped"]) == (norm > MAX_NORM) and int(metrics["nonfinite_steps"]) == 0
    assert_trees_close(plain_weights(graph, state.params), weights, rtol=1e-4, atol=1e-5)


def stack_weights(network):
    """W, U and b of every tanh layer, and those of the readout, in NumPy."""
    layers = [(layer.input_kernel[:, 0], layer.recurrent_kernel[:, 0], layer.bias[...]) for layer in network.layers]
    return jax.tree.map(np.asarray, (layers, network.output.kernel[...], network.output.bias[...]))


def stack_loss(weights, batch, shift=None):
    """Loss of a stack of tanh layers in NumPy, with ``shift`` = (layer, t, sequence, unit, size) added to a state."""
    layers, kernel, offset = weights
    current = batch.inputs
    for index, (from_input, recurrent, bias) in enumerate(layers):
        hidden, outputs = np.zeros((current.shape[1], H)), []
        for t, x in enumerate(current):
            hidden = np.tanh(x @ from_input + hidden @ recurrent + bias)
            if shift is not None and shift[:2] == (index, t):
                hidden[shift[2:4]] += shift[4]
            outputs.append(hidden)
        current = np.stack(outputs)
    return np.mean((hidden @ kernel + offset - batch.targets) ** 2)


def test_monitored_step_changes_nothing(run):
    graph, _ = nnx.split(run.network)
    arguments = (graph, TASK, OPTIMIZER, BackpropagationSettings(), run.result.state, TASK.batch(0, 0, B))
    (state, metrics), (monitored_state, monitored_metrics, _) = train_step(*arguments), monitored_train_step(*arguments)
    assert_trees_close(monitored_state, state, rtol=1e-5, atol=1e-7)
    assert_trees_close(monitored_metrics, metrics, rtol=1e-5)


def test_hidden_gradients_are_finite_differences():
    with jax.enable_x64(True):
        network = make_network(num_layers=2, dtype=jnp.float64)
        graph, _ = nnx.split(network)
        state, batch = create_state(network, OPTIMIZER), TASK.batch(0, 0, B)
        _, metrics, norms = monitored_train_step(graph, TASK, OPTIMIZER, BackpropagationSettings(), state, batch)
        weights, batch = stack_weights(network), jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), batch)
    np.testing.assert_allclose(metrics["loss"], stack_loss(weights, batch), rtol=1e-6)
    assert norms.shape == (2, T)
    for layer, t in itertools.product(range(2), range(T)):
        shifted = [
            [stack_loss(weights, batch, (layer, t, b, j, size)) for size in (1e-5, -1e-5)]
            for b, j in itertools.product(range(B), range(H))
        ]
        gradient = -np.diff(shifted, axis=-1) / 2e-5
        np.testing.assert_allclose(norms[layer, t], np.linalg.norm(gradient), rtol=1e-6)


def test_hidden_gradients_end_at_the_last_window():
    network = make_network()
    graph, _ = nnx.split(network)
    state = create_state(network, OPTIMIZER)
    _, _, norms = monitored_train_step(graph, TASK, OPTIMIZER, BackpropagationSettings(3), state, TASK.batch(0, 0, B))
    assert not norms[0, :6].any() and np.all(norms[0, 6:] > 0)


def test_hidden_gradients_survive_where_their_squares_underflow(run):
    # At h = 0 a tanh unit is linear, and U = 1e-4 I leaves 1e-28 of the gradient after seven steps.
    network = make_network()
    network.layers[0].input_kernel[...] = jnp.zeros((2, 1, H))
    network.layers[0].recurrent_kernel[...] = 1e-4 * jnp.eye(H)[:, None]
    graph, _ = nnx.split(network)
    state = create_state(network, OPTIMIZER)
    _, _, norms = monitored_train_step(graph, TASK, OPTIMIZER, BackpropagationSettings(), state, TASK.batch(0, 0, B))
    np.testing.assert_allclose(np.diff(np.log(norms[0])), np.full(T - 1, math.log(1e4)), rtol=1e-4)


def test_everything_happens_when_it_is_due(run):
    result = run.result
    assert int(result.state.step) == 8 and not result.interrupted
    assert result.reading_steps == [0, 3, 6, 7] and len(result.readings) == 4
    assert result.evaluation_steps == [3, 6, 8] and len(result.evaluations) == 3
    assert len(result.timing.monitored) == 4 and len(result.timing.plain) == 4
    assert [step for step, _ in run.calls] == list(range(8))


def test_every_line_of_metrics_holds_the_documented_keys(run):
    rows = [json.loads(line) for line in run.lines]
    assert [row["step"] for row in rows] == list(range(8))
    for row in rows:
        expected = TRAINING_KEYS | (MONITOR_KEYS if row["step"] in (0, 3, 6, 7) else set())
        assert set(row) == expected | (HELD_OUT_KEYS if row["step"] + 1 in (3, 6, 8) else set())
        assert row["seconds"] >= 0 and row["gradient_norm_clipped"] <= MAX_NORM * 1.0001
        assert isinstance(row["clipped"], bool) and row["nonfinite_steps"] == 0
    for (_, seen), row in zip(run.calls, rows, strict=True):
        assert seen["loss"] == row["loss"]


def test_readings_are_those_of_the_step_they_name(run):
    # Step 0 is measured at the initial weights: orthogonal, so of spectral norm 1.
    first, last = run.result.readings[0], run.result.readings[-1]
    np.testing.assert_allclose(first.kernel_spectral_norms, [[1]], rtol=1e-5)
    assert abs(last.kernel_spectral_norms[0, 0] - 1) > 0.01
    assert first.log_spectral_norms.shape == (1, T, 2) and first.hidden_gradient_norms.shape == (1, T)


def test_each_step_is_compiled_once(run):
    assert run.traces == 3  # the plain step, the monitored step, the evaluation


def test_training_repeats_a_plain_loop_and_leaves_the_network_alone(run):
    graph, _ = nnx.split(make_network())
    weights = plain_weights(graph, create_state(make_network(), OPTIMIZER).params)
    assert_trees_close(plain_weights(*nnx.split(run.network)), weights, rtol=0)
    state, losses = PLAIN_OPTIMIZER.init(weights), []
    for step in range(8):
        weights, state, loss, _ = plain_step(weights, state, TASK.batch(SETTINGS.seed, step, B))
        losses.append(loss)
    np.testing.assert_allclose([row["loss"] for _, row in run.calls], losses, rtol=1e-3)
    assert_trees_close(plain_weights(graph, run.result.state.params), weights, rtol=1e-3, atol=1e-4)


def test_evaluation_is_on_held_out_data(run):
    graph, _ = nnx.split(run.network)
    held_out = TASK.evaluation_batch(SETTINGS.seed)
    loss = plain_loss(plain_weights(graph, run.result.state.params), held_out)
    np.testing.assert_allclose(run.result.evaluations[-1]["loss"], loss, rtol=1e-4)
    assert run.calls[-1][1]["held_out_loss"] == run.result.evaluations[-1]["loss"]
    trained_on = np.concatenate([TASK.batch(SETTINGS.seed, step, B).targets for step in range(8)])
    assert not np.isin(np.asarray(held_out.targets), trained_on).any()


def fitted(settings=SETTINGS, task=TASK, **options):
    return fit(make_network(), task, OPTIMIZER, settings, **options)


def test_a_seed_repeats_its_run_and_another_does_not(run):
    again = fitted(monitor=MONITOR)
    assert_trees_close(again.state, run.result.state, rtol=0)
    assert again.evaluations == run.result.evaluations
    other = fitted(dataclasses.replace(SETTINGS, seed=8), monitor=MONITOR)
    assert other.evaluations != run.result.evaluations


def test_interrupted_run_keeps_everything_so_far(tmp_path, run):
    def stop(step, _):
        if step == 4:
            raise KeyboardInterrupt

    with MetricsWriter(tmp_path) as metrics:
        result = fitted(monitor=MONITOR, metrics=metrics, on_step=stop)
    assert result.interrupted and int(result.state.step) == 5
    assert result.reading_steps == [0, 3] and len(result.readings) == 2 and result.evaluation_steps == [3]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [row["loss"] for _, row in run.calls[:5]]
    # Five steps, of which none is the last, are where an uninterrupted run of five ends.
    shorter = fitted(dataclasses.replace(SETTINGS, steps=5), monitor=MONITOR)
    assert_trees_close(result.state.params, shorter.state.params, rtol=1e-5)


def test_other_errors_are_not_swallowed():
    def fail(*_):
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fitted(on_step=fail)


def test_non_finite_gradients_are_skipped_and_counted(tmp_path):
    settings = dataclasses.replace(SETTINGS, seed=BROKEN_SEED)
    before, after = (fitted(dataclasses.replace(settings, steps=steps)).state for steps in (2, 3))
    assert_trees_close(after.params, before.params, rtol=0)
    with MetricsWriter(tmp_path) as metrics:
        state = fitted(dataclasses.replace(settings, steps=4), metrics=metrics).state
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["nonfinite_steps"] for row in rows] == [0, 0, 1, 1]
    assert [math.isinf(row["loss"]) for row in rows] == [False, False, True, False]
    assert not rows[2]["clipped"] and rows[2]["gradient_norm_clipped"] == 0
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, after.params)
    assert max(jax.tree.leaves(moved)) > 1e-3 and int(state.step) == 4


def test_training_beats_an_answer_without_memory():
    settings = FitSettings(steps=80, batch_size=32, evaluate_every=80)
    result = fit(make_network(cell=rnnjax.GRUCell(8)), TASK, OPTIMIZER, settings)
    assert result.evaluations[-1]["loss"] < TASK.baseline_loss / 5


def test_monitor_overhead_is_the_time_added_over_the_time_without():
    # A step costs 1 s, a monitored one 5 s: three of them add 12 s to the 7 s that seven steps cost.
    timing = Timing(plain=[9.0, 1.0, 1.0, 3.0], monitored=[20.0, 4.0, 6.0])
    assert timing.monitor_overhead() == pytest.approx(12 / 7)
    assert timing.compile_seconds() == pytest.approx((9 - 1) + (20 - 5))


@pytest.mark.parametrize(("plain", "monitored"), [([], []), ([1.0], [2.0, 2.0]), ([1.0, 1.0], [2.0])])
def test_overhead_is_unknown_with_too_few_steps(plain, monitored):
    assert math.isnan(Timing(plain, monitored).monitor_overhead())


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("steps", 0, "a positive integer"),
        ("batch_size", -1, "a positive integer"),
        ("evaluate_every", 0, "a positive integer"),
        ("seed", -1, "a non-negative integer"),
    ],
)
def test_impossible_settings(name, value, allowed):
    with pytest.raises(ValueError, match=f"^{name} must be {allowed}, got {value}"):
        FitSettings(**({"steps": 1} | {name: value}))


@pytest.mark.parametrize(("name", "allowed"), [("truncation", "a positive int"), ("max_carry_gradient", "a positive")])
def test_impossible_ways_to_take_the_gradient(name, allowed):
    with pytest.raises(ValueError, match=f"^{name} must be {allowed}.*, got 0"):
        BackpropagationSettings(**{name: 0})


def test_a_skipped_step_says_where_its_first_non_finite_value_arose():
    """Linear units of gain 10^15 overflow at the third step after the first input, layer 0, on the way forward."""
    cell = rnnjax.VanillaCell(H, activation="identity", recurrent_initializer=rnnjax.initializers.Orthogonal(1e15))
    network, rows = RecurrentNetwork(cell, 1, input_size=2, rngs=nnx.Rngs(0)), []
    settings = FitSettings(steps=2, batch_size=B, evaluate_every=2)
    fit(network, TASK, OPTIMIZER, settings, on_step=lambda step, row: rows.append(row))
    for row in rows:
        assert row["skipped"] and row["non_finite_pass"] == "forward"
        assert (row["non_finite_layer"], row["non_finite_step"]) == (0, 3)
    assert rows[-1]["nonfinite_steps"] == 2
