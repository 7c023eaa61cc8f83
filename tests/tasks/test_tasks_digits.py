"""Digits: the split of scikit-learn's images, and what is drawn from it."""

import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from rnnjax.tasks import digits, make_task


def rows(batch):
    """Pixels 0–16 with the label, one tuple an image."""
    pixels = np.asarray(batch.inputs)[..., 0].T * 16
    return [(*image.astype(int), label) for image, label in zip(pixels, batch.targets.tolist(), strict=True)]


@pytest.fixture(scope="module")
def originals():
    data = load_digits()
    return [(*image.astype(int), int(label)) for image, label in zip(data.data, data.target, strict=True)]


def test_training_and_held_out_images_are_disjoint_and_together_all(originals):
    task = make_task("digits")
    held_out = rows(task.evaluation_batch(0))
    training = {row for step in range(8) for row in rows(task.batch(0, step, 2000))}
    assert len(set(originals)) == len(originals) == 1797
    assert len(held_out) == len(set(held_out)) == 360
    assert not training & set(held_out)
    assert training | set(held_out) == set(originals)


def test_split_is_stratified(originals):
    everything = np.bincount([row[-1] for row in originals])
    held_out = np.bincount(np.asarray(make_task("digits").evaluation_batch(0).targets))
    assert np.all(np.abs(held_out - 0.2 * everything) <= 1)


def test_pixels_come_row_by_row_in_the_unit_interval(originals):
    batch = make_task("digits").batch(0, 0, 64)
    assert float(batch.inputs.min()) == 0.0
    assert float(batch.inputs.max()) == 1.0
    images = dict(zip(originals, load_digits().images, strict=True))
    for number, row in enumerate(rows(batch)):
        np.testing.assert_array_equal(batch.inputs[:, number, 0].reshape(8, 8) * 16, images[row])


def test_held_out_data_do_not_depend_on_the_seed():
    task = make_task("digits")
    np.testing.assert_array_equal(task.evaluation_batch(0).inputs, task.evaluation_batch(9).inputs)


def test_training_images_are_drawn_uniformly():
    task = make_task("digits")
    counts = {}
    for step in range(72):
        for row in rows(task.batch(0, step, 2000)):
            counts[row] = counts.get(row, 0) + 1
    assert len(counts) == 1437
    expected = 72 * 2000 / 1437
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert abs(chi_square - 1436) < 5 * np.sqrt(2 * 1436)


def test_baselines_are_those_of_the_training_frequencies(originals):
    task = make_task("digits")
    labels = np.asarray(task.evaluation_batch(0).targets)
    in_training = np.bincount([row[-1] for row in originals]) - np.bincount(labels)
    np.testing.assert_allclose(task.baseline_loss, -np.log(in_training / in_training.sum())[labels].mean(), rtol=1e-9)
    assert task.baseline_accuracy == np.mean(labels == in_training.argmax())
    np.testing.assert_allclose(task.baseline_loss, np.log(10), rtol=1e-2)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    digits._digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    task = make_task("digits")
    with pytest.raises(ImportError, match=r"scikit-learn: pip install 'rnnjax\[experiments\]'"):
        task.baseline_loss  # noqa: B018
