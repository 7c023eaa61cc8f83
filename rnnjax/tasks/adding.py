"""The adding problem: add the two marked numbers of a long sequence."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from rnnjax import validation
from rnnjax.tasks.base import Batch, Task
from rnnjax.typing import Array, Key


@dataclasses.dataclass(frozen=True)
class AddingTask(Task):
    """Adds the two marked values of a sequence of uniform random numbers.

    Feature 0 is a value uniform on [0, 1], feature 1 a marker that is 1 at two steps, one drawn from the first half
    and one from the second, and 0 elsewhere:

        target = Σ_t marker_t · value_t

    Whoever remembers nothing answers 1 and errs by the target's variance, 2 · 1/12 = 1/6. The accuracy is the share of
    answers within 0.04 of the target. The default length, 100, is the shortest of Hochreiter & Schmidhuber.

    Args:
      sequence_length: Number of steps T, at least 2.

    Raises:
      ValueError: ``sequence_length`` is not an integer of at least 2.

    Example:
      >>> task = AddingTask(sequence_length=50)
      >>> batch = task.batch(seed=0, step=0, batch_size=8)
      >>> batch.inputs.shape, batch.targets.shape
      ((50, 8, 2), (8, 1))

    Source: Hochreiter & Schmidhuber 1997, Long short-term memory; Le, Jaitly & Hinton 2015, A simple way to initialize
    recurrent networks of rectified linear units; one marker in each half as in Arjovsky, Shah & Bengio 2016, Unitary
    evolution recurrent neural networks.
    """

    name: ClassVar[str] = "adding"
    tolerance: ClassVar[float] = 0.04

    sequence_length: int = 100

    def __post_init__(self) -> None:
        length = validation.integer_at_least("sequence_length", self.sequence_length, 2)
        object.__setattr__(self, "sequence_length", length)

    @property
    def input_size(self) -> int:
        """Two features: value and marker."""
        return 2

    @property
    def output_size(self) -> int:
        """One number, the sum."""
        return 1

    @property
    def baseline_loss(self) -> float:
        """Mean squared error of always answering 1: the variance of the sum of two uniform numbers."""
        return 1 / 6

    @property
    def baseline_accuracy(self) -> float:
        """Probability 1 − (1 − tolerance)² that the sum, of triangular density on [0, 2], is within tolerance of 1."""
        return 1 - (1 - self.tolerance) ** 2

    def generate(self, key: Key, batch_size: int) -> Batch:
        """Draws values and one marker position in each half."""
        length, half = self.sequence_length, self.sequence_length // 2
        value_key, first_key, second_key = jax.random.split(key, 3)
        values = jax.random.uniform(value_key, (length, batch_size), jnp.float32)
        first = jax.random.randint(first_key, (batch_size,), 0, half, jnp.int32)
        second = jax.random.randint(second_key, (batch_size,), half, length, jnp.int32)
        steps = jnp.arange(length, dtype=jnp.int32)[:, None]
        markers = ((steps == first[None]) | (steps == second[None])).astype(jnp.float32)
        sequences = jnp.arange(batch_size)
        targets = values[first, sequences] + values[second, sequences]
        return Batch(inputs=jnp.stack([values, markers], axis=-1), targets=targets[:, None])

    def loss(self, outputs: Array, batch: Batch) -> Array:
        """Mean squared error of ``outputs`` ``[B, 1]``."""
        return jnp.mean(jnp.square(self._errors(outputs, batch)))

    def accuracy(self, outputs: Array, batch: Batch) -> Array:
        """Share of ``outputs`` ``[B, 1]`` within ``tolerance`` of the target."""
        return jnp.mean(jnp.abs(self._errors(outputs, batch)) <= self.tolerance, dtype=jnp.float32)

    def _errors(self, outputs: Array, batch: Batch) -> Array:
        predictions = self._scored(outputs, batch.targets.shape)
        return predictions - batch.targets.astype(predictions.dtype)
