"""One training run as a frozen record, and the objects it stands for."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import optax
from flax import nnx
from optax import GradientTransformationExtraArgs

from rnnjax import validation
from rnnjax.activations import ACTIVATIONS
from rnnjax.backpropagation import BackpropagationSettings
from rnnjax.cells import AffineCell, GRUCell, LeakyCell, LSTMCell, SkipCell, VanillaCell
from rnnjax.clipping import clipped
from rnnjax.initializers import INITIALIZERS, Chrono, make_initializer
from rnnjax.models import RecurrentNetwork
from rnnjax.monitor import Monitor
from rnnjax.penalties import GradientFlossing, Penalty, VanishingGradientPenalty
from rnnjax.tasks import TASKS, Task, make_task
from rnnjax.train import FitSettings

CELLS: dict[str, type[AffineCell]] = {
    "vanilla": VanillaCell,
    "leaky": LeakyCell,
    "skip": SkipCell,
    "lstm": LSTMCell,
    "gru": GRUCell,
}
PENALTIES: dict[str, Callable[..., Penalty] | None] = {
    "none": None,
    "vanishing_gradient": VanishingGradientPenalty,
    "flossing": GradientFlossing,
}
OPTIMIZERS = {"adam": optax.adam, "sgd": optax.sgd, "rmsprop": optax.rmsprop}
CHOICES: dict[str, list[str]] = {
    "task": list(TASKS),
    "cell": list(CELLS),
    "activation": list(ACTIVATIONS),
    "initializer": list(INITIALIZERS),
    "optimizer": list(OPTIMIZERS),
    "penalty": list(PENALTIES),
    "compute_dtype": ["float32", "bfloat16"],
}
"""The names that settings given by name may have."""
_LENGTH_SETTINGS = {
    "adding": "sequence_length",
    "copy": "delay",
    "temporal_order": "sequence_length",
    "language_recall": "distance",
}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides a training run.

    Attributes:
      task: what to learn.
      length: the task's number of steps (adding, temporal_order), of blanks (copy) or of words (language_recall) over
        which to remember; the task's own default if not given.
      cell: kind of every recurrent layer.
      hidden_size: number of units in each layer.
      num_layers: number of recurrent layers.
      skip_connections: add each layer's input to its output, from the second layer on.
      bidirectional: read every sequence in both directions, with a second cell in each layer.
      activation: activation of vanilla, leaky and skip cells.
      leak: leak of leaky and skip cells; the cell's own default if not given.
      span: steps that the connection of the skip cell spans.
      skip: weight of that connection.
      forget_bias: initial bias of the gate that keeps the state (LSTM, GRU); the cell's own default if not given.
      chrono: longest memory, in steps, that gate biases are drawn for (chrono initialisation); 0 for ``forget_bias``.
      initializer: initialiser of the recurrent matrices, each gate's on its own.
      gain: factor on the initial recurrent matrices.
      optimizer: Optax optimiser.
      learning_rate: step size.
      clip_norm: largest global norm of the gradient; 0 for no bound.
      clip_value: largest absolute component of the gradient; 0 for no bound.
      clip_ratio: largest ratio of a unit's gradient to its weights (adaptive clipping); 0 for no bound.
      clip_carry: largest norm of the gradient that one time step hands back to the one before it; 0 for no bound.
      truncation: window of truncated backpropagation through time, in steps; 0 for full length.
      checkpoint_every: steps from one state kept for the backward pass to the next; 0 to keep all.
      compute_dtype: dtype of the factors of matrix products in recurrent layers; sums and states are float32.
      penalty: what is added to the loss: nothing, Pascanu's penalty on vanishing gradients, or gradient flossing.
      penalty_weight: factor on the penalty; its own default if not given.
      steps: number of training steps.
      batch_size: sequences in a step.
      evaluate_every: training steps between evaluations on held-out data.
      monitor_every: training steps between measurements; 0 for none.
      seed: seed of weights and data.
    """

    task: str = "digits"
    length: int | None = None
    cell: str = "vanilla"
    hidden_size: int = 64
    num_layers: int = 1
    skip_connections: bool = False
    bidirectional: bool = False
    activation: str = "tanh"
    leak: float | None = None
    span: int = 8
    skip: float = 0.5
    forget_bias: float | None = None
    chrono: int = 0
    initializer: str = "orthogonal"
    gain: float = 1.0
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    clip_norm: float = 1.0
    clip_value: float = 0.0
    clip_ratio: float = 0.0
    clip_carry: float = 0.0
    truncation: int = 0
    checkpoint_every: int = 0
    compute_dtype: str = "float32"
    penalty: str = "none"
    penalty_weight: float | None = None
    steps: int = 1000
    batch_size: int = 64
    evaluate_every: int = 100
    monitor_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            validation.one_of(name, getattr(self, name), allowed)
        for name in ("hidden_size", "num_layers", "steps", "batch_size", "evaluate_every"):
            validation.positive_integer(name, getattr(self, name))
        if self.length is not None:
            validation.positive_integer("length", self.length)
        for name in ("truncation", "checkpoint_every", "monitor_every", "chrono"):
            validation.non_negative_integer(name, getattr(self, name))
        validation.integer_between("seed", self.seed, 0, 2**32 - 1)
        for name in ("gain", "learning_rate"):
            validation.positive_number(name, getattr(self, name))
        for name in ("clip_norm", "clip_value", "clip_ratio", "clip_carry"):
            validation.number_between(name, getattr(self, name), 0, sys.float_info.max)
        validation.integer_at_least("span", self.span, 2)
        validation.number_between("skip", self.skip, 0, 1)
        if self.leak is not None:
            validation.number_between("leak", self.leak, 0, 1, open_low=True)
        if self.chrono and self.forget_bias is not None:
            raise ValueError(f"forget_bias must be left out where chrono is given, got {self.forget_bias!r}")
        if self.chrono:
            validation.integer_at_least("chrono", self.chrono, 3)
        if self.penalty_weight is not None:
            validation.positive_number("penalty_weight", self.penalty_weight)
        if self.forget_bias is not None:
            validation.number_between("forget_bias", self.forget_bias, -sys.float_info.max, sys.float_info.max)

    def make_cell(self) -> AffineCell:
        """Returns the cell; settings that its kind does not have are left out."""
        settings: dict[str, Any] = {"recurrent_initializer": make_initializer(self.initializer, self.gain)}
        names = {field.name for field in dataclasses.fields(CELLS[self.cell])}
        if self.chrono and "forget_bias" in names:
            settings["forget_bias"] = Chrono(self.chrono)
        for name in ("activation", "leak", "span", "skip", "forget_bias"):
            if name in names and getattr(self, name) is not None:
                settings[name] = getattr(self, name)
        return CELLS[self.cell](self.hidden_size, **settings)

    def make_task(self) -> Task:
        """Returns the task, at the length asked for."""
        if self.length is None:
            return make_task(self.task)
        if self.task not in _LENGTH_SETTINGS:
            raise ValueError(f"length is fixed for task {self.task!r} and must be left out, got {self.length}")
        try:
            return make_task(self.task, **{_LENGTH_SETTINGS[self.task]: self.length})
        except ValueError as error:
            raise ValueError(f"length does not suit task {self.task!r}: {error}") from error

    def make_network(self, task: Task) -> RecurrentNetwork:
        """Returns the network for ``task``, with initial weights drawn from the seed."""
        return RecurrentNetwork(
            self.make_cell(),
            task.output_size,
            num_layers=self.num_layers,
            input_size=task.input_size,
            vocabulary_size=task.vocabulary_size,
            readout=task.readout,
            skip_connections=self.skip_connections,
            bidirectional=self.bidirectional,
            rngs=nnx.Rngs(self.seed),
        )

    def make_optimizer(self) -> GradientTransformationExtraArgs:
        """Returns the optimiser behind clipping."""
        return _make_optimizer(
            self.optimizer, self.learning_rate, self.clip_norm or None, self.clip_value or None, self.clip_ratio or None
        )

    def make_monitor(self) -> Monitor | None:
        """Returns the monitor, or None where ``monitor_every`` is 0."""
        return Monitor(self.monitor_every) if self.monitor_every else None

    def backpropagation_settings(self) -> BackpropagationSettings:
        """Returns how the gradient is to be taken."""
        kind = PENALTIES[self.penalty]
        weight = {} if self.penalty_weight is None else {"weight": self.penalty_weight}
        return BackpropagationSettings(
            truncation=self.truncation or None,
            max_carry_gradient=self.clip_carry or None,
            checkpoint_every=self.checkpoint_every or None,
            compute_dtype=None if self.compute_dtype == "float32" else self.compute_dtype,
            penalty=None if kind is None else kind(**weight),
        )

    def fit_settings(self) -> FitSettings:
        """Returns what ``fit`` needs to know."""
        return FitSettings(
            steps=self.steps,
            batch_size=self.batch_size,
            evaluate_every=self.evaluate_every,
            backpropagation=self.backpropagation_settings(),
            seed=self.seed,
        )


@functools.cache
def _make_optimizer(
    name: str, learning_rate: float, clip_norm: float | None, clip_value: float | None, clip_ratio: float | None
) -> GradientTransformationExtraArgs:
    """Returns the same object for the same settings, so that runs share the compiled training step."""
    return clipped(OPTIMIZERS[name](learning_rate), max_norm=clip_norm, max_value=clip_value, max_ratio=clip_ratio)
