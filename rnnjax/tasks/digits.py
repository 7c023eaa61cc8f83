"""Handwritten digits read pixel by pixel."""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rnnjax.tasks.base import Batch, Task
from rnnjax.typing import Array, Key


class _Digits(NamedTuple):
    train_pixels: np.ndarray  # [images, 64], in [0, 1]
    test_pixels: np.ndarray
    train_labels: np.ndarray  # [images]
    test_labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class DigitsTask(Task):
    """Recognises a handwritten digit from its 8 × 8 pixels, shown one a step, row by row from the top left.

    The 1797 images of scikit-learn's ``load_digits`` are split once and for all, class by class, into 80 % for training
    and 20 % (360 images) held out. Training batches are drawn with replacement. Pixels are scaled to [0, 1].

    Raises:
      ImportError: scikit-learn is not installed (raised when data are first asked for).

    Example:
      >>> task = DigitsTask()
      >>> task.batch(seed=0, step=0, batch_size=32).inputs.shape
      (64, 32, 1)
      >>> task.evaluation_batch(seed=0).targets.shape
      (360,)

    Source: Alpaydin & Kaynak 1998, Optical recognition of handwritten digits (UCI Machine Learning Repository); pixel
    by pixel as in Le, Jaitly & Hinton 2015, A simple way to initialize recurrent networks of rectified linear units.
    """

    name: ClassVar[str] = "digits"

    @property
    def sequence_length(self) -> int:
        """64 pixels."""
        return 64

    @property
    def input_size(self) -> int:
        """One pixel a step."""
        return 1

    @property
    def output_size(self) -> int:
        """Ten digits."""
        return 10

    @property
    def baseline_loss(self) -> float:
        """Held-out cross-entropy, in nats, of answering every image with the digits' shares in the training part."""
        return float(-np.mean(np.log(self._train_shares()[_digits().test_labels])))

    @property
    def baseline_accuracy(self) -> float:
        """Held-out share of the digit that is the most frequent in the training part."""
        return float(np.mean(_digits().test_labels == np.argmax(self._train_shares())))

    def generate(self, key: Key, batch_size: int) -> Batch:
        """Draws training images with replacement."""
        pixels, labels = _digits().train_pixels, _digits().train_labels
        images = jax.random.randint(key, (batch_size,), 0, len(labels), jnp.int32)
        return _pixel_by_pixel(jnp.asarray(pixels)[images], jnp.asarray(labels)[images])

    def generate_held_out(self, key: Key) -> Batch:
        """Returns the whole held-out part, whatever the key."""
        return _pixel_by_pixel(jnp.asarray(_digits().test_pixels), jnp.asarray(_digits().test_labels))

    def _train_shares(self) -> np.ndarray:
        return np.bincount(_digits().train_labels, minlength=self.output_size) / len(_digits().train_labels)


def _pixel_by_pixel(pixels: Array, labels: Array) -> Batch:
    return Batch(inputs=pixels.T[..., None], targets=labels)


@functools.cache
def _digits() -> _Digits:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits task needs scikit-learn: pip install 'rnnjax[experiments]'") from error
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = (pixels / 16).astype(np.float32), labels.astype(np.int32)
    return _Digits(*train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=0))
