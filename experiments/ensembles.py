"""The same configuration trained from several seeds at once, quickly, for results with their spread."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from optax import GradientTransformationExtraArgs

from rnnjax.backpropagation import BackpropagationSettings, locate_non_finite
from rnnjax.clipping import clipping_state
from rnnjax.configuration import RunConfig
from rnnjax.models import RecurrentNetwork
from rnnjax.progress import TrainingProgress
from rnnjax.tasks import Batch, Task
from rnnjax.train import TrainState, create_state, evaluate, train_step
from rnnjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """What came of training n networks that differ in their seeds alone.

    Attributes:
      graph: structure of the networks.
      initial: weights before training, leaves ``[n, ...]``.
      final: weights after training, leaves ``[n, ...]``.
      metrics: loss, accuracy, gradient_norm, gradient_norm_clipped, clipped and skipped of each training step, by name,
        ``[n, N]``.
      evaluation_steps: ``[E]``, steps taken before each evaluation.
      held_out: loss and accuracy on held-out data, by name, ``[n, E]``.
      origins: for each network the first training step that was skipped, and where its first non-finite value arose;
        empty where none was.
      seconds: wall time, compilation included.
    """

    graph: nnx.GraphDef
    initial: nnx.State
    final: nnx.State
    metrics: dict[str, np.ndarray]
    evaluation_steps: np.ndarray
    held_out: dict[str, np.ndarray]
    origins: list[dict[str, Any]]
    seconds: float

    def network(self, index: int, *, trained: bool = True) -> RecurrentNetwork:
        """Returns one of the networks, before or after training."""
        weights = self.final if trained else self.initial
        return nnx.merge(self.graph, jax.tree.map(lambda leaf: leaf[index], weights))

    def steps_to_solve(self, accuracy: float) -> np.ndarray:
        """Returns after how many steps each network was first seen to reach ``accuracy``, ``[n]``; NaN if never."""
        solved = self.held_out["accuracy"] >= accuracy
        return np.where(solved.any(axis=1), self.evaluation_steps[solved.argmax(axis=1)], np.nan)


def train_ensemble(
    name: str, config: RunConfig, num_seeds: int, prepare: Callable[[RecurrentNetwork], None] | None = None
) -> Ensemble:
    """Trains networks with seeds ``config.seed``, …, ``config.seed + num_seeds − 1``, all in one computation.

    Args:
      name: what the progress bar says is trained.
      config: the configuration; its monitor is not used.
      num_seeds: number of networks n.
      prepare: changes the weights of a network before it is trained, in place.

    Returns:
      The ``Ensemble``.

    Raises:
      KeyboardInterrupt: on Ctrl-C; what a caller has finished before is its own to keep.
    """
    began = time.monotonic()
    task, optimizer = config.make_task(), config.make_optimizer()
    seeds = [config.seed + index for index in range(num_seeds)]
    networks = [dataclasses.replace(config, seed=seed).make_network(task) for seed in seeds]
    for network in networks if prepare else []:
        prepare(network)
    graph = nnx.split(networks[0])[0]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[create_state(net, optimizer) for net in networks])
    initial, settings = state.params, config.backpropagation_settings()
    keys = jnp.asarray(seeds, jnp.uint32)
    held_out = _held_out(task, keys)
    rows, scores, ends, origins = [], [], [], [{} for _ in seeds]
    with TrainingProgress(name, config.steps) as progress:
        for start in range(0, config.steps, config.evaluate_every):
            count = min(config.evaluate_every, config.steps - start)
            before, batches = state, _batches(task, config.batch_size, count, keys, start)
            state, chunk = _train(graph, task, optimizer, settings, state, batches)
            rows.append(jax.device_get(chunk))
            scores.append(jax.device_get(_evaluate(graph, task, state.params, held_out)))
            ends.append(start + count)
            _locate(graph, task, optimizer, config, seeds, before, start, rows[-1]["skipped"], origins)
            row = {key: float(np.mean(value[:, -1])) for key, value in rows[-1].items()}
            progress.update(start + count - 1, row)
    return Ensemble(
        graph,
        initial,
        state.params,
        {key: np.concatenate([row[key] for row in rows], axis=1) for key in rows[0]},
        np.array(ends),
        {key: np.stack([score[key] for score in scores], axis=1) for key in scores[0]},
        origins,
        time.monotonic() - began,
    )


# Batches come from programs of their own: one serves all networks on a task, and theirs compile in half the time.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _batches(task: Task, batch_size: int, count: int, seeds: Array, start: Array) -> Batch:
    """Returns the batches of ``count`` training steps of every network, leaves ``[n, count, ...]``."""
    numbers = start + jnp.arange(count, dtype=jnp.int32)
    return jax.vmap(lambda seed: jax.lax.map(lambda number: task.batch(seed, number, batch_size), numbers))(seeds)


@functools.partial(jax.jit, static_argnums=0)
def _held_out(task: Task, seeds: Array) -> Batch:
    """Returns the held-out batch of every network, leaves ``[n, ...]``."""
    return jax.vmap(task.evaluation_batch)(seeds)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _train(
    graph: nnx.GraphDef,
    task: Task,
    optimizer: GradientTransformationExtraArgs,
    settings: BackpropagationSettings,
    state: TrainState,
    batches: Batch,
) -> tuple[TrainState, dict[str, Array]]:
    """Takes one step with each batch, for every network; metrics are ``[n, count]``."""

    def one(state: TrainState, batches: Batch) -> tuple[TrainState, dict[str, Array]]:
        return jax.lax.scan(functools.partial(train_step, graph, task, optimizer, settings), state, batches)

    return jax.vmap(one)(state, batches)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate(graph: nnx.GraphDef, task: Task, params: nnx.State, held_out: Batch) -> dict[str, Array]:
    return jax.vmap(functools.partial(evaluate, graph, task))(params, held_out)


def _locate(
    graph: nnx.GraphDef,
    task: Task,
    optimizer: GradientTransformationExtraArgs,
    config: RunConfig,
    seeds: list[int],
    before: TrainState,
    start: int,
    skipped: np.ndarray,
    origins: list[dict[str, Any]],
) -> None:
    """Enters, for networks skipped for the first time, the training step and where the non-finite value arose."""
    settings = config.backpropagation_settings()
    for index, seed in enumerate(seeds):
        if origins[index] or not skipped[index].any():
            continue
        number = start + int(skipped[index].argmax())
        state = jax.tree.map(lambda leaf, index=index: leaf[index], before)
        # The weights that the step met: those before the chunk, and the steps from there to it once more.
        for step in range(start, number):
            batch = task.batch(seed, step, config.batch_size)
            state, _ = train_step(graph, task, optimizer, settings, state, batch)
        batch = task.batch(seed, number, config.batch_size)
        found = locate_non_finite(graph, task, settings, state.params, batch)
        origins[index] = {"training_step": number, **found}
        assert int(clipping_state(state.opt_state).num_steps) == number
