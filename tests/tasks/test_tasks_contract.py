"""What holds for every task: purity in (seed, step), held-out data, shapes, losses, errors that name the mistake."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnnjax.tasks import EVALUATION_SIZE, TASKS, make_task
from rnnjax.tasks.base import _EVALUATION_STEP, _step_key

SMALL = {
    "adding": {"sequence_length": 24},
    "copy": {"delay": 7},
    "temporal_order": {"sequence_length": 30},
    "language_recall": {"distance": 60},
    "digits": {},
}


@pytest.fixture(params=TASKS)
def task(request):
    return make_task(request.param, **SMALL[request.param])


def outputs_shape(task, batch_size):
    steps = {"last": (), "every": (task.sequence_length,)}[task.readout]
    return (*steps, batch_size, task.output_size)


def sequences(batch):
    """One hashable object a sequence."""
    return {np.ascontiguousarray(sequence).tobytes() for sequence in np.moveaxis(np.asarray(batch.inputs), 1, 0)}


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_the_issue_lists_these_tasks():
    assert sorted(TASKS) == ["adding", "copy", "digits", "language_recall", "temporal_order"]
    assert all(TASKS[name].name == name for name in TASKS)


def test_shapes_and_dtypes_are_as_declared(task):
    batch = task.batch(seed=1, step=2, batch_size=6)
    assert (task.input_size is None) != (task.vocabulary_size is None)
    if task.vocabulary_size is None:
        assert batch.inputs.shape == (task.sequence_length, 6, task.input_size)
        assert batch.inputs.dtype == jnp.float32
    else:
        assert batch.inputs.shape == (task.sequence_length, 6)
        assert batch.inputs.dtype == jnp.int32
    assert batch.targets.dtype == (jnp.float32 if task.name == "adding" else jnp.int32)
    classes = (6, 1) if task.name == "adding" else outputs_shape(task, 6)[:-1]
    assert batch.targets.shape == classes


def test_every_token_and_every_class_occurs_and_no_other(task):
    batch = task.evaluation_batch(seed=0)
    if task.vocabulary_size is not None:
        assert set(np.unique(batch.inputs)) == set(range(task.vocabulary_size))
    if task.name != "adding":
        assert set(np.unique(batch.targets)) == set(range(task.output_size))


def test_a_batch_is_a_pure_function_of_seed_and_step(task):
    batch = task.batch(seed=3, step=4, batch_size=6)
    task.batch(seed=0, step=0, batch_size=6)
    assert_equal(batch, make_task(task.name, **SMALL[task.name]).batch(seed=3, step=4, batch_size=6))
    assert_equal(batch, task.batch(np.uint32(3), jnp.int32(4), np.int64(6)))


def test_steps_seeds_and_sequences_differ(task):
    batches = [task.batch(seed, step, 6) for seed in range(3) for step in range(3)]
    for first, second in itertools.combinations(batches, 2):
        assert not np.array_equal(first.inputs, second.inputs)
    assert all(len(sequences(batch)) == 6 for batch in batches)


def test_jit_with_traced_seed_and_step_equals_eager(task):
    traced = jax.jit(lambda seed, step: task.batch(seed, step, 6))
    for seed, step in [(0, 0), (3, 4)]:
        assert_equal(traced(seed, step), task.batch(seed, step, 6))


def test_double_precision_changes_no_number(task):
    batch = task.batch(seed=3, step=4, batch_size=6)
    with jax.enable_x64(True):
        wide = task.batch(seed=3, step=4, batch_size=6)
    assert_equal(batch, wide)
    assert jax.tree.map(lambda leaf: leaf.dtype, batch) == jax.tree.map(lambda leaf: leaf.dtype, wide)


def test_evaluation_never_equals_training(task):
    held_out = task.evaluation_batch(seed=0)
    assert held_out.inputs.shape[1] == (360 if task.name == "digits" else EVALUATION_SIZE)
    assert_equal(held_out, task.evaluation_batch(seed=0))
    for step in [*range(50), 2**31 - 1, 2**32 - 2]:
        assert not sequences(held_out) & sequences(task.batch(0, step, EVALUATION_SIZE))


def test_the_evaluation_key_belongs_to_no_training_step():
    first = jnp.arange(100_000, dtype=jnp.uint32)
    steps = jnp.concatenate([first, jnp.uint32(2**32 - 2) - first])
    keys = jax.random.key_data(jax.vmap(lambda step: jax.random.fold_in(jax.random.key(5), step))(steps))
    held_out = jax.random.key_data(_step_key(5, _EVALUATION_STEP))
    assert len(np.unique(keys, axis=0)) == len(steps)
    assert not np.any(np.all(np.asarray(keys) == np.asarray(held_out), axis=1))


def test_tasks_are_hashable_by_their_settings():
    assert hash(make_task("copy", delay=5)) == hash(make_task("copy", delay=np.int64(5)))
    assert make_task("copy", delay=5) != make_task("copy", delay=6)
    assert make_task("adding", sequence_length=20) != make_task("temporal_order", sequence_length=20)


@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(set(TASKS) - {"adding"}))
def test_loss_of_classes_is_the_cross_entropy_of_numpy(name, dtype_name):
    task = make_task(name, **SMALL[name])
    batch = task.batch(seed=0, step=0, batch_size=6)
    outputs = jax.random.normal(jax.random.key(1), outputs_shape(task, 6)).astype(dtype_name)
    logits = np.asarray(outputs.astype(jnp.float32), np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probabilities, np.asarray(batch.targets)[..., None], -1)).mean()
    loss = task.loss(outputs, batch)
    assert loss.shape == ()
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_perfect_outputs_have_no_loss_and_accuracy_one(task):
    batch = task.batch(seed=0, step=0, batch_size=6)
    outputs = batch.targets if task.name == "adding" else 100 * jax.nn.one_hot(batch.targets, task.output_size)
    assert float(task.loss(outputs, batch)) < 1e-6
    assert float(task.accuracy(outputs, batch)) == 1.0
    wrong = jnp.roll(outputs, 1, axis=-1) if task.name != "adding" else outputs + 0.1
    assert float(task.accuracy(wrong, batch)) == 0.0


def test_loss_is_differentiable_in_double_precision(task):
    with jax.enable_x64(True):
        batch = task.batch(seed=0, step=0, batch_size=6)
        gradient = jax.grad(task.loss)(jnp.ones(outputs_shape(task, 6), jnp.float64), batch)
    assert gradient.dtype == jnp.float64
    assert np.any(np.asarray(gradient))


def test_outputs_of_another_shape_are_named(task):
    batch = task.batch(seed=0, step=0, batch_size=6)
    wrong = jnp.zeros((*outputs_shape(task, 6)[:-1], task.output_size + 1))
    for score in (task.loss, task.accuracy):
        with pytest.raises(ValueError, match=rf"outputs of task '{task.name}' must have shape \(.*\), got \(.*\)"):
            score(wrong, batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 4), "seed must be a non-negative integer, got -1"),
        ((0.5, 0, 4), "seed must be a non-negative integer, got 0.5"),
        ((2**32, 0, 4), "seed must be at most 4294967295, got 4294967296"),
        ((0, -1, 4), "step must be a non-negative integer, got -1"),
        ((0, jnp.float32(1), 4), "step must be a non-negative integer, got 1.0"),
        ((0, 2**32 - 1, 4), "step must be at most 4294967294, got 4294967295"),
        ((0, 0, 0), "batch_size must be a positive integer, got 0"),
    ],
)
def test_bad_batch_arguments(task, arguments, message):
    with pytest.raises(ValueError, match=message):
        task.batch(*arguments)


def test_bad_evaluation_seed(task):
    with pytest.raises(ValueError, match="seed must be a non-negative integer, got -3"):
        task.evaluation_batch(-3)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ading", {}, "task must be one of adding, copy, .*got 'ading'; did you mean 'adding'"),
        (None, {}, "task must be one of adding, copy, .*got None"),
        ("copy", {"dealy": 3}, "setting of task 'copy' must be one of delay, got 'dealy'; did you mean 'delay'"),
        ("digits", {"delay": 3}, "task 'digits' takes no settings, got 'delay'"),
        ("copy", {"delay": 0}, "delay must be a positive integer, got 0"),
        ("adding", {"sequence_length": 1}, "sequence_length must be an integer of at least 2, got 1"),
        ("adding", {"sequence_length": 20.0}, "sequence_length must be an integer of at least 2, got 20.0"),
        ("temporal_order", {"sequence_length": 9}, "sequence_length must be an integer of at least 10, got 9"),
        ("language_recall", {"distance": 3}, "distance must be an integer of at least 4, got 3"),
        ("language_recall", {"distance": True}, "distance must be an integer of at least 4, got True"),
    ],
)
def test_bad_settings(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, **settings)
