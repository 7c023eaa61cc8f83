"""Adding, copy memory and temporal order: the generators against their definitions and closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from rnnjax.tasks import make_task

MANY = 20_000


def within_standard_errors(samples, expected, num_errors=5):
    samples = np.asarray(samples, np.float64)
    return abs(samples.mean() - expected) < num_errors * samples.std() / np.sqrt(samples.size)


def chi_square(values, num_values):
    """Pearson's statistic of uniform integers in [0, num_values), as standard deviations from its mean."""
    counts = np.bincount(np.asarray(values).ravel(), minlength=num_values)
    assert len(counts) == num_values
    expected = counts.sum() / num_values
    degrees = num_values - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees)


@pytest.mark.parametrize("length", [2, 25])
def test_adding_marks_one_step_in_each_half_and_sums_them(length):
    batch = make_task("adding", sequence_length=length).batch(0, 0, 2000)
    values, markers = np.moveaxis(np.asarray(batch.inputs), -1, 0)
    assert values.min() >= 0
    assert values.max() <= 1
    assert set(np.unique(markers)) <= {0.0, 1.0}
    assert np.all(markers[: length // 2].sum(0) == 1)
    assert np.all(markers[length // 2 :].sum(0) == 1)
    assert np.all(markers.any(axis=1)), "some step is never marked"
    np.testing.assert_allclose(batch.targets[:, 0], (values * markers).sum(0), rtol=1e-6)


def test_adding_values_and_marked_positions_are_uniform():
    batch = make_task("adding", sequence_length=20).batch(0, 0, MANY)
    values, markers = np.moveaxis(np.asarray(batch.inputs), -1, 0)
    assert within_standard_errors(values, 1 / 2)
    assert within_standard_errors(values**2, 1 / 3)
    first, second = markers[:10].argmax(0), markers[10:].argmax(0)
    assert chi_square(first, 10) < 5
    assert chi_square(second, 10) < 5
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(MANY)


def test_adding_baselines_are_those_of_answering_one():
    task = make_task("adding", sequence_length=20)
    batch = task.batch(0, 0, MANY)
    ones = jnp.ones((MANY, 1))
    assert within_standard_errors((np.asarray(batch.targets) - 1) ** 2, task.baseline_loss)
    np.testing.assert_allclose(task.loss(ones, batch), 1 / 6, rtol=0.05)
    np.testing.assert_allclose(task.accuracy(ones, batch), task.baseline_accuracy, rtol=0.1)
    sums = np.add.outer(*2 * [(np.arange(2000) + 0.5) / 2000])
    np.testing.assert_allclose(task.baseline_loss, np.var(sums), rtol=1e-4)
    np.testing.assert_allclose(task.baseline_accuracy, np.mean(np.abs(sums - 1) <= 0.04), rtol=2e-2)


def test_adding_accuracy_counts_answers_within_the_tolerance():
    task = make_task("adding", sequence_length=20)
    batch = task.batch(0, 0, 4)
    errors = jnp.array([[0.039], [-0.039], [0.041], [-0.041]])
    assert float(task.accuracy(batch.targets + errors, batch)) == 0.5


@pytest.mark.parametrize("delay", [1, 30])
def test_copy_lays_out_symbols_blanks_and_delimiter(delay):
    batch = make_task("copy", delay=delay).batch(0, 0, 50)
    for tokens, targets in zip(np.asarray(batch.inputs).T, np.asarray(batch.targets).T, strict=True):
        symbols = tokens[:10].tolist()
        assert max(symbols) < 8
        assert tokens.tolist() == [*symbols, *[8] * (delay - 1), 9, *[8] * 10]
        assert targets.tolist() == [8] * (delay + 10) + symbols


def test_copy_symbols_are_uniform_at_every_step():
    symbols = make_task("copy", delay=1).batch(0, 0, MANY).inputs[:10]
    assert all(chi_square(row, 8) < 5 for row in symbols)


@pytest.mark.parametrize("delay", [1, 100])
def test_copy_baseline_is_that_of_the_best_answer_without_memory(delay):
    """Blank for certain before the delimiter, then all eight symbols alike."""
    task = make_task("copy", delay=delay)
    batch = task.batch(0, 0, 32)
    outputs = np.full((delay + 20, 32, 9), -1e9, np.float32)
    outputs[: delay + 10, :, 8] = 0.0
    outputs[delay + 10 :, :, :8] = 0.0
    np.testing.assert_allclose(task.loss(jnp.asarray(outputs), batch), task.baseline_loss, rtol=1e-5)
    np.testing.assert_allclose(task.baseline_loss, 10 * 2.0794415416798357 / (delay + 20), rtol=1e-12)
    assert task.baseline_accuracy == 1 / 8


def test_copy_accuracy_counts_the_recalled_symbols_alone():
    task = make_task("copy", delay=5)
    batch = task.batch(0, 0, MANY // 10)
    always_zero = jnp.zeros((25, MANY // 10, 9)).at[..., 0].set(1.0)
    recalled = np.asarray(batch.targets)[-10:]
    np.testing.assert_allclose(task.accuracy(always_zero, batch), (recalled == 0).mean(), rtol=1e-6)
    assert within_standard_errors(recalled == 0, task.baseline_accuracy)


@pytest.mark.parametrize("length", [10, 19, 47])
def test_temporal_order_holds_one_relevant_symbol_in_each_window(length):
    batch = make_task("temporal_order", sequence_length=length).batch(0, 0, 2000)
    tokens = np.asarray(batch.inputs)
    steps, sequences = np.nonzero(tokens.T < 2)[::-1]
    assert np.array_equal(np.bincount(sequences), np.full(2000, 2))
    first, second = steps[0::2], steps[1::2]
    windows = [{t for t in range(length) if low * length <= 10 * t < (low + 1) * length} for low in (1, 5)]
    assert [set(first), set(second)] == windows
    symbols = [tokens[step, np.arange(2000)] for step in (first, second)]
    np.testing.assert_array_equal(batch.targets, 2 * symbols[0] + symbols[1])


def test_temporal_order_is_uniform_in_classes_distractors_and_positions():
    task = make_task("temporal_order", sequence_length=100)
    batch = task.batch(0, 0, MANY)
    tokens = np.asarray(batch.inputs)
    assert chi_square(batch.targets, 4) < 5
    assert chi_square(tokens[tokens >= 2] - 2, 4) < 5
    assert chi_square((tokens[10:20] < 2).argmax(0), 10) < 5
    assert chi_square((tokens[50:60] < 2).argmax(0), 10) < 5
    flat = jnp.zeros((MANY, 4))
    np.testing.assert_allclose(task.loss(flat, batch), task.baseline_loss, rtol=1e-6)
    assert within_standard_errors(np.asarray(batch.targets) == 0, task.baseline_accuracy)
