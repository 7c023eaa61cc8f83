"""What a training step costs with the monitor on, beside Flax Linen's without one.

  python -m experiments.benchmarks.training

trains one recurrent layer on the adding problem, Adam and a global norm clipped at 1, float32: with rnnjax, monitored
at the default setting (first step of every hundred), with rnnjax alone, and with Flax Linen and Optax alone. Each takes
a hundred steps in its turn, compiled beforehand; the table holds the median over the turns, in ms a step.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import optax
from absl import flags
from flax import nnx

from experiments import options
from experiments.benchmarks import recurrent_peers as peers
from rnnjax.configuration import RunConfig
from rnnjax.models import layer_views
from rnnjax.serialization import format_table
from rnnjax.tasks import Batch
from rnnjax.train import create_state, monitored_train_step, train_step

FLAGS = flags.FLAGS
MONITORED, ALONE, LINEN = "rnnjax, monitored", "rnnjax", "Flax Linen"


def ours(config: RunConfig, batches: list[Batch], *, monitored: bool) -> Callable[[], Any]:
    """Returns what takes one training step on every batch, the first of them measured if asked."""
    task, optimizer, monitor = config.make_task(), config.make_optimizer(), config.make_monitor()
    network = config.make_network(task)
    graph, _ = nnx.split(network)
    settings = config.backpropagation_settings()
    state = create_state(network, optimizer)

    def turn() -> Any:
        nonlocal state
        for index, batch in enumerate(batches):
            if monitored and monitor is not None and index == 0:
                few = batch.inputs[:, : monitor.num_sequences]
                layers = layer_views(graph, state.params, few)
                state, metrics, norms = monitored_train_step(graph, task, optimizer, settings, state, batch)
                monitor.measure(layers, norms).summary()
            else:
                state, metrics = train_step(graph, task, optimizer, settings, state, batch)
            jax.device_get(metrics)
        return state

    return turn


class Network(flax.linen.Module):
    """A recurrent layer and a readout of its last step."""

    kind: str
    hidden_size: int

    @flax.linen.compact
    def __call__(self, inputs: Any) -> Any:
        layer = flax.linen.RNN(peers.LINEN_CELLS[self.kind](self.hidden_size), time_major=True)
        return flax.linen.Dense(1)(layer(inputs)[-1])


def linen(config: RunConfig, batches: list[Batch]) -> Callable[[], Any]:
    """Returns what takes one training step on every batch, with Flax Linen and Optax."""
    network = Network(config.cell, config.hidden_size)
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.adam(config.learning_rate))
    params = network.init(jax.random.key(config.seed), batches[0].inputs)
    state = (params, optimizer.init(params))

    @jax.jit
    def step(state: Any, batch: Batch) -> tuple[Any, Any]:
        params, opt_state = state

        def loss_fn(params: Any) -> Any:
            return jnp.mean((network.apply(params, batch.inputs) - batch.targets) ** 2)

        loss, gradient = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    def turn() -> Any:
        nonlocal state
        for batch in batches:
            state, loss = step(state, batch)
            jax.device_get(loss)
        return state

    return turn


def main(argv: Sequence[str]) -> None:
    """Prints JSON lines and the table."""
    with options.user_errors():
        options.no_arguments(argv)
        for name in ("hidden_size", "num_steps", "batch_size", "repeats", "steps"):
            options.positive_integer(name, getattr(FLAGS, name))
    rows = []
    for cell in FLAGS.cells:
        config = RunConfig(task="adding", length=FLAGS.num_steps, cell=cell, hidden_size=FLAGS.hidden_size)
        batches = [config.make_task().batch(0, step, FLAGS.batch_size) for step in range(FLAGS.steps)]
        turns = {
            MONITORED: ours(config, batches, monitored=True),
            ALONE: ours(config, batches, monitored=False),
            LINEN: linen(config, batches),
        }
        times = _times(turns, len(batches))
        setting = {"cell": cell, "T": FLAGS.num_steps, "B": FLAGS.batch_size, "H": FLAGS.hidden_size}
        for name, value in times.items():
            sys.stdout.write(json.dumps(setting | {"what": name, "ms_per_step": value}) + "\n")
        sys.stdout.flush()
        shown = {name: f"{value:.2f} ({times[LINEN] / value:.2f}× Linen's speed)" for name, value in times.items()}
        rows.append(setting | shown)
    sys.stdout.write("\n" + format_table(rows) + "\n")


def _times(turns: dict[str, Callable[[], Any]], num_steps: int) -> dict[str, float]:
    """Returns the median ms a step, after one turn each that compiles."""
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for turn in turns.values():
        jax.block_until_ready(turn())
    for _ in range(FLAGS.repeats):
        for name, turn in turns.items():
            start = time.perf_counter()
            jax.block_until_ready(turn())
            taken[name].append(1e3 * (time.perf_counter() - start) / num_steps)
    return {name: statistics.median(values) for name, values in taken.items()}


if __name__ == "__main__":
    flags.DEFINE_multi_enum("cells", list(peers.KINDS), list(peers.KINDS), "which cells")
    flags.DEFINE_integer("hidden_size", 128, "number of units H")
    flags.DEFINE_integer("num_steps", 100, "length of the sequences T")
    flags.DEFINE_integer("batch_size", 64, "sequences a step B")
    flags.DEFINE_integer("steps", 100, "training steps a turn, the first of them measured")
    flags.DEFINE_integer("repeats", 5, "turns of each contestant")
    options.run(main)
