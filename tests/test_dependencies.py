"""The experiments on long-term dependencies and on temporal order in miniature, and their figures."""

import csv
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from matplotlib.image import imread

from experiments import long_term_dependency, temporal_order
from rnnjax import dependency_plots
from rnnjax.configuration import RunConfig
from rnnjax.workdir import Workdir
from tests.figure_checks import curves, outside, overlaps

pytestmark = pytest.mark.slow

MINIATURE = {"hidden_size": 5, "steps": 4, "batch_size": 4, "evaluate_every": 2}
DISTANCES = (5, 8)
NAMES = ("vanilla", "GRU, chrono")
RECALL = long_term_dependency.Config(RunConfig(task="language_recall", **MINIATURE), DISTANCES, 2, share_distance=8)
STARTS = ("small", "critical")
ORDER = temporal_order.Config(RunConfig(task="temporal_order", optimizer="sgd", **MINIATURE), (10,), 3, STARTS)


@pytest.fixture(scope="module", autouse=True)
def _promotion_as_optax_needs_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def recall(tmp_path_factory):
    workdir = Workdir.create(tmp_path_factory.mktemp("recall") / "results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_term_dependency, "NETWORKS", {n: long_term_dependency.NETWORKS[n] for n in NAMES})
        assert long_term_dependency.run(RECALL, workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def order(tmp_path_factory):
    workdir = Workdir.create(tmp_path_factory.mktemp("order") / "results")
    assert temporal_order.run(ORDER, workdir) == 0
    return workdir


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def names_in(workdir):
    return {path.name for path in workdir.path.iterdir()}


def tables(*names):
    return {f"{name}.{suffix}" for name in names for suffix in ("txt", "csv")}


def test_every_file_is_written(recall, order):
    figures = {"accuracy_against_distance.png", "gradient_share_by_lag.png"}
    arrays = {f"{name}_{distance}.npz" for name in ("vanilla", "gru_chrono") for distance in DISTANCES}
    written = tables("table_runs", "table_accuracy", "table_shares") | {"environment.json"}
    assert names_in(recall) == figures | arrays | written
    methods = ("sgd", "sgd_clipped", "sgd_clipped_penalty")
    arrays = {f"{start}_{method}_10.npz" for start in STARTS for method in methods}
    assert names_in(order) == {"success_against_length.png", "environment.json"} | arrays | tables("table")
    for path in (*recall.path.glob("*.png"), *order.path.glob("*.png")):
        assert 0 < path.stat().st_size < 300_000
        assert imread(path).shape[1] == 900


def test_networks_differ_in_what_their_names_say():
    configs = {name: long_term_dependency.network_config(RECALL, name, 8) for name in long_term_dependency.NETWORKS}
    cells = {name: config.make_cell() for name, config in configs.items()}
    assert cells["LSTM, chrono"].forget_bias.longest == cells["GRU, chrono"].forget_bias.longest == 13
    assert (cells["LSTM"].forget_bias, cells["GRU"].forget_bias) == (1.0, 0.0)
    assert cells["vanilla, skip"].span == 2
    network = configs["vanilla"].make_network(configs["vanilla"].make_task())
    weights = np.asarray(network.layers[0].recurrent_kernel[...])
    assert 0.8 / math.sqrt(5) < np.abs(weights).max() <= 1 / math.sqrt(5)
    network = configs["vanilla, orthogonal"].make_network(configs["vanilla"].make_task())
    weights = np.asarray(network.layers[0].recurrent_kernel[...])[:, 0]
    np.testing.assert_allclose(weights.T @ weights, np.eye(5), atol=1e-6)


def gradient_from_the_last_steps(network, task, batch, count):
    """dL/dθ of a tanh layer written as a loop, of its last ``count`` steps alone."""
    features = network.embedding(batch.inputs)

    def loss(weights):
        state = jnp.zeros(features.shape[1:])
        for step, inputs in enumerate(features):
            held = step < len(features) - count
            kernel, recurrent, bias = jax.lax.stop_gradient(weights) if held else weights
            state = jnp.tanh(inputs @ kernel + state @ recurrent + bias[None])
        return task.loss(network.output(state), batch)

    params = network.layers[0].params()
    weights = (params.input_kernel[:, 0], params.recurrent_kernel[:, 0], params.bias[0])
    return np.concatenate([np.ravel(leaf) for leaf in jax.grad(loss)(weights)])


def test_shares_are_those_of_backpropagation_cut_short(recall):
    config = long_term_dependency.network_config(RECALL, "vanilla", 8)
    task = config.make_task()
    network = config.make_network(task)
    batch = task.evaluation_batch(config.seed)
    whole = gradient_from_the_last_steps(network, task, batch, 13)
    share = recall.load_arrays("vanilla_8")["before"][0]
    assert share.shape == (13,)
    for count in (1, 4, 9):
        part = gradient_from_the_last_steps(network, task, batch, count)
        assert share[:count].sum() == pytest.approx(part @ whole / (whole @ whole), abs=1e-5)


def test_shares_sum_to_one_and_change_in_training(recall):
    for name in ("vanilla_8", "gru_chrono_8"):
        arrays = recall.load_arrays(name)
        for moment in ("before", "after"):
            np.testing.assert_allclose(arrays[moment].sum(axis=1), 1, atol=1e-5)
        assert np.abs(arrays["before"] - arrays["after"]).max() > 1e-4
    assert "before" not in recall.load_arrays("vanilla_5")


def test_tables_of_recall_rest_on_the_arrays(recall):
    rows = {(row["network"], int(row["distance"])): row for row in rows_of(recall.path / "table_runs.csv")}
    wide = {row["network"]: row for row in rows_of(recall.path / "table_accuracy.csv")}
    assert list(rows) == [(name, distance) for name in NAMES for distance in DISTANCES]
    for (name, distance), row in rows.items():
        arrays = recall.load_arrays(f"{name.lower().replace(', ', '_')}_{distance}")
        assert arrays["evaluation_steps"].tolist() == [2, 4]
        last = sorted(float(value) for value in arrays["held_out_accuracy"][:, 1])
        assert [float(row[key]) for key in ("lowest", "highest")] == pytest.approx(last)
        assert float(row["accuracy"]) == pytest.approx(sum(last) / 2)
        assert (row["seeds that solve"], row["median steps to solve"], row["skipped steps"]) == ("0", "inf", "0")
        text = f"{50 * sum(last):.0f} ({100 * last[0]:.0f}–{100 * last[1]:.0f})"
        assert wide[name][f"{distance} words"] == text
    for row in rows_of(recall.path / "table_shares.csv"):
        arrays = recall.load_arrays(f"{row['network'].lower().replace(', ', '_')}_8")
        for moment in ("before", "after"):
            shares = arrays[moment].tolist()
            assert float(row[f"{moment}: lag < 1"]) == pytest.approx((shares[0][0] + shares[1][0]) / 2)
            assert float(row[f"{moment}: lag ≥ 8"]) == pytest.approx(sum(shares[0][8:] + shares[1][8:]) / 2)


def test_a_network_that_learned_nothing_is_spared_longer_distances(tmp_path):
    workdir, config = Workdir.create(tmp_path / "results"), long_term_dependency.Config(share_distance=20)
    for name, distance, accuracy in (("GRU", 10, 0.05), ("GRU", 20, 0.11), ("LSTM", 10, 0.05), ("LSTM", 20, 0.13)):
        arrays = {"held_out_accuracy": np.array([[0.9, accuracy]])}
        workdir.save_arrays(long_term_dependency.array_name(name, distance), **arrays)
    for name, distance, worth in (("GRU", 20, True), ("GRU", 50, False), ("LSTM", 50, True), ("vanilla", 50, True)):
        assert long_term_dependency.worth_training(config, workdir, name, distance) == worth


def test_horizon_gathers_nine_tenths():
    share = np.zeros((1, 13))
    share[0, [0, 8, 10]] = 0.25, 0.6, 0.15
    row = long_term_dependency.share_row(RECALL, "GRU", {"before": share, "after": np.full((1, 13), np.nan)})
    assert (row["before: lag < 1"], row["before: lag ≥ 8"], row["before: horizon"]) == pytest.approx((0.25, 0.75, 10))
    assert math.isnan(row["after: horizon"])


def test_table_of_temporal_order_rests_on_the_arrays(order):
    rows = rows_of(order.path / "table.csv")
    assert [(row["initialisation"], row["method"]) for row in rows] == [
        (start, method) for start in STARTS for method in temporal_order.METHODS
    ]
    for row in rows:
        name = temporal_order.array_name(row["initialisation"], row["method"], 10)
        arrays = order.load_arrays(name)
        assert (row["successes"], row["seeds"], row["median steps"], row["skipped"]) == ("0", "3", "", "0")
        last = arrays["held_out_accuracy"][:, 1].tolist()
        assert float(row["last accuracy"]) == pytest.approx(sum(last) / 3)
        assert float(row["largest gradient"]) == pytest.approx(sorted(arrays["largest_gradient"])[1])


def test_only_clipped_methods_clip_and_only_the_penalty_adds_to_the_gradient(order):
    norms = {}
    for method in temporal_order.METHODS:
        arrays = order.load_arrays(temporal_order.array_name("critical", method, 10))
        norms[method] = arrays["largest_gradient"]
        assert (arrays["clipped"] > 0).any() == (method != "SGD" and (norms[method] > 1).any())
    assert np.abs(norms["SGD, clipped, Ω"] - norms["SGD, clipped"]).min() > 1e-3


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (5, 5), (3, 10), (1, 1), (49, 50)])
def test_intervals_are_those_of_scipy(successes, trials):
    interval = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert temporal_order.success_interval(successes, trials) == pytest.approx((interval.low, interval.high), abs=1e-9)


def test_successes_are_counted():
    arrays = {
        "steps_to_solve": np.array([100.0, np.nan, 300.0]),
        "held_out_accuracy": np.array([[1.0, 0.5], [0.2, 0.2], [0.3, 1.0]]),
        "clipped": np.array([0.5, 0.0, 1.0]),
        "largest_gradient": np.array([1.0, 9.0, 2.0]),
        "skipped": np.array([0, 2, 0]),
    }
    row = temporal_order.row("small", "SGD", 20, arrays)
    assert (row["successes"], row["seeds"], row["median steps"], row["skipped"]) == (2, 3, 200.0, 2)
    assert (row["rate"], row["last accuracy"]) == pytest.approx((2 / 3, 1.7 / 3))


@pytest.mark.parametrize(
    ("experiment", "config"), [(long_term_dependency, RECALL), (temporal_order, ORDER)], ids=["recall", "order"]
)
def test_interrupted_it_reports_what_is_done(experiment, config, tmp_path, capsys, monkeypatch):
    done = []

    def train_two(config, workdir, *arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(experiment.array_name(*arguments))
        arrays = {name: np.ones(2) for name in ("steps_to_solve", "clipped", "largest_gradient", "skipped")}
        workdir.save_arrays(done[-1], held_out_accuracy=np.ones((2, 1)), seconds=1.0, **arrays)

    monkeypatch.setattr(experiment, "train", train_two)
    workdir = Workdir.create(tmp_path / "results")
    assert experiment.run(config, workdir) == 130
    assert "interrupted" in capsys.readouterr().err
    assert {path.stem for path in workdir.path.glob("*.npz")} == set(done)
    assert len(list(workdir.path.glob("*.png"))) == 1


def recall_figures(recall):
    results = {name: long_term_dependency.saved(RECALL, recall, name) for name in NAMES}
    accuracies = {name: long_term_dependency.accuracy_arrays(found) for name, found in results.items()}
    return accuracies, {name: found[8] for name, found in results.items()}


def test_accuracies_and_shares_are_drawn_as_they_are(recall):
    accuracies, shares = recall_figures(recall)
    (axes,) = dependency_plots.accuracy_against_distance(accuracies, 0.0625).axes
    for bars, run in zip(axes.containers, accuracies.values(), strict=True):
        line, _, (ranges,) = bars
        np.testing.assert_allclose(line.get_xdata(), DISTANCES, rtol=0.05)
        np.testing.assert_allclose(line.get_ydata(), np.mean(run["accuracies"], axis=1))
        ends = np.array([segment[:, 1] for segment in ranges.get_segments()])
        np.testing.assert_allclose(ends, np.sort(run["accuracies"], axis=1), atol=1e-6)
    before, after, *gathered = dependency_plots.gradient_share_by_lag(shares, 8).axes
    for axes, total, moment in ((before, gathered[0], "before"), (after, gathered[1], "after")):
        for line, sums, run in zip(curves(axes), curves(total), shares.values(), strict=True):
            np.testing.assert_allclose(line.get_xydata(), np.transpose([np.arange(13), run[moment].mean(axis=0)]))
            assert sums.get_ydata()[-1] == pytest.approx(1, abs=1e-5)


def test_rates_and_intervals_are_drawn_as_they_are():
    run = {"lengths": [10, 20, 40], "rates": [1.0, 0.5, 0.0], "lowest": [0.7, 0.2, 0.0], "highest": [1.0, 0.8, 0.3]}
    figure = dependency_plots.success_against_length({"small": {"SGD": run}, "critical": {"SGD": run, "Ω": run}})
    assert [len(curves(axes)) for axes in figure.axes] == [1, 2]
    for axes in figure.axes:
        np.testing.assert_allclose(curves(axes)[0].get_xydata(), np.transpose([run["lengths"], run["rates"]]))
        corners = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices.round(9).tolist()}
        assert corners >= {
            (x, y) for key in ("lowest", "highest") for x, y in zip(run["lengths"], run[key], strict=True)
        }


def test_nothing_overlaps_and_what_cannot_be_drawn_is_counted(recall, order, tmp_path):
    accuracies, shares = recall_figures(recall)
    many = dict.fromkeys(long_term_dependency.NETWORKS, accuracies["vanilla"])
    lost = {name: shares["vanilla"] | {"after": np.full((2, 13), np.nan)} for name in long_term_dependency.NETWORKS}
    rows = [
        temporal_order.row(start, method, 10, order.load_arrays(temporal_order.array_name(start, method, 10)))
        for start in STARTS
        for method in temporal_order.METHODS
    ]
    figures = [
        dependency_plots.accuracy_against_distance(many, 0.06),
        dependency_plots.gradient_share_by_lag(shares, 8),
        dependency_plots.gradient_share_by_lag(lost, 8),
        dependency_plots.success_against_length(temporal_order.panels(rows)),
    ]
    for figure in figures:
        figure.savefig(tmp_path / "figure.png", dpi=100)
        assert overlaps(figure) == []
        assert outside(figure) == []
    assert "182 NaN of 364" in figures[2].get_supxlabel()


def test_bad_arrays_are_named():
    run = {"distances": [5, 8], "accuracies": [[1, 1], [0, 1]]}
    with pytest.raises(ValueError, match="runs must hold at least one run, got none"):
        dependency_plots.accuracy_against_distance({}, 0.1)
    with pytest.raises(ValueError, match=r"runs\['a'\] must hold before, after; missing: after"):
        dependency_plots.gradient_share_by_lag({"a": {"before": [[1]]}}, 8)
    with pytest.raises(ValueError, match=r"runs\['a'\]\['accuracies'\] must have shape \(2, any\), got \(1, 2\)"):
        dependency_plots.accuracy_against_distance({"a": run | {"accuracies": [[1, 1]]}}, 0.1)
    with pytest.raises(ValueError, match=r"runs\['a'\]\['distances'\] must not be empty, got shape \(0,\)"):
        dependency_plots.accuracy_against_distance({"a": run | {"distances": []}}, 0.1)
    with pytest.raises(ValueError, match="panels must hold at least one group of runs, got none"):
        dependency_plots.success_against_length({})
