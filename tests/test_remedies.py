"""The experiments on remedies for vanishing and exploding gradients in miniature, and what they measure with."""

import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.image import imread

from experiments import exploding_remedies, measures, vanishing_remedies
from experiments.ensembles import Ensemble
from rnnjax import comparison_plots, mean_field
from rnnjax.configuration import RunConfig
from rnnjax.workdir import Workdir
from tests.figure_checks import outside, overlaps

pytestmark = pytest.mark.slow

VANISHING = vanishing_remedies.Config(
    num_seeds=2,
    steps=3,
    recall_steps=2,
    adding_length=10,
    recall_distance=5,
    hidden_size=6,
    batch_size=4,
    num_evaluations=2,
    kinds=("none", "skip in depth"),
)
EXPLODING = exploding_remedies.Config(
    num_seeds=2, steps=4, batch_size=8, num_evaluations=2, remedies=("none", "clip by global norm")
)
SMALL = RunConfig(task="adding", length=10, hidden_size=6)


def made(config):
    task = config.make_task()
    return config.make_network(task), task, task.batch(config.seed, 10**6, 5)


@pytest.mark.parametrize("gain", [0.5, 1.25])
def test_spectral_state_of_a_linear_orthogonal_network_is_the_power_of_its_gain(gain):
    network, task, batch = made(dataclasses.replace(SMALL, activation="identity", gain=gain))
    found = measures.measure(network, task, batch)
    assert found["log_spectral_norm"] == pytest.approx(10 * np.log(gain), abs=1e-4)
    assert found["exponent"] == pytest.approx(np.log(gain), abs=1e-5)


def test_without_recurrence_all_of_the_gradient_has_lag_zero():
    network, task, batch = made(SMALL)
    network.layers[0].recurrent_kernel[...] = jnp.zeros((6, 1, 6))
    np.testing.assert_allclose(measures.by_lag(network, task, batch), [1, *[0] * 9], atol=1e-6)
    found = measures.measure(network, task, batch)
    assert found["log_spectral_norm"] == -np.inf
    assert found["horizon"] == 0
    assert found["share_within"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("settings", [{}, {"num_layers": 2}, {"num_layers": 2, "skip_connections": True}])
def test_share_of_lag_zero_is_that_of_the_gradient_cut_off_after_one_step(settings):
    """Truncated to windows of one step, only the last step's own use of the weights is left."""
    network, task, batch = made(dataclasses.replace(SMALL, **settings))
    graph, weights = nnx.split(network)

    def gradient(truncation):
        def loss(weights):
            return task.loss(nnx.merge(graph, weights)(batch.inputs, truncation=truncation), batch)

        last = nnx.merge(graph, jax.grad(loss)(weights)).layers[-1]
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(last.params())]).astype(float)

    whole, own = gradient(None), gradient(1)
    shares = measures.by_lag(network, task, batch)
    assert shares.shape == (10,)
    assert shares.sum() == pytest.approx(1, abs=1e-5)
    assert shares[0] == pytest.approx(own @ whole / (whole @ whole), abs=1e-5)


def test_what_is_not_finite_is_measured_as_not_a_number():
    network, task, batch = made(dataclasses.replace(SMALL, activation="identity", gain=1e12))
    assert all(np.isnan(value) for value in measures.measure(network, task, batch).values())
    assert np.isnan(measures.by_lag(network, task, batch)).all()


@pytest.fixture(scope="module")
def vanishing(tmp_path_factory):
    workdir = Workdir.create(tmp_path_factory.mktemp("vanishing") / "results")
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs implicit promotion.
        assert vanishing_remedies.run(VANISHING, workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def exploding(tmp_path_factory):
    workdir = Workdir.create(tmp_path_factory.mktemp("exploding") / "results")
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs implicit promotion.
        assert exploding_remedies.run(EXPLODING, workdir) == 0
    return workdir


def rows_of(workdir, name):
    with (workdir.path / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_remedy_changes_what_it_says_and_nothing_else():
    config = vanishing_remedies.Config()
    start = config.run("adding")
    changed = {}
    for name, (_, run) in config.remedies("adding").items():
        fields = {field.name for field in dataclasses.fields(run)}
        changed[name] = {key: getattr(run, key) for key in fields if getattr(run, key) != getattr(start, key)}
    skip = {"cell": "skip"}
    critical = changed.pop(vanishing_remedies.CRITICAL)
    assert critical.keys() == {"initializer", "gain"} and critical["initializer"] == "gaussian"
    assert changed == {
        "tanh, ½ orthogonal": {},
        **{name: {"activation": name} for name in ("relu", "leaky_relu", "elu", "softplus")},
        "tanh, Glorot": {"initializer": "glorot", "gain": 1},
        "tanh, orthogonal": {"gain": 1},
        "relu, He": {"activation": "relu", "initializer": "he", "gain": 1},
        "relu, identity": {"activation": "relu", "initializer": "identity", "gain": 1},
        "leak 0.1": {"cell": "leaky", "leak": 0.1},
        "from h_(t−8)": skip,
        "leak 0.1 and h_(t−8)": skip | {"leak": 0.1},
        "two layers, none": {"num_layers": 2},
        "two layers, skip": {"num_layers": 2, "skip_connections": True},
        "Pascanu's Ω": {"penalty": "vanishing_gradient"},
        "flossing": {"penalty": "flossing"},
        "LSTM, forget bias 0": {"cell": "lstm", "forget_bias": 0},
        "LSTM, forget bias 1": {"cell": "lstm", "forget_bias": 1},
        "LSTM, chrono": {"cell": "lstm", "chrono": 50},
        "GRU": {"cell": "gru"},
        "GRU, chrono": {"cell": "gru", "chrono": 50},
    }


def test_critical_gain_is_that_for_the_variance_of_what_the_inputs_add():
    """Glorot's kernel has variance 2/(2 + H), the value a mean square of 1/3, the marker one of 2/T."""
    variance = 2 / (2 + 32) * (1 / 3 + 2 / 50)
    low, high = (mean_field.critical_gain("tanh", bias_variance=variance * factor) for factor in (0.6, 1.6))
    assert 1 < low < vanishing_remedies.Config().critical_gain("adding") < high


def test_norms_before_training_are_those_of_the_product_of_the_jacobians(vanishing):
    saved = vanishing.load_arrays(vanishing_remedies.file_name("adding", 0))
    run = dataclasses.replace(VANISHING.run("adding"), seed=1)
    task = run.make_task()
    params = run.make_network(task).layers[0].params()
    kernel, recurrent, bias = (
        np.asarray(a, float)[..., 0, :] for a in (params.input_kernel, params.recurrent_kernel, params.bias)
    )
    inputs, logs = np.asarray(task.batch(1, 3, 16).inputs, float), []
    for sequence in range(4):
        state, product = np.zeros(6), np.eye(6)
        for step in range(10):
            state = np.tanh(inputs[step, sequence] @ kernel + state @ recurrent + bias)
            product = np.diag(1 - state**2) @ recurrent.T @ product
        logs.append(np.log(np.linalg.norm(product, 2)))
    assert saved["log_spectral_norm"].shape == (2, 2)
    assert saved["log_spectral_norm"][1, 0] == pytest.approx(np.median(logs), abs=1e-3)
    assert saved["exponent"][1, 0] == pytest.approx(np.median(logs) / 10, abs=1e-4)


def test_the_start_vanishes_by_half_a_step(vanishing):
    for task, num_steps in (("adding", 10), ("language_recall", 10)):
        start = vanishing.load_arrays(vanishing_remedies.file_name(task, 0))
        assert (start["log_spectral_norm"][:, 0] <= -num_steps * np.log(2)).all()
        assert (start["log_spectral_norm"][:, 0] >= -2 * num_steps * np.log(2)).all()


def test_tables_and_figures_of_the_vanishing_start(vanishing):
    names = list(VANISHING.remedies("adding"))
    for task, steps in (("adding", [2, 3]), ("language_recall", [1, 2])):
        rows = rows_of(vanishing, f"table_{task}")
        assert [row["remedy"] for row in rows] == names
        assert [row["kind"] for row in rows] == ["none"] + 2 * ["skip in depth"]
        assert {row["solved"] for row in rows} == {"0/2"}
        saved = vanishing.load_arrays(vanishing_remedies.file_name(task, 2))
        assert saved["evaluation_steps"].tolist() == steps
        last = saved["loss"][:, -1]
        low, middle, high = (f"{value:.3g}" for value in (last.min(), last.mean(), last.max()))
        assert rows[2]["loss"] == f"{middle} [{low}, {high}]"
    assert imread(vanishing.path / "vanishing_remedies.png").shape[1] == 900


def ensemble(losses):
    steps = np.array([10, 20, 30])
    return Ensemble(None, None, None, {}, steps, {"loss": np.array(losses)}, [], 0.0)


def test_steps_to_solve_are_those_of_the_first_evaluation_that_is_good_enough():
    found = vanishing_remedies.steps_to_solve(ensemble([[0.3, 0.1, 0.3], [0.3, 0.2, 0.2], [0.0, 0.2, 0.0]]), 0.1)
    np.testing.assert_array_equal(found, [20, np.nan, 10])


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0, -1.0, 2.0], "2 [−1, 3]"), ([], "–"), ([np.nan, 1.0], "nan [nan, nan]"), ([-np.inf, 0.0], "−inf [−inf, 0]")],
)
def test_spread_is_median_and_range(values, expected):
    assert vanishing_remedies.spread(np.array(values)) == expected


def plain_network(params, inputs):
    """A plain loop: states ``[T, B, H]`` and outputs ``[B, 1]``."""
    kernel, recurrent, bias, readout, offset = params
    state, states = jnp.zeros((inputs.shape[1], recurrent.shape[0])), []
    for step in inputs:
        state = jax.nn.relu(step @ kernel + state @ recurrent + bias[None])
        states.append(state)
    return jnp.stack(states), state @ readout + offset[None]


def test_the_first_overflow_is_where_a_plain_loop_meets_it(exploding):
    """After the first step down the unclipped gradient, found by autodiff of the loop."""
    saved = exploding.load_arrays(exploding_remedies.file_name("relu", "none"))
    run = EXPLODING.run("relu", "none")
    task = run.make_task()
    network = run.make_network(task)
    own = network.layers[0].params()
    params = (
        own.input_kernel[:, 0],
        own.recurrent_kernel[:, 0],
        own.bias[0],
        network.output.kernel[...],
        network.output.bias[...],
    )

    def loss(params, batch):
        return jnp.mean((plain_network(params, batch.inputs)[1] - batch.targets) ** 2)

    with jax.default_matmul_precision("highest"):
        gradient = jax.grad(loss)(params, task.batch(0, 0, 8))
        norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in gradient))
        moved = jax.tree.map(lambda leaf, slope: leaf - run.learning_rate * slope, params, gradient)
        states, _ = plain_network(moved, task.batch(0, 1, 8).inputs)
    assert saved["gradient_norm"][0, 0] == pytest.approx(norm, rel=1e-3)
    assert saved["origin_step"][0] == 1 and saved["origin_pass"][0] == "forward" and saved["origin_layer"][0] == 0
    finite = np.isfinite(np.asarray(states)).all(axis=(1, 2))
    assert saved["origin_time"][0] == int((~finite).argmax()) > 0
    np.testing.assert_array_equal(saved["skipped"][0], [0, 1, 1, 1])
    assert not np.isfinite(saved["loss"][0, -1])


def test_clipped_gradients_stay_at_the_bound_and_nothing_is_skipped(exploding):
    saved = exploding.load_arrays(exploding_remedies.file_name("relu", "clip by global norm"))
    assert not saved["skipped"].any() and (saved["origin_step"] == -1).all()
    expected = np.minimum(saved["gradient_norm"], 1)
    np.testing.assert_allclose(saved["gradient_norm_clipped"], expected, rtol=1e-5)
    assert saved["gradient_norm"].max() > 100
    np.testing.assert_allclose(saved["log_spectral_norm"][:, 0], 50 * np.log(1.05), atol=1e-3)


def test_tables_and_figures_of_the_exploding_starts(exploding):
    for start in exploding_remedies.STARTS:
        assert [row["remedy"] for row in rows_of(exploding, f"table_{start}")] == list(EXPLODING.remedies)
        assert imread(exploding.path / f"exploding_gradient_norms_{start}.png").shape[1] == 900
    assert imread(exploding.path / "exploding_remedies.png").shape[1] == 900
    first = rows_of(exploding, "table_origins")[0]
    assert (first["remedy"], first["seed"], first["training step"], first["pass"]) == ("none", "0", "1", "forward")
    assert first["steps skipped"] == "3"


@pytest.mark.parametrize(
    ("module", "config"),
    [(vanishing_remedies, VANISHING), (exploding_remedies, EXPLODING)],
    ids=["vanishing", "exploding"],
)
def test_interrupt_keeps_the_report_of_what_is_done(
    module, config, vanishing, exploding, tmp_path, monkeypatch, capsys
):
    source = vanishing if module is vanishing_remedies else exploding
    name = "adding_00" if module is vanishing_remedies else "relu_00"
    calls = []

    def train(label, run, num_seeds):
        calls.append(label)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return source.load_arrays(name)

    monkeypatch.setattr(module, "train", train)
    workdir = Workdir.create(tmp_path / "results")
    assert module.run(config, workdir) == 130
    assert (workdir.path / f"{name}.npz").exists()
    assert len(list(workdir.path.glob("table_*.csv"))) >= 1
    assert "interrupted" in capsys.readouterr().err


NORMS = {"log_spectral_norm": [[-30, 0], [-20, -np.inf], [-25, 2]], "baseline_accuracy": 0.1}
REACHED = NORMS | {"accuracy": [[0.1, 0.9], [0.1, 0.2], [0.1, 0.7]]}


def test_remedies_for_vanishing_draw_medians_and_ranges():
    names = {f"remedy {index}": f"kind {index // 2}" for index in range(5)}
    tasks = {title: dict.fromkeys(names, REACHED) for title in ("adding problem", "language recall")}
    figure = comparison_plots.remedies_for_vanishing(tasks, names)
    norm, score, *_ = figure.axes
    dots = [line for line in norm.get_lines() if line.get_marker() == "o" and line.get_transform() == norm.transData]
    assert sorted({float(line.get_xdata()[0]) for line in dots}) == [-25, 1]
    reached = [line.get_xdata()[0] for line in score.get_lines() if line.get_marker() == "o"]
    assert reached == [0.7] * 5
    assert sum(line.get_marker() == "<" for line in norm.get_lines()) == 5
    ranges = [line.get_xdata() for line in score.get_lines() if len(line.get_xdata()) == 2 and line.get_linewidth() > 1]
    assert all(list(ends) == [0.2, 0.9] for ends in ranges) and len(ranges) == 5
    assert [text.get_text() for text in norm.get_yticklabels()] == list(names)
    assert norm.get_ylim()[0] > norm.get_ylim()[1]
    assert figure.get_supxlabel().startswith("10 −inf of 60 values")
    figure.draw_without_rendering()
    assert not overlaps(figure) and not outside(figure)


def test_gradient_norms_break_where_steps_were_skipped_and_a_cross_says_so():
    blown = {"gradient_norm": [[10.0, 1e9, np.nan, 3.0]], "gradient_norm_clipped": [[1.0, 1, 0, 1]]}
    runs = {"none": blown | {"skipped": [[0, 0, 1, 0]]}, "clip": blown | {"skipped": [[0, 0, 0, 0]]}}
    figure = comparison_plots.gradient_norms_by_remedy({**runs, **{f"remedy {i}": runs["clip"] for i in range(5)}})
    crosses = [[line for line in axes.get_lines() if line.get_marker() == "x"] for axes in figure.axes]
    assert [len(found) for found in crosses] == [1, 0, 0, 0, 0, 0, 0]
    assert (crosses[0][0].get_xdata()[0], crosses[0][0].get_ydata()[0]) == (2, 1e9)
    before = figure.axes[0].get_lines()[0].get_ydata()
    np.testing.assert_array_equal(before, [10, 1e9, np.nan, 3])
    figure.draw_without_rendering()
    assert not overlaps(figure) and not outside(figure)


def test_results_by_remedy_mark_losses_that_are_not_finite():
    good = {"loss": [[1, 0.1], [1, 0.3]], "skipped": [[0, 0], [0, 0]], "baseline_loss": 0.17}
    bad = {"loss": [[1, np.inf], [1, 0.5]], "skipped": [[0, 1], [0, 0]], "baseline_loss": 0.17}
    figure = comparison_plots.results_by_remedy({"ReLU": {"none": bad, "clip": good}, "tanh": {"none": bad}})
    loss, share, *_ = figure.axes
    crosses = [line for line in loss.get_lines() if line.get_marker() == "x"]
    assert [line.get_ydata()[0] for line in crosses] == [0]
    medians = [line.get_xdata()[0] for line in loss.get_lines() if line.get_marker() == "o"]
    np.testing.assert_allclose(medians, [0.5, 0.2])
    assert [line.get_xdata()[0] for line in share.get_lines() if line.get_marker() == "o"] == [0.25, 0]
    figure.draw_without_rendering()
    assert not overlaps(figure) and not outside(figure)


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: comparison_plots.remedies_for_vanishing({}, {}), "tasks must hold at least one"),
        (lambda: comparison_plots.remedies_for_vanishing({"adding": {"none": REACHED}}, {}), "kinds must name"),
        (
            lambda: comparison_plots.remedies_for_vanishing({"adding": {"none": NORMS}}, {"none": ""}),
            "missing: accuracy",
        ),
        (lambda: comparison_plots.gradient_norms_by_remedy({}), "runs must hold at least one"),
        (lambda: comparison_plots.results_by_remedy({"ReLU": {}}), "must hold at least one remedy"),
    ],
)
def test_bad_arrays_are_one_error(draw, said):
    with pytest.raises(ValueError, match=said):
        draw()
