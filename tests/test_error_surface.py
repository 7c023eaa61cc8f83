"""The experiment on the error surface of one unit in miniature, and its figures."""

import csv
import itertools
import json
import signal
import time

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.image import imread

from experiments import error_surface
from rnnjax import remedy_plots
from rnnjax.workdir import Workdir
from tests.command_line import start
from tests.figure_checks import outside, overlaps

pytestmark = pytest.mark.slow

CONFIG = error_surface.Config(num_updates=110, num_points=9, num_starts=3)
STEP = CONFIG.learning_rate * CONFIG.max_norm
POINTS = [(5.0, -2.5), (4.625, -2.38), (4.0, -1.95), (5.4, -2.9), (3.0, 1.0), (-6.0, 2.0)]
FIGURES = {"error_surface.png", "error_surface_descents.png"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    workdir = Workdir.create(tmp_path_factory.mktemp("surface") / "results")
    assert error_surface.run(CONFIG, workdir) == 0
    return workdir


def last_state(weight, bias, initial=0.5):
    """x_50 of x ← w / (1 + e^(−x)) + b in 200 digits."""
    with mpmath.workdps(200):
        state = mpmath.mpf(initial)
        for _ in range(50):
            state = weight / (1 + mpmath.exp(-state)) + bias
        return state


def exact_loss(weight, bias):
    with mpmath.workdps(200):
        return (last_state(weight, bias) - mpmath.mpf(0.7)) ** 2


def exact_log_jacobian(weight, bias):
    """log|dx_50/dx_0| from the difference quotient over 2e-60."""
    with mpmath.workdps(200):
        step = mpmath.mpf(10) ** -60
        high, low = (last_state(weight, bias, mpmath.mpf(0.5) + sign * step) for sign in (1, -1))
        return float(mpmath.log(abs(high - low) / (2 * step)))


def exact_gradient(weight, bias):
    """Difference quotients of the loss over 2e-20."""
    with mpmath.workdps(200):
        step = mpmath.mpf(10) ** -20
        across = exact_loss(weight + step, bias) - exact_loss(weight - step, bias)
        along = exact_loss(weight, bias + step) - exact_loss(weight, bias - step)
        return np.array([float(across / (2 * step)), float(along / (2 * step))])


def test_every_file_is_written(results):
    arrays = {f"{name}.npz" for name in ("surface", "unclipped", "clipped", "cut", "starts")}
    tables = {f"table_{name}.{suffix}" for name in ("surface", "descents", "starts") for suffix in ("txt", "csv")}
    assert {path.name for path in results.path.iterdir()} == FIGURES | arrays | tables | {"environment.json"}
    for name in FIGURES:
        assert 0 < (results.path / name).stat().st_size < 300_000
        assert imread(results.path / name).shape[1] == 900


def test_loss_and_jacobian_are_those_of_the_loop():
    with jax.enable_x64(True):
        measured = error_surface.at_points(CONFIG, jnp.array(POINTS))
    losses = [float(exact_loss(*point)) for point in POINTS]
    np.testing.assert_allclose(measured["losses"], losses, rtol=1e-9)
    np.testing.assert_allclose(measured["log_jacobians"], [exact_log_jacobian(*p) for p in POINTS], atol=1e-9)


def test_surface_and_cut_lie_where_their_axes_say(results):
    surface, cut = results.load_arrays("surface"), results.load_arrays("cut")
    assert surface["losses"].shape == surface["log_jacobians"].shape == (9, 9)
    for row, column in ((0, 0), (2, 6), (8, 1)):
        point = surface["weights"][column], surface["biases"][row]
        assert surface["losses"][row, column] == pytest.approx(float(exact_loss(*point)), rel=1e-9)
        assert surface["log_jacobians"][row, column] == pytest.approx(exact_log_jacobian(*point), abs=1e-9)
    for index in (0, 700, 2000):
        point = float(cut["weight"]), cut["biases"][index]
        assert cut["losses"][index] == pytest.approx(float(exact_loss(*point)), rel=1e-9)


@pytest.mark.parametrize("weight", [4.6, 5.0, 5.4])
def test_the_cliff_stands_where_the_initial_state_is_an_unstable_fixed_point(weight):
    """There ∂x_T/∂x_0 = (w σ'(½))^T, and a little to either side x_T tends to different fixed points."""
    sigmoid = 1 / (1 + np.exp(-0.5))
    edge = 0.5 - weight * sigmoid
    with jax.enable_x64(True):
        points = jnp.array([[weight, edge], [weight, edge - 0.03], [weight, edge + 0.03]])
        measured = {name: np.asarray(values) for name, values in error_surface.at_points(CONFIG, points).items()}
    assert measured["log_jacobians"][0] == pytest.approx(50 * np.log(weight * sigmoid * (1 - sigmoid)), abs=1e-6)
    assert measured["log_jacobians"][0] > 0
    _, below, above = measured["losses"]
    assert below - above > 4
    assert measured["log_jacobians"][1:].max() < 0


def test_gradients_at_the_cliff_are_difference_quotients(results):
    path = results.load_arrays("unclipped")
    steepest = path["gradient_norms"].argmax()
    gradient = exact_gradient(*path["points"][steepest])
    assert np.linalg.norm(gradient) > 1000
    assert path["gradient_norms"][steepest] == pytest.approx(np.linalg.norm(gradient), rel=1e-6)
    moved = path["points"][steepest + 1] - path["points"][steepest]
    np.testing.assert_allclose(moved, -CONFIG.learning_rate * gradient, rtol=1e-8)


def test_clipped_updates_follow_the_gradient_no_further_than_the_bound(results):
    path = results.load_arrays("clipped")
    lengths = np.sqrt((np.diff(path["points"], axis=0) ** 2).sum(axis=1))
    assert lengths.max() <= STEP * (1 + 1e-12)
    np.testing.assert_allclose(lengths, np.minimum(CONFIG.learning_rate * path["gradient_norms"][:-1], STEP), rtol=1e-6)
    for index in (0, 7, 109):
        gradient = exact_gradient(*path["points"][index])
        update = path["points"][index + 1] - path["points"][index]
        np.testing.assert_allclose(update / lengths[index], -gradient / np.linalg.norm(gradient), atol=1e-7)


def test_both_descents_start_alike_and_only_the_unclipped_one_is_thrown(results):
    unclipped, clipped = results.load_arrays("unclipped"), results.load_arrays("clipped")
    for path in (unclipped, clipped):
        assert path["points"].shape == (111, 2)
        np.testing.assert_array_equal(path["points"][0], [5, -2.5])
        assert path["losses"][-1] == pytest.approx(float(exact_loss(*path["points"][-1])), rel=1e-9)
    jumps = np.sqrt((np.diff(unclipped["points"], axis=0) ** 2).sum(axis=1))
    assert (jumps > 100 * STEP).sum() == 1
    assert unclipped["losses"].max() > 100 * clipped["losses"].max()
    assert unclipped["losses"][-1] > unclipped["losses"][0]


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_table_of_descents_rests_on_the_arrays(results):
    rows = rows_of(results.path / "table_descents.csv")
    assert [row["descent"] for row in rows] == ["unclipped", "clipped"]
    for row in rows:
        path = results.load_arrays(row["descent"])
        losses, steepest = path["losses"].tolist(), int(row["update"]) - 1
        assert path["gradient_norms"][steepest] == float(row["largest gradient"]) == max(path["gradient_norms"])
        assert row["start"] == "(5, −2.5)"
        assert row["end"] == "({:.4g}, {:.4g})".format(*path["points"][-1]).replace("-", "−")
        assert row["at"] == "({:.4g}, {:.4g})".format(*path["points"][steepest]).replace("-", "−")
        names = ("loss at start", "highest", "best", "at end")
        assert [float(row[name]) for name in names] == [losses[0], max(losses), min(losses), losses[-1]]
        assert int(row["above start"]) == len([value for value in losses if value > losses[0]])
        assert float(row["log|∂x_T/∂x_0|"]) == pytest.approx(exact_log_jacobian(*path["points"][steepest]), abs=1e-6)
        moves = [abs(complex(*after) - complex(*before)) for before, after in itertools.pairwise(path["points"])]
        assert float(row["largest jump"]) == pytest.approx(max(moves))
        assert row["diverged"] == ("yes" if losses[-1] > losses[0] else "no")


@pytest.mark.parametrize(("losses", "word"), [([2, 9, 1], "no"), ([2, 1, 3], "yes"), ([2, 1, np.nan], "yes")])
def test_diverged_means_an_end_above_the_start(losses, word):
    path = {"points": np.zeros((3, 2)), "gradient_norms": np.ones(3), "log_jacobians": np.ones(3)}
    assert error_surface.descent_row("clipped", path | {"losses": np.array(losses, float)})["diverged"] == word


def test_tables_of_surface_and_starts_rest_on_the_arrays(results):
    surface, starts = results.load_arrays("surface"), results.load_arrays("starts")
    (row,) = rows_of(results.path / "table_surface.csv")
    logs = surface["log_jacobians"].ravel().tolist()
    assert (float(row["largest log|∂x_T/∂x_0|"]), float(row["smallest"])) == (max(logs), min(logs))
    assert float(row["share > 0"]) == len([value for value in logs if value > 0]) / 81
    bias, weight = list(itertools.product(surface["biases"], surface["weights"]))[logs.index(max(logs))]
    assert row["at"] == f"({weight:.4g}, {bias:.4g})".replace("-", "−")
    for row in rows_of(results.path / "table_starts.csv"):
        name = row["descent"]
        jumps, highest, last = (starts[f"{name}_{key}"] for key in ("largest_jumps", "highest_losses", "end_losses"))
        assert row["starts"] == "9"
        assert float(row["thrown"]) == sum(jumps > 1) / 9
        assert float(row["largest jump"]) == sorted(jumps)[4]
        assert float(row["last loss"]) == sorted(last)[4]
        assert float(row["diverged"]) == sum(last > starts["start_losses"]) / 9
        assert float(row["highest / first loss"]) == sorted(highest / starts["start_losses"])[4]


def test_descents_from_many_starts_are_single_descents(results):
    starts = results.load_arrays("starts")
    corner, index = (5.6, -3.0), 2
    np.testing.assert_allclose(starts["starts"][index], corner)
    assert starts["start_losses"][index] == pytest.approx(float(exact_loss(*starts["starts"][index])), rel=1e-9)
    assert starts["clipped_largest_jumps"].max() <= STEP * (1 + 1e-12)
    assert starts["unclipped_largest_jumps"].max() > 10 * STEP


def test_a_descent_that_overflows_is_reported(tmp_path):
    workdir = Workdir.create(tmp_path / "results")
    config = error_surface.Config(learning_rate=1e300, num_updates=3, num_points=3, num_starts=2)
    assert error_surface.run(config, workdir) == 0
    assert [row["diverged"] for row in rows_of(workdir.path / "table_descents.csv")] == ["yes", "yes"]
    assert all((workdir.path / name).stat().st_size for name in FIGURES)


def loaded(results):
    descents = {name: results.load_arrays(name) for name in ("unclipped", "clipped")}
    return descents, results.load_arrays("surface"), results.load_arrays("cut")


def test_paths_surface_and_cut_are_drawn_as_they_are(results):
    descents, surface, cut = loaded(results)
    figure = remedy_plots.error_surface(descents, surface, cut)
    loss, jacobian, whole, _ = figure.axes
    (mesh,) = (c for c in whole.collections if isinstance(c, QuadMesh))
    np.testing.assert_array_equal(mesh.get_array(), surface["losses"])
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0].mean(), surface["weights"].mean())
    lines = {len(line.get_xdata()): line for line in whole.get_lines()}
    np.testing.assert_array_equal(lines[111].get_xydata(), descents["clipped"]["points"])
    (text,) = (text.get_text() for text in whole.texts if text.get_text())
    target = descents["unclipped"]["points"][descents["unclipped"]["gradient_norms"].argmax() + 1]
    assert text == "to ({:.4g}, {:.4g})".format(*target)
    for axes, name in ((loss, "losses"), (jacobian, "log_jacobians")):
        np.testing.assert_array_equal(axes.get_lines()[0].get_xydata(), np.transpose([cut["biases"], cut[name]]))


def test_descents_are_drawn_over_their_updates(results):
    descents, *_ = loaded(results)
    figure = remedy_plots.descent_over_updates(descents)
    for axes, name in zip(figure.axes, ("losses", "gradient_norms", "log_jacobians"), strict=True):
        drawn = [line.get_xydata() for line in axes.get_lines() if len(line.get_xdata()) == 111]
        for line, path in zip(drawn, descents.values(), strict=True):
            np.testing.assert_array_equal(line, np.transpose([1 + np.arange(111), path[name]]))


def test_nothing_overlaps_and_what_cannot_be_drawn_is_counted(results, tmp_path):
    descents, surface, cut = loaded(results)
    damaged = {name: {key: array.copy() for key, array in path.items()} for name, path in descents.items()}
    damaged["unclipped"]["losses"][3:9] = np.nan
    damaged["unclipped"]["points"][20:] = np.inf
    for runs, words in ((descents, ""), (damaged, " NaN")):
        for figure in (remedy_plots.error_surface(runs, surface, cut), remedy_plots.descent_over_updates(runs)):
            figure.savefig(tmp_path / "figure.png", dpi=100)
            assert overlaps(figure) == []
            assert outside(figure) == []
        assert words in figure.get_supxlabel()
    assert "182 +inf" in remedy_plots.error_surface(damaged, surface, cut).get_supxlabel()


def test_bad_arrays_are_named(results):
    descents, surface, cut = loaded(results)
    with pytest.raises(ValueError, match="descents must hold at least one descent"):
        remedy_plots.error_surface({}, surface, cut)
    with pytest.raises(ValueError, match="surface must hold weights, biases, losses; missing: weights"):
        remedy_plots.error_surface(descents, {"biases": [1], "losses": [[1]]}, cut)
    with pytest.raises(ValueError, match=r"surface\['losses'\] must have shape \(9, 9\), got \(9,\)"):
        remedy_plots.error_surface(descents, surface | {"losses": np.ones(9)}, cut)
    with pytest.raises(ValueError, match=r"descents\['a'\]\['points'\] must have shape \(any, 2\), got \(4, 3\)"):
        remedy_plots.descent_over_updates({"a": descents["clipped"] | {"points": np.ones((4, 3))}})
    with pytest.raises(ValueError, match=r"descents\['a'\]\['points'\] must not be empty"):
        remedy_plots.descent_over_updates({"a": descents["clipped"] | {"points": np.ones((0, 2))}})


def test_interrupted_it_says_what_is_done(tmp_path):
    workdir = tmp_path / "results"
    process = start("error_surface", "--full", "--num_updates=10000", f"--workdir={workdir}")
    deadline = time.monotonic() + 90
    while not (workdir / "unclipped.npz").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130
    assert "interrupted; parts that are done: surface, unclipped" in errors
    assert "Traceback" not in errors
    settings = json.loads((workdir / "config.json").read_text())
    assert (settings["num_points"], settings["num_updates"]) == (801, 10000)
