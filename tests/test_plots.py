"""Figures: what is drawn is the data, nothing overlaps, and what cannot be drawn is said."""

import subprocess
import sys

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.image import imread

from rnnjax import plots
from tests.figure_checks import curves, markers, outside, overlaps

FIGURES = [
    plots.spectral_norm_against_lag,
    plots.hidden_gradient_against_time,
    plots.singular_values_against_lag,
    plots.spectrum_over_training,
    plots.training_curves,
]
LABELS = ["vanilla, gain 0.5", "vanilla, gain 1", "vanilla, gain 2", "LSTM", "GRU", "minimal gated, chrono bias"]


def make_run(slope, *, layers=2, moments=3, steps=12, sequences=3, units=5, metrics=40, seed=0):
    """Arrays as a run of training writes them, whose norms change by about e^slope a step of lag."""
    rng = np.random.default_rng(seed)
    lags = np.arange(1, steps + 1)
    noise = 0.1 * rng.normal(size=(moments, layers, steps, sequences))
    spectra = slope * lags[:, None, None] * np.arange(1, units + 1)
    spectra = spectra + rng.normal(size=(2, layers, steps, sequences, units))
    norms = np.exp(rng.normal(size=metrics))
    return {
        "steps": 50 * np.arange(moments),
        "log_spectral_norms": slope * lags[:, None] + noise,
        "finite_time_exponents": slope - np.arange(4)[:, None] + rng.normal(size=(moments, layers, 4, sequences)),
        "hidden_gradient_norms": np.exp(slope * lags[::-1] + noise[..., 0]),
        "profile_lags": lags,
        "profile_initial": spectra[0],
        "profile_final": spectra[1],
        "metric_step": np.arange(metrics),
        "loss": 0.2 + rng.random(metrics),
        "gradient_norm": norms,
        "gradient_norm_clipped": np.minimum(norms, 1),
        "evaluation_step": 10 * np.arange(4),
        "evaluation_accuracy": rng.random(4),
    }


def make_runs(count=5, **sizes):
    slopes = [-6.0, -0.1, 1.0, -0.02, -0.4, 0.01]
    runs = {label: make_run(slope, **sizes) for label, slope in zip(LABELS, slopes, strict=True)}
    return dict(list(runs.items())[:count])


def make_damaged_runs():
    """Every kind of value that no axis has a place for."""
    runs = make_runs(6)
    for index, run in enumerate(runs.values()):
        for name in ("log_spectral_norms", "finite_time_exponents", "profile_final", "loss", "gradient_norm"):
            run[name].flat[:: 3 + index] = (-np.inf, np.nan, np.inf)[index % 3]
        run["hidden_gradient_norms"][..., : index + 1] = 0
        run["gradient_norm_clipped"][::7] = 0
    return runs


def make_lost_runs():
    """A run of which nothing can be drawn, beside one of which everything can."""
    lost = {name: np.full(np.shape(array), np.nan) for name, array in make_run(0.0).items()}
    lost |= {name: make_run(0.0)[name] for name in ("steps", "profile_lags", "metric_step", "evaluation_step")}
    return {"lost": lost}


def note(figure):
    return figure.get_supxlabel()


@pytest.mark.parametrize(("layer", "axis"), [(-1, 1), (0, 0)])
def test_spectral_norms_are_drawn_before_dashed_and_after_solid(layer, axis):
    runs = make_runs(3)
    figure = plots.spectral_norm_against_lag(runs, layer=layer)
    for axes, moment, dashes in zip(figure.axes, (0, 2), ("--", "-"), strict=True):
        bands = axes.collections
        for run, line, band in zip(runs.values(), curves(axes), bands, strict=True):
            norms = run["log_spectral_norms"][moment, axis]
            np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 13))
            np.testing.assert_allclose(line.get_ydata(), sum(norms.T) / 3, rtol=1e-13)
            assert line.get_linestyle() == dashes
            corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
            assert {(i + 1, pick(norms[i])) for i in range(12) for pick in (min, max)} <= corners
    assert [axes.get_title() for axes in figure.axes] == ["Before training (step 0)", "After training (step 100)"]


def test_spectral_norms_are_also_read_in_powers_of_ten():
    axes = plots.spectral_norm_against_lag(make_runs(2)).axes[-1]
    (right,) = axes.child_axes
    right.figure.draw_without_rendering()
    np.testing.assert_allclose(10.0 ** np.array(right.get_ylim()), np.exp(axes.get_ylim()), rtol=1e-10)
    assert right.yaxis.get_major_formatter()(-20.0, None) == "$10^{-20}$"


def test_line_breaks_where_a_sequence_is_not_finite():
    runs = make_runs(1)
    runs[LABELS[0]]["log_spectral_norms"][0, -1, 4, 1] = -np.inf
    runs[LABELS[0]]["log_spectral_norms"][2, -1, 7:9, 0] = np.nan
    runs[LABELS[0]]["log_spectral_norms"][1] = np.nan  # neither first nor last: not drawn, so not counted
    figure = plots.spectral_norm_against_lag(runs)
    assert [np.flatnonzero(np.isnan(curves(axes)[0].get_ydata())).tolist() for axes in figure.axes] == [[4], [7, 8]]
    assert note(figure) == "1 −inf, 2 NaN of 72 values: not drawn"
    assert note(plots.spectral_norm_against_lag(make_runs())) == ""


def test_hidden_gradients_are_drawn_and_exact_zeros_lie_at_the_lower_edge():
    runs = make_runs(2)
    runs[LABELS[1]]["hidden_gradient_norms"][0, -1, :3] = 0
    figure = plots.hidden_gradient_against_time(runs)
    for axes, moment in zip(figure.axes, (0, -1), strict=True):
        for run, line, zeros in zip(runs.values(), curves(axes), markers(axes), strict=True):
            norms = run["hidden_gradient_norms"][moment, -1]
            np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 13))
            np.testing.assert_array_equal(line.get_ydata(), np.where(norms == 0, np.nan, norms))
            np.testing.assert_array_equal(zeros.get_xdata(), 1 + np.flatnonzero(norms == 0))
    marker_heights = figure.axes[0].transAxes.transform([(0, y) for y in markers(figure.axes[0])[1].get_ydata()])
    lowest = min(run["hidden_gradient_norms"][run["hidden_gradient_norms"] > 0].min() for run in runs.values())
    assert marker_heights[:, 1].max() < figure.axes[0].transData.transform((1, lowest))[1]
    assert "exactly 0" in note(figure)
    assert note(plots.hidden_gradient_against_time(make_runs())) == ""


def test_singular_values_are_all_drawn_and_lost_ranks_counted():
    runs = make_runs(2)
    runs[LABELS[1]]["profile_final"][-1, 6:, :, 3:] = -np.inf
    figure = plots.singular_values_against_lag(runs)
    for axes, run in zip(figure.axes, runs.values(), strict=True):
        lines = curves(axes)
        for name, drawn in (("profile_initial", lines[:5]), ("profile_final", lines[5:])):
            expected = sum(run[name][-1].swapaxes(0, 1)) / 3
            expected[np.isinf(expected)] = np.nan
            np.testing.assert_allclose([line.get_ydata() for line in drawn], expected.T, rtol=1e-13)
        assert len(lines) == 10
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [LABELS[0], f"{LABELS[1]}\n36 −inf of 360 values: not drawn"]


def test_heat_maps_show_the_means_on_one_scale_centred_at_zero():
    runs = make_runs(3)
    runs[LABELS[2]]["log_spectral_norms"][1, -1, 4, 0] = np.nan
    figure = plots.spectrum_over_training(runs)
    meshes = [mesh for axes in figure.axes[:6] for mesh in axes.collections if isinstance(mesh, QuadMesh)]
    names = ["log_spectral_norms"] * 3 + ["finite_time_exponents"] * 3
    for mesh, name, run in zip(meshes, names, [*runs.values()] * 2, strict=True):
        expected = np.ma.masked_invalid(run[name][:, -1].mean(-1).T)
        np.testing.assert_array_equal(mesh.get_array().mask, expected.mask)
        np.testing.assert_array_equal(mesh.get_array().filled(0), expected.filled(0))
        np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], [-25, 25, 75, 125])
        np.testing.assert_array_equal(mesh.get_coordinates()[:, 0, 1], 0.5 + np.arange(len(expected) + 1))
        largest = max(np.nanmax(np.abs(other[name][:, -1].mean(-1))) for other in runs.values())
        assert mesh.norm(0.0) == pytest.approx(0.5)
        assert mesh.norm.vmin == -mesh.norm.vmax
        assert mesh.norm.vmax == pytest.approx(largest)
    assert len({id(mesh.norm) for mesh in meshes}) == 2
    assert [axes.get_ylabel() for axes in figure.axes[6:]] == [
        "log spectral norm\n(nats)",
        "finite-time exponent\n(nats per step)",
    ]
    assert note(figure) == "1 NaN of 432 values: in grey"


def test_cells_of_uneven_steps_meet_halfway():
    run = make_run(0.1, layers=1) | {"steps": [0, 10, 40]}
    mesh = plots.spectrum_over_training({"GRU": run}).axes[0].collections[0]
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], [-5, 5, 25, 55])


def test_training_curves_are_the_metrics():
    runs = make_runs(3)
    runs[LABELS[0]]["gradient_norm"][:5] = np.inf
    runs[LABELS[0]]["gradient_norm_clipped"][:5] = 0
    figure = plots.training_curves(runs)
    names = ("loss", "evaluation_accuracy", "gradient_norm", "gradient_norm_clipped")
    for axes, name, scale in zip(figure.axes, names, (1, 100, 1, 1), strict=True):
        for run, line in zip(runs.values(), curves(axes), strict=True):
            expected = np.where(np.isfinite(run[name]) & (run[name] > 0), scale * run[name], np.nan)
            np.testing.assert_array_equal(line.get_ydata(), expected)
            steps = run["evaluation_step" if "evaluation" in name else "metric_step"]
            np.testing.assert_array_equal(line.get_xdata(), steps)
    assert note(figure) == "Markers at the lower edge: exactly 0.  5 +inf of 360 values: not drawn"
    assert figure.axes[2].get_ylim() == figure.axes[3].get_ylim()


def test_labels_carry_units():
    labels = [axes.get_ylabel() + axes.get_xlabel() for plot in FIGURES[:3] for axes in plot(make_runs(1)).axes[:1]]
    assert ["(nats)" in labels[0], "(loss per unit" in labels[1], "(nats)" in labels[2]] == [True] * 3
    assert ["lag (steps)" in labels[0], "time step" in labels[1], "lag (steps)" in labels[2]] == [True] * 3


def test_a_run_of_one_monitored_step_is_not_shown_as_trained():
    single, several = make_run(-0.1, moments=1), make_run(0.1)
    for plot in FIGURES[:2]:
        assert [axes.get_title() for axes in plot({"a": single}).axes] == ["Before training (step 0)"]
        assert [len(curves(axes)) for axes in plot({"a": single, "b": several}).axes] == [2, 1]
    late = make_run(0.1) | {"steps": [10, 20, 30]}
    titles = [axes.get_title() for axes in plots.hidden_gradient_against_time({"a": late, "b": several}).axes]
    assert titles == ["First monitored step (step 0–10)", "After training (step 30–100)"]


def test_runs_differ_in_colour_and_in_marker_and_the_legend_keeps_their_order():
    for plot in FIGURES[:2] + FIGURES[4:]:
        figure = plot(make_runs(6))
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == LABELS
        keys = legend.get_lines()
        drawn = curves(figure.axes[0])
        assert len({line.get_color() for line in drawn}) == len({line.get_marker() for line in drawn}) == 6
        for key, line in zip(keys, drawn, strict=True):
            assert (key.get_color(), key.get_marker()) == (line.get_color(), line.get_marker())


CASES = {
    "five runs": make_runs,
    "one run": lambda: make_runs(1),
    "six runs, damaged": make_damaged_runs,
    "nothing finite": make_lost_runs,
    "one of everything": lambda: make_runs(1, moments=1, steps=1, sequences=1, units=1, layers=1, metrics=1),
    "no metrics yet": lambda: make_runs(2, metrics=0),
}


@pytest.mark.parametrize("plot", FIGURES)
@pytest.mark.parametrize("case", CASES)
def test_every_case_is_written_small_and_without_overlaps(case, plot, tmp_path):
    figure = plot(CASES[case]())
    plots.save_figure(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size < 300_000
    assert imread(tmp_path / "figure.png").shape[1] == 900
    assert overlaps(figure) == []
    assert outside(figure) == []


@pytest.mark.parametrize("plot", FIGURES[:3])
def test_region_names_are_not_covered_by_lines_that_start_at_norm_one(plot):
    figure = plot({"exploding": make_run(2.0), "vanishing": make_run(-9.0)})
    figure.draw_without_rendering()
    for axes in figure.axes:
        for text in axes.texts:
            box = axes.transData.inverted().transform(text.get_window_extent())
            for line in curves(axes):
                x, y = line.get_xdata(), line.get_ydata()
                assert not np.any((x < box[1, 0]) & (y > box[0, 1]) & (y < box[1, 1]))


def test_bad_input_is_named():
    runs = make_runs(2)
    del runs[LABELS[1]]["steps"], runs[LABELS[1]]["hidden_gradient_norms"]
    with pytest.raises(ValueError, match=r"runs\['vanilla, gain 1'\] must hold .*; missing: steps, hidden_gradient_n"):
        plots.hidden_gradient_against_time(runs)
    with pytest.raises(ValueError, match="runs must hold at least one run"):
        plots.training_curves({})
    with pytest.raises(ValueError, match=r"layer must be an index into the 2 layers of .*, got 2"):
        plots.spectrum_over_training(make_runs(1), layer=2)
    with pytest.raises(ValueError, match=r"'log_spectral_norms'\] must have shape \(3, any, any, any\), got \(3, 12\)"):
        plots.spectral_norm_against_lag({"a": make_run(0.0) | {"log_spectral_norms": np.zeros((3, 12))}})
    with pytest.raises(ValueError, match=r"'loss'\] must have shape \(40\), got \(39,\)"):
        plots.training_curves({"a": make_run(0.0) | {"loss": np.ones(39)}})
    with pytest.raises(ValueError, match=r"'steps'\] must not be empty, got shape \(0,\)"):
        plots.spectral_norm_against_lag({"a": make_run(0.0, moments=0)})


def test_save_figure_takes_png_alone(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.png, got 'figure\.svg'"):
        plots.save_figure(plots.training_curves(make_runs(1)), "figure.svg")
    with pytest.raises(FileNotFoundError):
        plots.save_figure(plots.training_curves(make_runs(1)), tmp_path / "missing" / "figure.png")


def test_many_singular_values_stay_a_small_file(tmp_path):
    plots.save_figure(plots.singular_values_against_lag(make_runs(6, steps=64, units=64)), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size < 300_000


def test_ticks_of_steps_and_lags_are_whole_numbers():
    for plot in FIGURES:
        axes = plot(make_runs(1, moments=1, steps=1, sequences=1, units=1, layers=1, metrics=1)).axes[0]
        axes.figure.draw_without_rendering()
        assert {float(tick) % 1 for tick in axes.get_xticks()} == {0.0}
    heat_map = plots.spectrum_over_training(make_runs(1, steps=2)).axes[0]
    assert {float(tick) % 1 for tick in heat_map.get_yticks()} == {0.0}


def test_colours_survive_the_palette(tmp_path):
    plots.save_figure(plots.spectral_norm_against_lag(make_runs()), tmp_path / "figure.png")
    pixels = imread(tmp_path / "figure.png")[..., :3].reshape(-1, 3)
    for line in curves(plots.spectral_norm_against_lag(make_runs()).axes[0]):
        wanted = matplotlib.colors.to_rgb(line.get_color())
        assert np.abs(pixels - np.array(wanted)[None]).max(-1).min() < 0.02


def test_missing_matplotlib_is_said_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"rnnjax\[experiments\]"):
        plots.training_curves(make_runs(1))


def test_matplotlib_is_imported_when_a_figure_is_made_and_pyplot_never(tmp_path):
    script = """
import sys
import numpy as np
from rnnjax import plots
assert "matplotlib" not in sys.modules
run = {"steps": [0], "hidden_gradient_norms": np.ones([1, 1, 8])}
plots.save_figure(plots.hidden_gradient_against_time({"GRU": run}), sys.argv[1])
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, tmp_path / "figure.png"], check=True)
