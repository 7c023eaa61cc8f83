"""Language recall: every sentence is read back as text and checked word by word."""

import collections
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from rnnjax.tasks import make_task
from rnnjax.tasks.sentences import LANGUAGE_OF_PLACE, LEADS, PLACE, SENTENCES

CYCLE = sum(len(text.split()) for text in SENTENCES)


@functools.cache
def read(distance, num_sentences=2000):
    """Returns (text, answer) of each sequence."""
    task = make_task("language_recall", distance=distance)
    batch = task.batch(0, 0, num_sentences)
    return [
        (task.words(tokens), task.languages[target])
        for tokens, target in zip(np.asarray(batch.inputs).T, batch.targets.tolist(), strict=True)
    ]


def parse(text):
    """Returns the cue, the filler sentences with {place} put back, their places, and the lead, if any."""
    beginning, *rest = text.split(" . ")
    assert beginning.startswith("I grew up in ")
    lead, _, after = rest.pop().rpartition("I speak fluent")
    assert after == ""
    words = [[*sentence.split(), "."] for sentence in rest]
    places = [word for sentence in words for word in sentence if word in LANGUAGE_OF_PLACE]
    sentences = [" ".join(PLACE if word in LANGUAGE_OF_PLACE else word for word in sentence) for sentence in words]
    return beginning.removeprefix("I grew up in "), sentences, places, lead.strip()


def test_pairs_are_many_and_of_one_word():
    assert len(LANGUAGE_OF_PLACE) >= 40
    assert len(set(LANGUAGE_OF_PLACE.values())) >= 30
    assert all(name.isalpha() and name.istitle() for pair in LANGUAGE_OF_PLACE.items() for name in pair)
    known = {"Maharashtra": "Marathi", "Kerala": "Malayalam", "Brazil": "Portuguese", "Zanzibar": "Swahili"}
    assert known.items() <= LANGUAGE_OF_PLACE.items()


def test_sentences_fill_every_remainder():
    assert len(set(SENTENCES)) == len(SENTENCES) >= 36
    lengths = collections.Counter(len(text.split()) for text in SENTENCES + LEADS)
    longest = max(len(text.split()) for text in SENTENCES)
    assert all(lengths[length] >= 2 for length in range(1, longest + 1))
    for text in SENTENCES:
        assert text.index(".") == len(text) - 1
        assert text.split().count(PLACE) <= 1
        assert text[0].isupper() or text.startswith(PLACE)


@pytest.mark.parametrize("distance", [4, 5, 6, 7, 9, 30, 60, CYCLE + 5, 2 * CYCLE + 4])
def test_distance_is_exact_and_the_text_is_whole_sentences(distance):
    for text, answer in read(distance, 2000 if distance <= 60 else 20):
        words = [*text.split(), answer]
        cue, sentences, places, lead = parse(text)
        assert len(words) - 1 - words.index(cue, 4) == distance + 1, "words strictly between cue and answer"
        assert (words[4], answer) == (cue, LANGUAGE_OF_PLACE[cue])
        assert set(sentences) <= set(SENTENCES)
        assert lead in ("", *LEADS)
        assert cue not in places


def test_maharashtra_at_the_shortest_distances():
    four = dict(read(4))
    assert four["I grew up in Maharashtra . I speak fluent"] == "Marathi"
    five = {text for text, answer in read(5) if answer == "Marathi" and "Maharashtra" in text}
    one_word = {lead for lead in LEADS if len(lead.split()) == 1}
    assert five == {f"I grew up in Maharashtra . {lead} I speak fluent" for lead in one_word}


def test_cues_and_distractors_are_uniform_over_all_places():
    cues, distractors = collections.Counter(), collections.Counter()
    for text, _ in read(60):
        cue, _, places, _ = parse(text)
        cues[cue] += 1
        distractors.update(places)
    for counts in (cues, distractors):
        assert set(counts) == set(LANGUAGE_OF_PLACE)
        expected = sum(counts.values()) / len(LANGUAGE_OF_PLACE)
        chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
        degrees = len(LANGUAGE_OF_PLACE) - 1
        assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees)


def test_distractors_say_nothing_about_the_cue_but_that_they_are_not_it():
    """Given a distractor, the cue is uniform over the other places, near ones in the list and far ones alike."""
    places = list(LANGUAGE_OF_PLACE)
    offsets = collections.Counter()
    for text, _ in read(60):
        cue, _, others, _ = parse(text)
        offsets.update((places.index(other) - places.index(cue)) % len(places) for other in others)
    assert set(offsets) == set(range(1, len(places)))
    expected = sum(offsets.values()) / (len(places) - 1)
    assert all(abs(count - expected) < 6 * np.sqrt(expected) for count in offsets.values())


def test_no_sentence_comes_again_before_all_others_have():
    for text, _ in read(60):
        _, sentences, _, _ = parse(text)
        assert len(set(sentences)) == len(sentences)
    for text, _ in read(2 * CYCLE + 4, 20):
        _, sentences, _, _ = parse(text)
        assert set(sentences[: len(SENTENCES)]) == set(SENTENCES)
        assert sentences[: len(SENTENCES)] != sentences[len(SENTENCES) : 2 * len(SENTENCES)]


def test_every_sentence_and_every_lead_is_used():
    used, leads = set(), set()
    for distance in (5, 6, 7, 60):
        for text, _ in read(distance):
            _, sentences, _, lead = parse(text)
            used.update(sentences)
            leads.add(lead)
    assert used == set(SENTENCES)
    assert leads == {"", *LEADS}


def test_baselines_are_those_of_the_language_marginal():
    task = make_task("language_recall", distance=4)
    counts = collections.Counter(LANGUAGE_OF_PLACE[place] for place in task.places)
    marginal = np.array([counts[language] for language in task.languages]) / len(task.places)
    batch = task.batch(0, 0, 50_000)
    outputs = jnp.broadcast_to(jnp.log(marginal), (50_000, task.output_size)).astype(jnp.float32)
    np.testing.assert_allclose(task.loss(outputs, batch), task.baseline_loss, rtol=5e-3)
    np.testing.assert_allclose(task.accuracy(outputs, batch), task.baseline_accuracy, rtol=0.1)
    np.testing.assert_allclose(task.baseline_loss, -(marginal * np.log(marginal)).sum(), rtol=1e-12)


def test_the_answer_is_never_among_the_inputs():
    task = make_task("language_recall")
    assert not set(task.vocabulary) & set(task.languages)


def test_words_reads_back_and_refuses_what_is_no_sentence():
    task = make_task("language_recall", distance=4)
    tokens = [task.vocabulary.index(word) for word in ["My", "sister", "."]]
    assert task.words(tokens) == "My sister ."
    with pytest.raises(ValueError, match=r"tokens must be integers \[T\], got int32 \[9, 2\]"):
        task.words(task.batch(0, 0, 2).inputs)
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, \d+\), got \[0, -1\]"):
        task.words(jnp.array([0, -1]))
