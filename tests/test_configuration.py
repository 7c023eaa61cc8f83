"""Every name builds, every wrong value is refused by name, and what is built has the numbers asked for."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rnnjax
from rnnjax.configuration import CELLS, CHOICES, RunConfig

SMALL = {"hidden_size": 6, "batch_size": 2}


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam needs implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vanilla", rnnjax.VanillaCell),
        ("leaky", rnnjax.LeakyCell),
        ("skip", rnnjax.SkipCell),
        ("lstm", rnnjax.LSTMCell),
        ("gru", rnnjax.GRUCell),
    ],
)
def test_cells(name, kind):
    cell = RunConfig(cell=name, activation="relu", leak=0.25, span=3, skip=0.1, forget_bias=2.0, **SMALL).make_cell()
    assert type(cell) is kind and cell.hidden_size == 6
    asked = {"activation": "relu", "leak": 0.25, "span": 3, "skip": 0.1, "forget_bias": 2.0}
    has = {"vanilla": {"activation"}, "leaky": {"activation", "leak"}, "lstm": {"forget_bias"}, "gru": {"forget_bias"}}
    has["skip"] = {"activation", "leak", "span", "skip"}
    for setting, value in asked.items():
        assert getattr(cell, setting, None) == (value if setting in has[name] else None)


def test_every_cell_is_tested():
    assert set(CELLS) == {"vanilla", "leaky", "skip", "lstm", "gru"} == set(CHOICES["cell"])


def test_forget_bias_defaults_to_that_of_the_cell():
    biases = {
        name: RunConfig(cell=name).make_cell().initial_bias(jax.random.key(0), jnp.float32) for name in ("lstm", "gru")
    }
    assert (biases["lstm"][1] == 1).all() and not biases["gru"].any()


@pytest.mark.parametrize("activation", CHOICES["activation"])
def test_activations(activation):
    cell = RunConfig(activation=activation, **SMALL).make_cell()
    points = jnp.linspace(-2, 2, 6)
    expected = {
        "tanh": np.tanh,
        "relu": lambda a: np.maximum(a, 0),
        "leaky_relu": lambda a: np.where(a > 0, a, 0.01 * a),
        "elu": lambda a: np.where(a > 0, a, np.expm1(a)),
        "softplus": lambda a: np.log1p(np.exp(a)),
        "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
        "identity": lambda a: a,
    }[activation]
    result = cell.pointwise(points, (points,), (jnp.zeros_like(points),))
    np.testing.assert_allclose(result, expected(np.asarray(points, np.float64)), rtol=1e-5, atol=1e-6)


def kernel_of(initializer, gain, cell="vanilla"):
    made = RunConfig(initializer=initializer, gain=gain, cell=cell, **SMALL).make_cell()
    return np.moveaxis(np.asarray(made.init(jax.random.key(0), 2).recurrent_kernel), 1, 0)  # [G, H, H]


@pytest.mark.parametrize("cell", CHOICES["cell"])
@pytest.mark.parametrize("gain", [1.0, 0.3])
def test_gain_is_the_spectral_norm_of_every_orthogonal_gate(cell, gain):
    singular_values = np.linalg.svd(kernel_of("orthogonal", gain, cell), compute_uv=False)
    np.testing.assert_allclose(singular_values, gain, rtol=1e-5)


@pytest.mark.parametrize("initializer", CHOICES["initializer"])
def test_initializers(initializer):
    kernel, doubled = kernel_of(initializer, 1.0)[0], kernel_of(initializer, 2.0)[0]
    np.testing.assert_allclose(doubled, 2 * kernel, rtol=1e-6)
    match initializer:
        case "orthogonal":
            np.testing.assert_allclose(kernel @ kernel.T, np.eye(6), atol=1e-6)
        case "identity":
            np.testing.assert_array_equal(kernel, np.eye(6))
        case "glorot":
            bound = math.sqrt(6 / 12)
            assert 0.9 * bound < np.abs(kernel).max() <= bound
        case "gaussian":  # 36 numbers give the variance to 24 %
            np.testing.assert_allclose(np.mean(kernel**2), 1 / 6, rtol=0.5)
        case "he":
            np.testing.assert_allclose(kernel, math.sqrt(2) * kernel_of("gaussian", 1.0)[0], rtol=1e-6)
        case _:
            pytest.fail(f"no test of initializer {initializer}")


@pytest.mark.parametrize("name", CHOICES["task"])
@pytest.mark.parametrize("cell", ["vanilla", "lstm"])
def test_network_fits_its_task(name, cell):
    config = RunConfig(task=name, cell=cell, num_layers=2, skip_connections=True, **SMALL)
    task = config.make_task()
    assert task.name == name
    network = config.make_network(task)
    assert len(network.layers) == 2 and network.skip_connections

    def loss(key):
        batch = task.generate(key, 2)
        return task.loss(network(batch.inputs), batch)

    assert jax.eval_shape(loss, jax.random.key(0)).shape == ()


@pytest.mark.parametrize(
    ("name", "length", "num_steps"),
    [
        ("adding", 30, 30),
        ("temporal_order", 30, 30),
        ("copy", 30, 50),  # ten symbols before, ten after
        ("language_recall", 30, 35),  # five words up to the place
    ],
)
def test_length_reaches_the_task(name, length, num_steps):
    assert RunConfig(task=name, length=length).make_task().sequence_length == num_steps


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        ("digits", 64, "^length is fixed for task 'digits' and must be left out, got 64"),
        ("adding", 1, "^length does not suit task 'adding': .* at least 2, got 1"),
        ("temporal_order", 9, "^length does not suit task 'temporal_order': .* at least 10, got 9"),
        ("language_recall", 3, "^length does not suit task 'language_recall': .* at least 4, got 3"),
    ],
)
def test_length_that_the_task_cannot_have(name, length, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(task=name, length=length).make_task()


def first_update(gradient, **settings):
    optimizer = RunConfig(learning_rate=0.1, **settings).make_optimizer()
    params = jnp.zeros_like(gradient)
    return optimizer.update(gradient, optimizer.init(params), params)[0]


@pytest.mark.parametrize("name", CHOICES["optimizer"])
def test_optimizers(name):
    gradient = np.array([3.0, -0.5, 0.25])
    expected = {
        "sgd": -0.1 * gradient,
        "adam": -0.1 * np.sign(gradient),  # the first step is normalised: m̂/√v̂ = ±1
        "rmsprop": -0.1 * np.sign(gradient) / math.sqrt(0.1),  # v = 0.1 g² after one step
    }[name]
    update = first_update(jnp.asarray(gradient, jnp.float32), optimizer=name, clip_norm=0)
    np.testing.assert_allclose(update, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"clip_norm": 0}, [30, -40]),
        ({"clip_norm": 0, "clip_value": 0}, [30, -40]),
        ({"clip_norm": 5}, [3, -4]),
        ({"clip_norm": 0, "clip_value": 35}, [30, -35]),
        ({"clip_norm": 25, "clip_value": 30}, [25 / math.sqrt(2), -25 / math.sqrt(2)]),
        ({}, [0.6, -0.8]),
    ],
)
def test_clipping_bounds_of_which_0_is_none(bounds, expected):
    update = first_update(jnp.array([30.0, -40.0]), optimizer="sgd", **bounds)
    np.testing.assert_allclose(update, -0.1 * np.array(expected), rtol=1e-5)


def test_truncation_and_monitoring_of_which_0_is_none():
    assert RunConfig().fit_settings().backpropagation.truncation is None
    assert RunConfig(truncation=5).fit_settings().backpropagation.truncation == 5
    assert RunConfig(monitor_every=0).make_monitor() is None
    assert RunConfig(monitor_every=7).make_monitor().every == 7


def test_fit_settings_are_those_of_the_config():
    settings = RunConfig(steps=11, batch_size=12, evaluate_every=13, truncation=14, seed=15).fit_settings()
    assert dataclasses.asdict(settings) == {
        "steps": 11,
        "batch_size": 12,
        "evaluate_every": 13,
        "backpropagation": {
            "truncation": 14,
            "max_carry_gradient": None,
            "checkpoint_every": None,
            "compute_dtype": None,
            "side_by_side": True,
            "penalty": None,
        },
        "seed": 15,
    }


def test_seed_decides_the_weights():
    def weights(seed):
        config = RunConfig(seed=seed, **SMALL)
        return jax.tree.leaves(nnx.state(config.make_network(config.make_task())))

    first, again, other = weights(2**32 - 1), weights(2**32 - 1), weights(1)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_config_is_a_frozen_value():
    config = RunConfig(hidden_size=8)
    assert config == RunConfig(hidden_size=8) and hash(config) == hash(RunConfig(hidden_size=8))
    assert config != RunConfig() and len({config, RunConfig(hidden_size=8), RunConfig()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 9


COUNTS = ("hidden_size", "num_layers", "steps", "batch_size", "evaluate_every", "length")
NAN, INF = math.nan, math.inf
WRONG = [
    *((name, "nonsense") for name in CHOICES),
    *((name, value) for name in COUNTS for value in (0, -1, 2.5, True, "3")),
    *((name, value) for name in ("truncation", "monitor_every", "chrono", "seed") for value in (-1, 2.5, True)),
    *((name, value) for name in ("gain", "learning_rate") for value in (0, -1, NAN, INF, "1", True)),
    *(
        (name, value)
        for name in ("clip_norm", "clip_value", "clip_ratio", "clip_carry")
        for value in (-1, NAN, INF, "1")
    ),
    *(("leak", value) for value in (0, -0.1, 1.1, NAN, "1")),
    *(("forget_bias", value) for value in (NAN, INF, -INF, "1")),
    ("seed", 2**32),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be ") as error:
        RunConfig(**{name: value})
    assert repr(value) in str(error.value)


def test_nearest_name_is_suggested():
    with pytest.raises(
        ValueError, match=r"^cell must be one of gru, leaky, lstm, skip, vanilla, got 'lsmt'; did you mean 'lstm'\?"
    ):
        RunConfig(cell="lsmt")
