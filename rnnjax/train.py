"""Training: a state, a step, and a loop that measures, reports, and can be interrupted."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rnnjax import validation
from rnnjax.backpropagation import BackpropagationSettings, locate_non_finite, loss_and_gradient
from rnnjax.clipping import clipping_state
from rnnjax.metrics import MetricsWriter
from rnnjax.models import RecurrentNetwork, layer_views, zero_perturbations
from rnnjax.monitor import Monitor, Reading
from rnnjax.progress import TrainingProgress
from rnnjax.tasks import Batch, Task
from rnnjax.timing import Timing
from rnnjax.typing import Array


@flax.struct.dataclass
class TrainState:
    """What a training step changes.

    Attributes:
      step: number of steps taken, int32 scalar.
      params: the network's weights.
      opt_state: the optimiser's state; holds a ``ClippedState``.
    """

    step: Array
    params: nnx.State
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """How long and on what to train.

    Attributes:
      steps: training steps.
      batch_size: sequences a step.
      evaluate_every: training steps between evaluations on held-out data; the last step is always followed by one.
      backpropagation: how the gradient is taken.
      seed: seed of the data.

    Raises:
      ValueError: a setting out of range.
    """

    steps: int
    batch_size: int = 64
    evaluate_every: int = 100
    backpropagation: BackpropagationSettings = dataclasses.field(default_factory=BackpropagationSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "evaluate_every"):
            validation.positive_integer(name, getattr(self, name))
        validation.non_negative_integer("seed", self.seed)


@dataclasses.dataclass
class FitResult:
    """What a run of ``fit`` came to, complete or not.

    Attributes:
      state: the state after the last finished step.
      measured: what the monitor saw, each with the number of its training step.
      evaluated: held-out loss and accuracy, each with the number of steps taken before.
      interrupted: whether Ctrl-C ended the run.
      timing: where the time went.
    """

    state: TrainState
    measured: list[tuple[int, Reading]] = dataclasses.field(default_factory=list)
    evaluated: list[tuple[int, dict[str, float]]] = dataclasses.field(default_factory=list)
    interrupted: bool = False
    timing: Timing = dataclasses.field(default_factory=Timing)

    @property
    def reading_steps(self) -> list[int]:
        """Returns the training steps that were measured."""
        return [step for step, _ in self.measured]

    @property
    def readings(self) -> list[Reading]:
        """Returns what the monitor saw."""
        return [reading for _, reading in self.measured]

    @property
    def evaluation_steps(self) -> list[int]:
        """Returns after how many training steps the network was evaluated."""
        return [step for step, _ in self.evaluated]

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """Returns held-out loss and accuracy."""
        return [scores for _, scores in self.evaluated]


def create_state(network: RecurrentNetwork, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step.

    Args:
      network: gives the initial weights.
      optimizer: from ``clipped``.

    Raises:
      ValueError: an optimiser that did not come from ``clipped``.
    """
    params = nnx.state(network, nnx.Param)
    opt_state = optimizer.init(params)
    try:
        clipping_state(opt_state)
    except ValueError as error:
        raise ValueError("optimizer must come from clipped(...), around any Optax optimiser") from error
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


@functools.partial(jax.jit, static_argnames=("graph", "task", "optimizer", "settings"))
def train_step(
    graph: nnx.GraphDef,
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    settings: BackpropagationSettings,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, dict[str, Array]]:
    """Takes one optimiser step.

    Args:
      graph: structure of the network, from ``nnx.split``.
      task: gives loss and accuracy.
      optimizer: from ``clipped``.
      settings: how the gradient is taken.
      state: the state before the step.
      batch: the batch.

    Returns:
      The state after the step, and its metrics as scalars.
    """
    scores, gradient, _ = loss_and_gradient(graph, task, settings, state.params, batch)
    return _updated(state, optimizer, gradient, scores)


@functools.partial(jax.jit, static_argnames=("graph", "task", "optimizer", "settings"))
def monitored_train_step(
    graph: nnx.GraphDef,
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    settings: BackpropagationSettings,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, dict[str, Array], Array]:
    """Takes one optimiser step as ``train_step`` does, and keeps the hidden gradients of its backward pass.

    Args:
      graph: structure of the network, from ``nnx.split``.
      task: gives loss and accuracy.
      optimizer: from ``clipped``.
      settings: how the gradient is taken.
      state: the state before the step.
      batch: the batch.

    Returns:
      The state after the step, its metrics, and ‖∂L/∂h_t‖ over the batch for every layer and step, ``[L, T]``.
    """
    zeros = zero_perturbations(nnx.merge(graph, state.params), batch.inputs)
    scores, gradient, hidden = loss_and_gradient(graph, task, settings, state.params, batch, zeros)
    norms = jnp.stack([_norm_of_each_step(jax.tree.leaves(layer)[0]) for layer in hidden])
    return *_updated(state, optimizer, gradient, scores), norms


def _updated(
    state: TrainState,
    optimizer: optax.GradientTransformationExtraArgs,
    gradient: nnx.State,
    scores: dict[str, Array],
) -> tuple[TrainState, dict[str, Array]]:
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    clipping = clipping_state(opt_state)
    metrics = scores | {
        "gradient_norm": clipping.norm_before,
        "gradient_norm_clipped": clipping.norm_after,
        "clipped": clipping.was_clipped,
        "skipped": clipping.was_skipped,
        "nonfinite_steps": clipping.num_nonfinite,
    }
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics


def _norm_of_each_step(hidden_gradient: Array) -> Array:
    """Returns the norm over batch and units of ``[T, B, H]`` at each step, scaled so that no square underflows."""
    magnitude = jnp.abs(hidden_gradient).astype(jnp.promote_types(hidden_gradient.dtype, jnp.float32))
    largest = magnitude.max(axis=(1, 2), keepdims=True)
    relative = magnitude / jnp.where(largest > 0, largest, 1)
    return largest[:, 0, 0] * jnp.sqrt(jnp.sum(relative**2, axis=(1, 2)))


@functools.partial(jax.jit, static_argnames=("graph", "task"))
def evaluate(graph: nnx.GraphDef, task: Task, params: nnx.State, batch: Batch) -> dict[str, Array]:
    """Returns loss and accuracy of a network on one batch, as scalars.

    Args:
      graph: structure of the network, from ``nnx.split``.
      task: gives loss and accuracy.
      params: the network's weights.
      batch: the batch, held out from training.

    Returns:
      ``loss`` and ``accuracy``.
    """
    outputs = nnx.merge(graph, params)(batch.inputs)
    return {"loss": task.loss(outputs, batch), "accuracy": task.accuracy(outputs, batch)}


def fit(
    network: RecurrentNetwork,
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    settings: FitSettings,
    *,
    monitor: Monitor | None = None,
    metrics: MetricsWriter | None = None,
    on_step: Callable[[int, dict[str, Any]], None] | None = None,
    label: str = "training",
) -> FitResult:
    """Trains a network behind a progress bar, measuring beside it; Ctrl-C ends training and keeps everything so far.

    Args:
      network: the network; it is left as it is, trained weights are in the result's state.
      task: gives batches, loss and accuracy.
      optimizer: from ``clipped``.
      settings: how long and on what to train.
      monitor: what to measure, and when; None for nothing.
      metrics: where a line a step is written; None for nowhere.
      on_step: called after each step with its number and metrics.
      label: what the progress bar says is trained.

    Returns:
      The ``FitResult``.

    Raises:
      ValueError: an optimiser that did not come from ``clipped``.

    Example:
      >>> import optax, rnnjax
      >>> from flax import nnx
      >>> from rnnjax.tasks import make_task
      >>> task = make_task("adding", sequence_length=6)
      >>> network = RecurrentNetwork(rnnjax.GRUCell(4), task.output_size, input_size=task.input_size, rngs=nnx.Rngs(0))
      >>> result = fit(network, task, rnnjax.clipped(optax.sgd(1e-2), max_norm=1.0), FitSettings(steps=3))
      >>> int(result.state.step), result.evaluation_steps
      (3, [3])
    """
    graph, _ = nnx.split(network)
    held_out = task.evaluation_batch(settings.seed)
    result = FitResult(create_state(network, optimizer))
    with TrainingProgress(label, settings.steps) as progress:
        try:
            for step in range(settings.steps):
                row = _one_step(graph, task, optimizer, settings, monitor, result, step)
                if (step + 1) % settings.evaluate_every == 0 or step == settings.steps - 1:
                    row |= _evaluation(graph, task, held_out, result, step + 1)
                if metrics is not None:
                    metrics.write(step, **row)
                progress.update(step, row)
                if on_step is not None:
                    on_step(step, row)
        except KeyboardInterrupt:
            result.interrupted = True
    return result


def _one_step(
    graph: nnx.GraphDef,
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    settings: FitSettings,
    monitor: Monitor | None,
    result: FitResult,
    step: int,
) -> dict[str, Any]:
    """Takes step number ``step``, measured if it is due, enters it in ``result``, and returns its metrics."""
    began = time.perf_counter()
    batch = task.batch(settings.seed, step, settings.batch_size)
    arguments = (graph, task, optimizer, settings.backpropagation, result.state, batch)
    if monitor is None or not monitor.is_due(step, settings.steps):
        result.state, scalars = train_step(*arguments)
        row = _with_origin(_as_numbers(scalars), arguments)
        result.timing.plain.append(time.perf_counter() - began)
        return row
    layers = layer_views(graph, result.state.params, batch.inputs[:, : monitor.num_sequences])
    result.state, scalars, hidden_gradient_norms = monitored_train_step(*arguments)
    reading = monitor.measure(layers, hidden_gradient_norms)
    row = _with_origin(_as_numbers(scalars), arguments) | reading.summary()
    result.timing.monitored.append(time.perf_counter() - began)
    result.measured.append((step, reading))
    return row


def _with_origin(row: dict[str, Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Adds where the first non-finite value arose to the metrics of a step that was skipped."""
    if not row["skipped"]:
        return row
    graph, task, _, settings, before, batch = arguments
    return row | locate_non_finite(graph, task, settings, before.params, batch)


def _evaluation(graph: nnx.GraphDef, task: Task, held_out: Batch, result: FitResult, step: int) -> dict[str, float]:
    scores = _as_numbers(evaluate(graph, task, result.state.params, held_out))
    result.evaluated.append((step, scores))
    return {f"held_out_{name}": value for name, value in scores.items()}


def _as_numbers(scalars: dict[str, Array]) -> dict[str, Any]:
    return {name: np.asarray(value).item() for name, value in jax.device_get(scalars).items()}
