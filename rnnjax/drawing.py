"""What the figures of ``rnnjax.plots`` and ``rnnjax.spectral_plots`` share: checks, styles, axes, legends, notes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rnnjax import validation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = Mapping[str, Mapping[str, Any]]
"""A run's label -> its arrays by name."""
Arrays = dict[str, np.ndarray]
Style = dict[str, Any]

DOTS_PER_INCH = 100
WIDTH = 9.0
"""Inches: 900 pixels, what a README page shows without scaling."""
AXES = {
    "steps": "M",
    "log_spectral_norms": "MLTn",
    "finite_time_exponents": "MLkn",
    "hidden_gradient_norms": "MLT",
    "profile_lags": "P",
    "profile_initial": "LPnS",
    "profile_final": "LPnS",
    "metric_step": "N",
    "loss": "N",
    "gradient_norm": "N",
    "gradient_norm_clipped": "N",
    "evaluation_step": "E",
    "evaluation_accuracy": "E",
    "gains": "G",
    "largest_exponents": "Gn",
    "theory_largest_exponents": "G",
    "spectrum_gains": "Q",
    "exponents": "QnU",
    "theory_exponents": "QU",
    "gated_gains": "G",
    "forget_biases": "B",
    "critical_gains": "B",
    "autonomous_exponents": "GBn",
    "driven_exponents": "GBn",
    "product_lengths": "P",
    "log_singular_values": "Pk",
    "exact_log_singular_values": "Pk",
    "qr_sums": "Pk",
    "product_exponents": "k",
}
"""The axes of each array, in the letters of ``rnnjax.plots`` and ``rnnjax.spectral_plots``."""
# Okabe & Ito's colours without yellow, which is too pale on white; the markers tell the runs apart in grey.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def checked_runs(runs: Runs, names: Sequence[str], layer: int | None = None) -> dict[str, Arrays]:
    """Returns the named arrays of each run, those that have layers cut to the one asked for."""
    if not runs:
        raise ValueError("runs must hold at least one run, got none")
    return {label: _checked_run(f"runs[{label!r}]", run, names, layer) for label, run in runs.items()}


def _checked_run(where: str, run: Mapping[str, Any], names: Sequence[str], layer: int | None) -> Arrays:
    missing = [name for name in names if name not in run]
    if missing:
        raise ValueError(f"{where} must hold {', '.join(names)}; missing: {', '.join(missing)}")
    arrays = {name: np.asarray(run[name], float) for name in names}
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        validation.shape(f"{where}[{name!r}]", array, tuple(sizes.get(letter) for letter in AXES[name]))
        sizes.update(zip(AXES[name], array.shape, strict=True))
        if array.size == 0 and AXES[name] not in ("N", "E"):
            raise ValueError(f"{where}[{name!r}] must not be empty, got shape {array.shape}")
    if layer is None:
        return arrays
    if not -sizes["L"] <= layer < sizes["L"]:
        raise ValueError(f"layer must be an index into the {sizes['L']} layers of {where}, got {layer}")
    axes = {name: AXES[name].find("L") for name in names}
    return {name: array if axes[name] < 0 else array.take(layer, axes[name]) for name, array in arrays.items()}


def new_figure(rows: int, columns: int, height: float, **sharing: Any) -> tuple["Figure", np.ndarray]:
    """Returns a figure and its grid of axes ``[rows, columns]``; ``height`` is that of a row in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'rnnjax[experiments]'") from error
    figure = Figure(figsize=(WIDTH, 0.7 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **sharing)
    for axes in grid.flat:
        axes.xaxis.set_major_locator(_whole_numbers(6 if columns <= 3 else 3))
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def _whole_numbers(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=most, integer=True, min_n_ticks=1)


def before_and_after(arrays: dict[str, Arrays]) -> tuple["Figure", list[tuple["Axes", Style, Arrays]]]:
    """Returns a figure with a panel for the first monitored step and one for the last, and what to draw where.

    Of each run's arrays the moment drawn is kept. A run of one monitored step is drawn in the first panel only.
    """
    moments = (0, -1) if any(len(run["steps"]) > 1 for run in arrays.values()) else (0,)
    figure, grid = new_figure(1, len(moments), height=3.6, sharey=True)
    drawn = []
    for axes, moment, dashes in zip(grid[0], moments, ("--", "-"), strict=False):
        shown = {i: run for i, run in enumerate(arrays.values()) if moment == 0 or len(run["steps"]) > 1}
        for index, run in shown.items():
            at_moment = {name: array[moment] for name, array in run.items()}
            drawn.append((axes, run_style(index) | {"linestyle": dashes}, at_moment))
        steps = sorted({int(run["steps"][moment]) for run in shown.values()})
        title = "After training" if moment else "First monitored step" if any(steps) else "Before training"
        axes.set_title(f"{title} (step {'–'.join(map(str, steps[:: max(1, len(steps) - 1)]))})", fontsize="medium")
    return figure, drawn


def run_style(index: int) -> Style:
    """Returns the colour and marker of a run."""
    marker = {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 4.5}
    return {"color": _COLORS[index % len(_COLORS)], "linewidth": 1.6, **marker}


def finite(values: np.ndarray) -> np.ndarray:
    """Returns ``values`` with NaN, at which lines break, where they are not finite."""
    return np.where(np.isfinite(values), values, np.nan)


def mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Returns the mean; −inf or NaN where one of the values is."""
    with np.errstate(invalid="ignore"):
        return values.mean(axis)


def line(axes: "Axes", x: np.ndarray, y: np.ndarray, style: Style) -> None:
    """Draws a line that breaks where ``y`` is not finite."""
    axes.plot(x, finite(y), markevery=max(1, len(x) // 8), **style)


def line_on_log_axis(axes: "Axes", x: np.ndarray, y: np.ndarray, style: Style) -> None:
    """Draws positive values as a line, and zeros as markers at the lower edge, in a row of their own for each run."""
    axes.set_yscale("log")
    height = 0.02 + 0.0125 * len(axes.get_lines())
    line(axes, x, np.where(y > 0, y, np.nan), style)
    at_edge = {"linestyle": "none", "markersize": 3, "transform": axes.get_xaxis_transform()}
    axes.plot(x[y == 0], np.full(np.sum(y == 0), height), **style | at_edge)


def note_zeros(axes: "Axes", values: Iterable[np.ndarray]) -> str:
    """Makes room for the zeros at the lower edge and says what they are, where there are any."""
    if not any(np.any(array == 0) for array in values):
        return ""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low * (low / high) ** 0.2, 1e-300), high)
    return "Markers at the lower edge: exactly 0."


def note_not_finite(values: Iterable[np.ndarray], shown: str = "not drawn") -> str:
    """Counts the values that no axis has a place for."""
    joined = np.concatenate([array.ravel() for array in values])
    kinds = {"−inf": np.isneginf(joined), "+inf": np.isposinf(joined), "NaN": np.isnan(joined)}
    counts = [f"{where.sum()} {kind}" for kind, where in kinds.items() if where.any()]
    return f"{', '.join(counts)} of {joined.size} values: {shown}" if counts else ""


def mark_regions(panels: Sequence["Axes"]) -> None:
    """Draws the line of norm 1 and names what lies above and below it, in corners that lines from 0 do not reach."""
    limits = np.array([axes.get_ylim() for axes in panels])
    low, high = limits.min(), limits.max()
    room = 0.14 * (max(high, 0) - min(low, 0))
    for axes in panels:
        axes.set_ylim(min(low, -room), max(high, room))
        axes.axhline(0, color="0.4", linewidth=0.8, zorder=1)
        axes.text(0.02, 0.98, "exploding", transform=axes.transAxes, color="0.4", fontsize="small", va="top")
        axes.text(0.02, 0.02, "vanishing", transform=axes.transAxes, color="0.4", fontsize="small", va="bottom")


def add_powers_of_ten(axes: "Axes") -> None:
    """Adds a right-hand axis that reads nats as powers of ten."""
    right = axes.secondary_yaxis("right", functions=(lambda nats: nats / np.log(10), lambda power: power * np.log(10)))
    right.yaxis.set_major_locator(_whole_numbers(9))
    right.yaxis.set_major_formatter(lambda power, _: f"$10^{{{power:.0f}}}$")
    right.set_ylabel("spectral norm")


def plain_log_ticks(axes: "Axes") -> None:
    """Writes 0.5 for 5 × 10⁻¹ on a log axis of few decades."""
    from matplotlib.ticker import LogLocator

    low, high = axes.get_ylim()
    if high < 1000 * low:
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")


def heat_maps(row: np.ndarray, arrays: dict[str, Arrays], name: str, label: str, linear_below: float) -> None:
    """Draws means over the sequences, a panel a run, on one scale that is linear near 0, then logarithmic."""
    from matplotlib.colors import SymLogNorm
    from matplotlib.ticker import SymmetricalLogLocator

    means = [np.ma.masked_invalid(mean(run[name], axis=-1)) for run in arrays.values()]
    largest = max(linear_below, *(np.abs(values.filled(0)).max() for values in means))
    scale = SymLogNorm(linear_below, vmin=-largest, vmax=largest)
    for axes, values, run in zip(row, means, arrays.values(), strict=True):
        axes.set_facecolor("0.5")
        rows = 0.5 + np.arange(values.shape[1] + 1)
        image = axes.pcolormesh(edges(run["steps"]), rows, values.T, norm=scale, cmap="RdBu_r")
        axes.yaxis.set_major_locator(_whole_numbers(8))
    few_decades = largest <= 100 * linear_below
    ticks = SymmetricalLogLocator(base=10, linthresh=linear_below, subs=(1, 3) if few_decades else (1,))
    bar = row[0].figure.colorbar(image, ax=list(row), label=label, pad=0.02, ticks=ticks)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))


def edges(centers: np.ndarray) -> np.ndarray:
    """Returns the borders of cells around ``centers``."""
    half = np.diff(centers) / 2 if len(centers) > 1 else np.array([0.5])
    return np.concatenate([centers[:1] - half[:1], centers[:-1] + half[: len(centers) - 1], centers[-1:] + half[-1:]])


def label_axes(panels: Iterable["Axes"], x: str, y: str) -> None:
    """Labels the x axis of every panel, and the y axis of those in the first column."""
    for axes in panels:
        axes.set_xlabel(x)
        position = axes.get_subplotspec()
        if position is not None and position.is_first_col():
            axes.set_ylabel(y)


def add_run_legend(figure: "Figure", arrays: dict[str, Arrays]) -> None:
    """Adds a legend of the runs above the panels."""
    add_legend(figure, {label: run_style(index) for index, label in enumerate(arrays)})


def add_legend(figure: "Figure", styles: dict[str, Style]) -> None:
    """Adds a legend above the panels, where it covers nothing."""
    from matplotlib.lines import Line2D

    columns = max(1, min(len(styles), 120 // (7 + max(map(len, styles)))))
    keys = [Line2D([], [], label=label, **style) for label, style in styles.items()]
    figure.legend(handles=keys, loc="outside upper center", ncols=columns, frameon=False)


def add_notes(figure: "Figure", *notes: str) -> None:
    """Writes below the panels what there is to say of values that they do not show."""
    figure.supxlabel("  ".join(filter(None, notes)), fontsize="small")
