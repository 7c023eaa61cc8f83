"""Figures of exponents beside theory: what is drawn is the data, nothing overlaps, and what cannot be drawn is said."""

import itertools

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgba
from matplotlib.contour import ContourSet
from matplotlib.image import imread

from rnnjax import plots, spectral_plots
from tests.figure_checks import curves, markers, outside, overlaps

FIGURES = [
    spectral_plots.largest_exponent_against_gain,
    spectral_plots.spectrum_against_theory,
    spectral_plots.largest_exponent_of_gates,
    spectral_plots.singular_values_against_exponents,
]


def make_run(seed, *, gains=5, networks=3, units=40, biases=6, lengths=7, values=4):
    rng = np.random.default_rng(seed)
    slopes = np.log(2.0 ** np.arange(gains))[:, None] - np.arange(biases)[::-1] / 2
    return {
        "gains": 0.5 + np.arange(gains),
        "largest_exponents": np.log(0.5 + np.arange(gains))[:, None] + 0.1 * rng.normal(size=(gains, networks)),
        "theory_largest_exponents": np.log(0.5 + np.arange(gains)),
        "spectrum_gains": 1.5 + 2 * np.arange(2),
        "exponents": -(np.sort(rng.random((2, networks, units)), axis=-1) ** 2),
        "theory_exponents": -np.sort(rng.random((2, units)), axis=-1),
        "gated_gains": 2.0 ** np.arange(gains),
        "forget_biases": np.arange(biases) - 2.0,
        "critical_gains": 1 + rng.random(biases),
        "autonomous_exponents": slopes[..., None] + np.array([-0.2, 0.0, 0.2])[np.arange(networks) % 3],
        "driven_exponents": rng.normal(size=(gains, biases, networks)),
        "product_lengths": 2 ** np.arange(lengths),
        "log_singular_values": -np.sort(rng.normal(size=(lengths, values)), axis=-1),
        "qr_sums": -np.sort(rng.normal(size=(lengths, values)), axis=-1),
        "product_exponents": -np.arange(values) / 2,
    }


def make_runs(**sizes):
    runs = {"tanh": make_run(0, **sizes), "leaky, leak 0.5": make_run(1, **sizes)}
    runs["tanh"]["exact_log_singular_values"] = runs["tanh"]["log_singular_values"] + 0.5
    return runs


def make_damaged_runs():
    runs = make_runs()
    names = ("largest_exponents", "exponents", "autonomous_exponents", "driven_exponents", "log_singular_values")
    for run, name in itertools.product(runs.values(), names):
        run[name].flat[::4] = np.nan
        run[name].flat[1::7] = -np.inf
    return runs


def make_lost_runs():
    axes = ("gains", "spectrum_gains", "gated_gains", "forget_biases", "product_lengths")
    run = make_run(0)
    return {"lost": {name: array if name in axes else np.full(array.shape, np.nan) for name, array in run.items()}}


def test_largest_exponents_are_means_with_deviations_over_the_theory():
    runs = make_runs()
    whole, difference = spectral_plots.largest_exponent_against_gain(runs).axes
    for index, run in enumerate(runs.values()):
        gains, measured, theory = run["gains"], run["largest_exponents"], run["theory_largest_exponents"]
        np.testing.assert_array_equal(curves(whole)[index].get_ydata(), theory)
        for axes, offset in ((whole, 0 * theory), (difference, theory)):
            points, _, (bars,) = axes.containers[index]
            middle = sum(measured.T) / 3 - offset
            np.testing.assert_array_equal(points.get_xdata(), gains)
            np.testing.assert_allclose(points.get_ydata(), middle, atol=1e-12)
            lengths = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
            deviation = np.sqrt(((measured - measured.mean(1)[:, None]) ** 2).sum(1) / 2)
            np.testing.assert_allclose(lengths, 2 * deviation, rtol=1e-10)
    assert points.get_color() != axes.containers[0][0].get_color()


def test_spectra_are_means_and_bands_over_the_theory_and_below_their_first_quarter():
    runs = make_runs()
    grid = np.array(spectral_plots.spectrum_against_theory(runs).axes).reshape(2, 2)
    for column, run in zip(grid.T, runs.values(), strict=True):
        for axes, count in zip(column, (40, 10), strict=True):
            for index, measured in enumerate(run["exponents"]):
                points, line, band = markers(axes)[index], curves(axes)[index], axes.collections[index]
                np.testing.assert_allclose(points.get_xdata(), (np.arange(count) + 0.5) / 40)
                np.testing.assert_allclose(points.get_ydata(), sum(measured)[:count] / 3)
                np.testing.assert_array_equal(line.get_ydata(), run["theory_exponents"][index, :count])
                corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
                share = points.get_xdata()
                expected = {(share[i], pick(measured[:, i])) for i in range(count) for pick in (min, max)}
                assert expected <= corners
                assert line.get_color() == points.get_color()


def test_one_gain_has_one_colour_in_every_column():
    runs = make_runs()
    runs["leaky, leak 0.5"]["spectrum_gains"] = np.array([3.5, 5.5])
    figure = spectral_plots.spectrum_against_theory(runs)
    first, second = (markers(axes) for axes in figure.axes[:2])
    assert first[1].get_color() == second[0].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"gain $g$ = {g}" for g in (1.5, 3.5, 5.5)]


def test_heat_maps_are_means_on_one_scale_that_is_symmetric_about_zero():
    runs = make_runs()
    runs["tanh"]["driven_exponents"][1, 2, 0] = np.nan
    figure = spectral_plots.largest_exponent_of_gates(runs)
    meshes = [next(c for c in axes.collections if isinstance(c, QuadMesh)) for axes in figure.axes[:4]]
    drawn = [run[name] for name in ("autonomous_exponents", "driven_exponents") for run in runs.values()]
    for mesh, values in zip(meshes, drawn, strict=True):
        expected = np.ma.masked_invalid(values.sum(-1) / 3)
        np.testing.assert_array_equal(np.ma.getmaskarray(mesh.get_array()), np.ma.getmaskarray(expected))
        np.testing.assert_allclose(mesh.get_array().filled(0), expected.filled(0), atol=1e-12)
        assert mesh.norm.vmax == -mesh.norm.vmin == max(np.nanmax(np.abs(array.mean(-1))) for array in drawn)
        assert mesh.norm(0.0) == pytest.approx(0.5)
    assert figure.get_supxlabel() == "1 NaN of 360 values: in grey"
    np.testing.assert_allclose(mesh.get_coordinates()[:, 0, 1], np.arange(6) - 0.5)
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], np.arange(7) - 2.5)
    assert [figure.axes[0].yaxis.get_major_formatter()(power, None) for power in (-3, 1)] == ["0.125", "2"]


def test_the_contour_is_where_the_exponent_is_zero():
    """The mean is ln(gain) − (3 − bias)/2: linear in what the axes show, so the contour finds its zeros exactly."""
    axes = spectral_plots.largest_exponent_of_gates(make_runs(biases=6)).axes[0]
    (contour,) = (c for c in axes.collections if isinstance(c, ContourSet))
    bias, gain = np.concatenate([path.vertices for path in contour.get_paths()]).T
    np.testing.assert_allclose(np.log(2) * gain, (3 - bias) / 2, atol=1e-9)
    assert len(gain) > 4


def test_the_critical_gain_is_drawn_without_input_only_and_makes_no_room_for_itself():
    runs = make_runs()
    runs["tanh"]["critical_gains"] = np.geomspace(1e-6, 4, 6)
    figure = spectral_plots.largest_exponent_of_gates(runs)
    for axes, run in zip(figure.axes[:2], runs.values(), strict=True):
        (line,) = axes.get_lines()
        np.testing.assert_allclose(2.0 ** line.get_ydata(), run["critical_gains"])
        assert axes.get_ylim() == (-0.5, 4.5)
    assert [len(axes.get_lines()) for axes in figure.axes[2:4]] == [0, 0]


def test_growth_per_step_and_the_difference_in_nats():
    runs = make_runs()
    grid = np.array(spectral_plots.singular_values_against_exponents(runs).axes).reshape(2, 2)
    for (rate, difference), run in zip(grid.T, runs.values(), strict=True):
        lengths, values, sums = run["product_lengths"], run["log_singular_values"], run["qr_sums"]
        circles = [line for line in markers(rate) if line.get_marker() == "o"]
        crosses = [line for line in markers(rate) if line.get_marker() == "x"]
        for index in range(4):
            np.testing.assert_allclose(circles[index].get_ydata(), values[:, index] / lengths)
            np.testing.assert_allclose(crosses[index].get_ydata(), sums[:, index] / lengths)
            np.testing.assert_allclose(markers(difference)[index].get_ydata(), values[:, index] - sums[:, index])
            assert circles[index].get_color() == crosses[index].get_color()
        horizontal = [line.get_ydata()[0] for line in rate.get_lines() if len(line.get_xdata()) == 2]
        np.testing.assert_array_equal(horizontal, run["product_exponents"])
    exact = runs["tanh"]["exact_log_singular_values"] / runs["tanh"]["product_lengths"][:, None]
    np.testing.assert_allclose([line.get_ydata() for line in curves(grid[0, 0])], exact.T)
    assert curves(grid[0, 1]) == []


def test_the_legend_names_a_closed_form_only_where_there_is_one():
    runs = make_runs()
    names = [
        [text.get_text() for text in plot.legends[0].get_texts()]
        for plot in map(spectral_plots.singular_values_against_exponents, (runs, {"leaky": make_run(0)}))
    ]
    assert ["closed form" in words for words in names] == [True, False]


CASES = {
    "two runs": make_runs,
    "one run": lambda: {"GRU": make_run(2)},
    "damaged": make_damaged_runs,
    "nothing finite": make_lost_runs,
    "one of everything": lambda: {"a": make_run(0, gains=1, networks=1, units=1, biases=1, lengths=1, values=1)},
    "many": lambda: make_runs(gains=30, networks=20, units=300, biases=30, lengths=20, values=8),
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


@pytest.mark.parametrize("plot", FIGURES)
def test_what_cannot_be_drawn_is_counted(plot):
    assert " NaN" in plot(make_damaged_runs()).get_supxlabel()
    assert " −inf" in plot(make_damaged_runs()).get_supxlabel()
    assert " NaN" not in plot(make_runs()).get_supxlabel()


def test_labels_carry_units():
    for plot in FIGURES:
        labels = [axes.get_ylabel() for axes in plot(make_runs()).axes]
        assert any("(nats per step)" in label for label in labels)


def test_colours_of_runs_are_those_of_all_figures():
    drawn = spectral_plots.largest_exponent_against_gain(make_runs()).axes[0].containers
    assert [to_rgba(points.get_color()) for points, *_ in drawn] == [to_rgba("#0072B2"), to_rgba("#D55E00")]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="runs must hold at least one run"):
        spectral_plots.spectrum_against_theory({})
    run = make_run(0)
    del run["critical_gains"]
    with pytest.raises(ValueError, match=r"runs\['LSTM'\] must hold .*; missing: critical_gains"):
        spectral_plots.largest_exponent_of_gates({"LSTM": run})
    with pytest.raises(ValueError, match=r"'largest_exponents'\] must have shape \(5, any\), got \(4, 3\)"):
        spectral_plots.largest_exponent_against_gain({"a": make_run(0) | {"largest_exponents": np.zeros((4, 3))}})
    with pytest.raises(ValueError, match=r"'exact_log_singular_values'\] must have shape \(7, 4\), got \(1, 4\)"):
        spectral_plots.singular_values_against_exponents({"a": run | {"exact_log_singular_values": np.zeros((1, 4))}})
