"""The temporal order problem: in which order did two symbols appear, far apart among distractors."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from rnnjax import validation
from rnnjax.tasks.base import Batch, Task
from rnnjax.typing import Key


@dataclasses.dataclass(frozen=True)
class TemporalOrderTask(Task):
    """Names the two relevant symbols of a sequence, and their order: XX, XY, YX or YY.

    Tokens 0 and 1 are X and Y, 2–5 are distractors. One relevant symbol stands at a random step of [0.1 L, 0.2 L), one
    at a random step of [0.5 L, 0.6 L); every other step holds a random distractor:

        target = 2 · first symbol + second symbol

    Args:
      sequence_length: Number of steps L, at least 10 (below that, a window can hold no step).

    Raises:
      ValueError: ``sequence_length`` is not an integer of at least 10.

    Example:
      >>> task = TemporalOrderTask(sequence_length=20)
      >>> tokens = task.batch(seed=0, step=0, batch_size=1).inputs[:, 0]
      >>> [step for step, token in enumerate(tokens.tolist()) if token < 2]
      [2, 10]

    Source: Hochreiter & Schmidhuber 1997, Long short-term memory, experiment 6a; Pascanu, Mikolov & Bengio 2013, On
    the difficulty of training recurrent neural networks.
    """

    name: ClassVar[str] = "temporal_order"
    num_relevant: ClassVar[int] = 2
    num_distractors: ClassVar[int] = 4

    sequence_length: int = 100

    def __post_init__(self) -> None:
        length = validation.integer_at_least("sequence_length", self.sequence_length, 10)
        object.__setattr__(self, "sequence_length", length)

    @property
    def vocabulary_size(self) -> int:
        """X, Y and four distractors."""
        return self.num_relevant + self.num_distractors

    @property
    def output_size(self) -> int:
        """Four classes: XX, XY, YX, YY."""
        return self.num_relevant**2

    @property
    def baseline_loss(self) -> float:
        """ln 4 nats: four equally likely classes."""
        return math.log(self.output_size)

    @property
    def baseline_accuracy(self) -> float:
        """One class in four."""
        return 1 / self.output_size

    def generate(self, key: Key, batch_size: int) -> Batch:
        """Draws distractors, then overwrites one step in each window by a relevant symbol."""
        distractor_key, symbol_key, first_key, second_key = jax.random.split(key, 4)
        shape = (self.sequence_length, batch_size)
        tokens = jax.random.randint(distractor_key, shape, self.num_relevant, self.vocabulary_size, jnp.int32)
        symbols = jax.random.randint(symbol_key, (2, batch_size), 0, self.num_relevant, jnp.int32)
        first = jax.random.randint(first_key, (batch_size,), self._tenths(1), self._tenths(2), jnp.int32)
        second = jax.random.randint(second_key, (batch_size,), self._tenths(5), self._tenths(6), jnp.int32)
        sequences = jnp.arange(batch_size)
        tokens = tokens.at[first, sequences].set(symbols[0]).at[second, sequences].set(symbols[1])
        return Batch(inputs=tokens, targets=self.num_relevant * symbols[0] + symbols[1])

    def _tenths(self, count: int) -> int:
        """The first step at or after ``count`` tenths of the sequence, in exact integers."""
        return -(-count * self.sequence_length // 10)
