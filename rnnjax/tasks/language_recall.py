"""Language recall: "I grew up in Maharashtra . … I speak fluent" asks for "Marathi"."""

import collections
import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from rnnjax import validation
from rnnjax.tasks.base import Batch, Task
from rnnjax.tasks.sentences import BEGINNING, ENDING, LANGUAGE_OF_PLACE, LEADS, PLACE, SENTENCES
from rnnjax.typing import Array, Key

_PLACES = tuple(LANGUAGE_OF_PLACE)
_LANGUAGES = tuple(dict.fromkeys(LANGUAGE_OF_PLACE.values()))
_LANGUAGE_OF_PLACE = np.array([_LANGUAGES.index(language) for language in LANGUAGE_OF_PLACE.values()], np.int32)

# Places come first, so that a place's index is its token; the slot is no word and is always overwritten.
_WORDS = tuple(dict.fromkeys([*_PLACES, *" ".join([BEGINNING, ".", ENDING, *SENTENCES, *LEADS]).split()]))
_VOCABULARY = tuple(word for word in _WORDS if word != PLACE)
_TOKEN_OF_WORD = {word: token for token, word in enumerate(_VOCABULARY)} | {PLACE: -1}


def _tokens(text: str) -> np.ndarray:
    return np.array([_TOKEN_OF_WORD[word] for word in text.split()], np.int32)


_FILLERS = [_tokens(text) for text in (*SENTENCES, *LEADS)]
_LENGTHS = np.array([len(filler) for filler in _FILLERS], np.int32)
_TABLE = np.stack([np.pad(filler, (0, max(_LENGTHS) - len(filler))) for filler in _FILLERS])
_CYCLE_LENGTH = int(_LENGTHS[: len(SENTENCES)].sum())
_BEGINNING, _FULL_STOP, _ENDING = _tokens(BEGINNING), _tokens("."), _tokens(ENDING)


@dataclasses.dataclass(frozen=True)
class LanguageRecallTask(Task):
    """Names the language of the place where the speaker grew up, ``distance`` words after the place was named.

        I grew up in Maharashtra . My cousin moved to Kyoto last spring . Today I speak fluent -> Marathi

    The cue place is uniform over ``places``; some of the sentences in between name another place, never the cue, so
    only the cue decides. Sentences are drawn without replacement until all have been used; the one that would reach
    past the end is replaced by one of exactly the remaining length, so every distance is met exactly. Held-out
    sequences are drawn apart from the training's; below some thirty words so few exist that the same one may be drawn
    in both.

    Args:
      distance: Number of words strictly between the cue place and the answer, at least 4. Each word and each full stop
        counts as one; counted are the full stop after the place, everything in between, and the final "I speak
        fluent". It is also the number of recurrent steps from the step that reads the place (step 4 from zero, in every
        sequence) to the last, at which the answer is asked for; T = distance + 5.

    Raises:
      ValueError: ``distance`` is not an integer of at least 4.

    Example:
      >>> task = LanguageRecallTask(distance=4)
      >>> batch = task.batch(seed=0, step=0, batch_size=1)
      >>> task.words(batch.inputs[:, 0])
      'I grew up in Austria . I speak fluent'
      >>> task.languages[int(batch.targets[0])]
      'German'

    Source: the sentence is the example of a long-term dependency in Olah 2015, Understanding LSTM networks.
    """

    name: ClassVar[str] = "language_recall"
    places: ClassVar[tuple[str, ...]] = _PLACES
    languages: ClassVar[tuple[str, ...]] = _LANGUAGES
    vocabulary: ClassVar[tuple[str, ...]] = _VOCABULARY

    distance: int = 30

    def __post_init__(self) -> None:
        minimum = len(_FULL_STOP) + len(_ENDING)
        object.__setattr__(self, "distance", validation.integer_at_least("distance", self.distance, minimum))

    @property
    def sequence_length(self) -> int:
        """The beginning, up to the place, and ``distance`` words."""
        return len(_BEGINNING) + self.distance

    @property
    def vocabulary_size(self) -> int:
        """Number of different words, the full stop included; languages are answers only."""
        return len(self.vocabulary)

    @property
    def output_size(self) -> int:
        """Number of languages."""
        return len(self.languages)

    @property
    def baseline_loss(self) -> float:
        """Entropy of the language, −Σ p ln p nats, with p the share of the places where it is spoken."""
        return -sum(share * math.log(share) for share in self._language_shares())

    @property
    def baseline_accuracy(self) -> float:
        """Share of the places that speak the most common language."""
        return max(self._language_shares())

    def words(self, tokens: Any) -> str:
        """Returns the text of one sequence of ``tokens`` ``[T]``.

        Raises:
          ValueError: ``tokens`` is not one sequence of integers in [0, vocabulary_size).
        """
        indices = np.asarray(tokens)
        if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
            raise ValueError(f"tokens must be integers [T], got {indices.dtype} {list(indices.shape)}")
        if np.any((indices < 0) | (indices >= self.vocabulary_size)):
            raise ValueError(f"tokens must lie in [0, {self.vocabulary_size}), got {indices.tolist()}")
        return " ".join(self.vocabulary[index] for index in indices)

    def generate(self, key: Key, batch_size: int) -> Batch:
        """Draws the cue places and, for each, what is said between it and the answer."""
        num_filler = self.distance - len(_FULL_STOP) - len(_ENDING)
        num_cycles = -(-num_filler // _CYCLE_LENGTH)
        cue_key, score_key, place_key = jax.random.split(key, 3)
        cues = jax.random.randint(cue_key, (batch_size,), 0, len(_PLACES), jnp.int32)
        scores = jax.random.uniform(score_key, (batch_size, num_cycles, len(_FILLERS)), jnp.float32)
        shape = (batch_size, num_cycles * len(SENTENCES))
        others = (cues[:, None] + jax.random.randint(place_key, shape, 1, len(_PLACES), jnp.int32)) % len(_PLACES)
        filler = jax.vmap(functools.partial(_filler, num_filler))(scores, others).T
        fixed = (_BEGINNING[:-1], _FULL_STOP, _ENDING)
        beginning, full_stop, ending = (jnp.tile(part[:, None], batch_size) for part in fixed)
        tokens = jnp.concatenate([beginning, cues[None], full_stop, filler, ending])
        return Batch(inputs=tokens, targets=jnp.asarray(_LANGUAGE_OF_PLACE)[cues])

    def _language_shares(self) -> list[float]:
        counts = collections.Counter(LANGUAGE_OF_PLACE.values())
        return [count / len(LANGUAGE_OF_PLACE) for count in counts.values()]


def _filler(num_tokens: int, scores: Array, others: Array) -> Array:
    """Returns exactly ``num_tokens`` tokens of sentences in the order of ``scores`` that name the places ``others``."""
    if num_tokens == 0:
        return jnp.zeros(0, jnp.int32)
    order, starts, ends = _sentence_order(num_tokens, scores)
    position = jnp.arange(num_tokens, dtype=jnp.int32)
    which = jnp.searchsorted(ends, position, side="right", method="compare_all")
    tokens = jnp.asarray(_TABLE)[order[which], position - starts[which]]
    return jnp.where(tokens < 0, others[which], tokens)


def _sentence_order(num_tokens: int, scores: Array) -> tuple[Array, Array, Array]:
    """Returns which sentences come, in order, with the positions where each starts and ends.

    Sentences are sorted by random scores ``[cycles, fillers]``. The last one is replaced by the sentence (or lead) of
    exactly the remaining length that has the highest score of its cycle: it would come last, so it is hardly ever one
    that has been used already.
    """
    order = jnp.argsort(scores[:, : len(SENTENCES)]).astype(jnp.int32).reshape(-1)
    ends = jnp.cumsum(jnp.asarray(_LENGTHS)[order], dtype=jnp.int32)
    starts = ends - jnp.asarray(_LENGTHS)[order]
    last = jnp.searchsorted(ends, num_tokens, side="left", method="compare_all")
    fits = jnp.asarray(_LENGTHS) == num_tokens - starts[last]
    closing = jnp.argmax(jnp.where(fits, scores[last // len(SENTENCES)], -1.0)).astype(jnp.int32)
    return order.at[last].set(closing), starts, ends
