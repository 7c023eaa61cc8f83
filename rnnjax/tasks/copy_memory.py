"""The copy memory problem: repeat ten symbols after a long delay."""

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from rnnjax import validation
from rnnjax.tasks.base import Batch, Task
from rnnjax.typing import Array, Key


@dataclasses.dataclass(frozen=True)
class CopyTask(Task):
    """Repeats ten symbols, each one of eight, after ``delay`` steps.

    Tokens 0–7 are symbols, 8 is the blank, 9 the delimiter; with delay T the T + 20 steps are

        inputs:   s_1 … s_10   8 (T − 1 times)   9   8 (10 times)
        targets:  8 (T + 10 times)                   s_1 … s_10

    so that symbol s_i is asked for T + 10 steps after it was shown. The loss is the mean over all T + 20 steps; whoever
    remembers nothing knows when to answer blank, and pays ln 8 at the last ten steps: 10 ln 8 / (T + 20). The accuracy
    counts the ten recalled symbols alone. The delimiter is never asked for, so there are nine output classes.

    Args:
      delay: The delay T in steps, at least 1.

    Raises:
      ValueError: ``delay`` is not a positive integer.

    Example:
      >>> task = CopyTask(delay=5)
      >>> batch = task.batch(seed=0, step=0, batch_size=1)
      >>> batch.inputs[10:, 0].tolist()
      [8, 8, 8, 8, 9, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8]
      >>> batch.inputs[:10, 0].tolist() == batch.targets[-10:, 0].tolist()
      True

    Source: Arjovsky, Shah & Bengio 2016, Unitary evolution recurrent neural networks, section 5.1.
    """

    name: ClassVar[str] = "copy"
    readout: ClassVar[Literal["last", "every"]] = "every"
    num_recalled: ClassVar[int] = 10
    num_symbols: ClassVar[int] = 8
    blank: ClassVar[int] = 8
    delimiter: ClassVar[int] = 9

    delay: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "delay", validation.positive_integer("delay", self.delay))

    @property
    def sequence_length(self) -> int:
        """Delay and twice the number of recalled symbols, T + 20."""
        return self.delay + 2 * self.num_recalled

    @property
    def vocabulary_size(self) -> int:
        """Eight symbols, blank and delimiter."""
        return self.num_symbols + 2

    @property
    def output_size(self) -> int:
        """Eight symbols and blank."""
        return self.num_symbols + 1

    @property
    def baseline_loss(self) -> float:
        """10 ln 8 / (T + 20) nats."""
        return self.num_recalled * math.log(self.num_symbols) / self.sequence_length

    @property
    def baseline_accuracy(self) -> float:
        """One symbol in eight."""
        return 1 / self.num_symbols

    def generate(self, key: Key, batch_size: int) -> Batch:
        """Draws the ten symbols and lays out inputs and targets."""
        symbols = jax.random.randint(key, (self.num_recalled, batch_size), 0, self.num_symbols, jnp.int32)
        blanks = jnp.full((self.delay + self.num_recalled, batch_size), self.blank, jnp.int32)
        inputs = jnp.concatenate([symbols, blanks.at[self.delay - 1].set(self.delimiter)])
        return Batch(inputs=inputs, targets=jnp.concatenate([blanks, symbols]))

    def accuracy(self, outputs: Array, batch: Batch) -> Array:
        """Share of the ten recalled symbols that get the largest logit; ``outputs`` ``[T + 20, B, 9]``."""
        logits = self._scored(outputs, (*batch.targets.shape, self.output_size))
        recalled = Batch(batch.inputs[-self.num_recalled :], batch.targets[-self.num_recalled :])
        return super().accuracy(logits[-self.num_recalled :], recalled)
