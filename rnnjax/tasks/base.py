"""What every task is: batches that are a pure function of (seed, step), a loss, an accuracy and their baselines."""

import abc
import dataclasses
import functools
from typing import Any, ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rnnjax import validation
from rnnjax.settings import check_settings
from rnnjax.typing import Array, Key

EVALUATION_SIZE = 512
"""How many fresh sequences the held-out batch of a synthetic task has."""
_EVALUATION_STEP = 2**32 - 1
_LARGEST_SEED = 2**32 - 1


@flax.struct.dataclass
class Batch:
    """Sequences and what is to be said about them.

    Attributes:
      inputs: float32 features ``[T, B, D]`` or int32 tokens ``[T, B]``.
      targets: int32 classes ``[B]`` (readout "last") or ``[T, B]`` (readout "every"), or float32 values ``[B, 1]``.
    """

    inputs: Array
    targets: Array


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A supervised problem on sequences of one length; equal settings make equal, hashable tasks.

    To add a task, derive from this class, give ``generate`` and the properties, and enter it in ``TASKS``. The loss
    and the accuracy are those of classification unless the task overrides them. Settings are the dataclass's fields.

    Attributes:
      name: The task's name in ``TASKS``.
      readout: Whether the network's outputs at the last step ``[B, O]`` or at every step ``[T, B, O]`` are scored.
    """

    name: ClassVar[str]
    readout: ClassVar[Literal["last", "every"]] = "last"

    @property
    @abc.abstractmethod
    def sequence_length(self) -> int:
        """Number of time steps T."""

    @property
    def input_size(self) -> int | None:
        """Number of input features D, or None where the inputs are tokens."""
        return None

    @property
    def vocabulary_size(self) -> int | None:
        """Number of different tokens, or None where the inputs are features."""
        return None

    @property
    @abc.abstractmethod
    def output_size(self) -> int:
        """Number of network outputs O."""

    @property
    @abc.abstractmethod
    def baseline_loss(self) -> float:
        """Loss of the best answer that remembers nothing of the inputs, in the unit of ``loss``."""

    @property
    @abc.abstractmethod
    def baseline_accuracy(self) -> float:
        """Accuracy, in [0, 1], of the best answer that remembers nothing of the inputs."""

    @abc.abstractmethod
    def generate(self, key: Key, batch_size: int) -> Batch:
        """Draws ``batch_size`` training sequences with ``key``; traceable in ``key``."""

    def batch(self, seed: int | Array, step: int | Array, batch_size: int) -> Batch:
        """Returns the training batch of one step, a pure function of (seed, step).

        Args:
          seed: Whole number in [0, 2³²), or traced.
          step: Whole number in [0, 2³² − 1), or traced.
          batch_size: Number of sequences B.

        Returns:
          The batch, the same numbers inside and outside ``jax.jit``.

        Raises:
          ValueError: An argument is not a whole number in its range.
        """
        check_settings(self)
        size = validation.positive_integer("batch_size", batch_size)
        step = _whole_number("step", step, largest=_EVALUATION_STEP - 1)
        return _training_batch(self, _step_key(seed, step), size)

    def generate_held_out(self, key: Key) -> Batch:
        """Draws the held-out data: by default ``EVALUATION_SIZE`` fresh sequences; traceable in ``key``."""
        return self.generate(key, EVALUATION_SIZE)

    def evaluation_batch(self, seed: int | Array) -> Batch:
        """Returns held-out data, drawn with a key that no training step of this seed has.

        For a fixed key ``fold_in`` is a permutation (of Threefry blocks), and training steps end below 2³² − 1, the
        number folded in here, so the keys differ for certain, not only in all likelihood.

        Args:
          seed: Whole number in [0, 2³²), or traced.

        Returns:
          ``EVALUATION_SIZE`` fresh sequences, or the held-out part of a fixed data set.

        Raises:
          ValueError: ``seed`` is not a whole number in its range.
        """
        check_settings(self)
        return _held_out_batch(self, _step_key(seed, _EVALUATION_STEP))

    def loss(self, outputs: Array, batch: Batch) -> Array:
        """Mean cross-entropy in nats, −log softmax(outputs)[target], over all scored steps and sequences.

        Args:
          outputs: Logits, ``[B, O]`` or, where ``readout`` is "every", ``[T, B, O]``.
          batch: The batch that the outputs answer.

        Returns:
          A scalar, float32 or wider.

        Raises:
          ValueError: ``outputs`` has another shape.
        """
        logits = self._scored(outputs, (*batch.targets.shape, self.output_size))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets))

    def accuracy(self, outputs: Array, batch: Batch) -> Array:
        """Share, in [0, 1], of the targets to which ``outputs`` gives the largest logit; arguments as in ``loss``."""
        logits = self._scored(outputs, (*batch.targets.shape, self.output_size))
        answers = jnp.argmax(logits, axis=-1).astype(batch.targets.dtype)
        return jnp.mean(answers == batch.targets, dtype=jnp.float32)

    def _scored(self, outputs: Array, shape: tuple[int, ...]) -> Array:
        """Returns ``outputs`` in float32 or wider, so that a bfloat16 network is scored without its rounding."""
        if jnp.shape(outputs) != shape:
            raise ValueError(f"outputs of task {self.name!r} must have shape {shape}, got {jnp.shape(outputs)}")
        outputs = jnp.asarray(outputs)
        return outputs if outputs.dtype == jnp.float64 else outputs.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _training_batch(task: Task, key: Key, batch_size: int) -> Batch:
    return task.generate(key, batch_size)


@functools.partial(jax.jit, static_argnums=0)
def _held_out_batch(task: Task, key: Key) -> Batch:
    return task.generate_held_out(key)


def _step_key(seed: int | Array, step: int | Array) -> Key:
    return jax.random.fold_in(jax.random.key(_whole_number("seed", seed, largest=_LARGEST_SEED)), step)


def _whole_number(name: str, value: Any, largest: int) -> Any:
    if not validation.is_concrete(value):
        return value
    if isinstance(value, jax.Array | np.ndarray) and value.ndim == 0:
        value = value.item()
    number = validation.non_negative_integer(name, value)
    if number > largest:
        raise ValueError(f"{name} must be at most {largest}, got {number}")
    return number
