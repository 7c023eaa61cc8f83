"""Figures of how far back networks learn to remember, drawn from saved arrays.

Each function takes arrays by name and returns a matplotlib figure, as the functions of ``rnnjax.plots`` do. Letters in
shapes: D distances or lengths, n networks that differ in their seeds alone, T lags.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rnnjax import drawing, validation
from rnnjax.drawing import Arrays, Runs, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ACCURACY = {"distances": "D", "accuracies": "Dn"}
_SHARES = {"before": "nT", "after": "nT"}
_SUCCESS = {"lengths": "D", "rates": "D", "lowest": "D", "highest": "D"}
_LINEAR_BELOW = 1e-4
"""Shares below which the axis of signed shares is linear."""


def accuracy_against_distance(runs: Runs, baseline: float) -> "Figure":
    """Draws the mean accuracy against the distance to be remembered over, with the range over seeds as bars.

    Args:
      runs: label -> ``distances [D]`` in steps, positive and ascending, and ``accuracies [D, n]`` in [0, 1].
      baseline: accuracy of the best answer that remembers nothing.

    Returns:
      The figure.

    Raises:
      ValueError: no runs; an array missing, empty or of another shape.

    Example:
      >>> runs = {"GRU": {"distances": [5, 50], "accuracies": [[1.0, 0.9], [0.2, 0.1]]}}
      >>> accuracy_against_distance(runs, baseline=0.06).axes[0].get_ylabel()
      'held-out accuracy'
    """
    arrays = _checked("runs", runs, _ACCURACY)
    figure, grid = drawing.new_figure(1, 1, height=4.0)
    axes = grid[0, 0]
    for index, run in enumerate(arrays.values()):
        # A little apart, so that bars of equal height stand beside each other.
        shifted = run["distances"] * 1.02 ** (index - (len(arrays) - 1) / 2)
        accuracies = drawing.finite(run["accuracies"])
        mean = accuracies.mean(axis=1)
        spread = np.abs(np.stack([accuracies.min(axis=1), accuracies.max(axis=1)]) - mean)
        axes.errorbar(shifted, mean, spread, elinewidth=1.0, **drawing.run_style(index))
    axes.axhline(baseline, color="0.4", linewidth=0.8, linestyle="--", zorder=1)
    _logarithmic_ticks(axes, [run["distances"] for run in arrays.values()])
    axes.set_ylim(-0.03, 1.04)
    drawing.label_axes([axes], "distance (words)", "held-out accuracy")
    drawing.add_run_legend(figure, arrays)
    note = "Bars: lowest and highest of the seeds. Dashed: the best answer without any memory."
    drawing.add_notes(figure, note, drawing.note_not_finite(run["accuracies"] for run in arrays.values()))
    return figure


def gradient_share_by_lag(runs: Runs, distance: int) -> "Figure":
    """Draws which share of the loss gradient each lag contributes, and what all shorter lags together do.

    Args:
      runs: label -> ``before [n, T]`` and ``after [n, T]``, the signed share of the gradient by lag before and after
        training, entry i that of lag i; of each the mean over seeds is drawn.
      distance: lag of what is to be remembered.

    Returns:
      The figure.

    Raises:
      ValueError: no runs; an array missing, empty or of another shape.

    Example:
      >>> runs = {"GRU": {"before": [[0.9, 0.1]], "after": [[0.2, 0.8]]}}
      >>> [axes.get_title() for axes in gradient_share_by_lag(runs, distance=1).axes][:2]
      ['Before training', 'After training']
    """
    arrays = _checked("runs", runs, _SHARES)
    figure, grid = drawing.new_figure(2, 2, height=2.6, sharex=True, sharey="row")
    _signed_axis(grid[0])
    for column, name in enumerate(_SHARES):
        grid[0, column].set_title(f"{name.capitalize()} training", fontsize="medium")
        for index, run in enumerate(arrays.values()):
            style = drawing.run_style(index) | {"linewidth": 1.2}
            share = drawing.mean(run[name], axis=0)
            drawing.line(grid[0, column], np.arange(len(share)), share, style)
            drawing.line(grid[1, column], np.arange(len(share)), share.cumsum(), style)
    for axes in grid.flat:
        axes.axvline(distance, color="0.4", linewidth=0.8, linestyle=":", zorder=1)
        axes.axhline(0, color="0.6", linewidth=0.8, zorder=1)
    drawing.label_axes(grid[0], "", "share of one lag (signed)")
    drawing.label_axes(grid[1], "lag (steps)", "share of all lags up to this")
    drawing.add_run_legend(figure, arrays)
    note = f"Means over seeds. Dotted: lag {distance}, where the word to be remembered is read."
    drawing.add_notes(figure, note, drawing.note_not_finite(share for run in arrays.values() for share in run.values()))
    return figure


def success_against_length(panels: Mapping[str, Runs]) -> "Figure":
    """Draws the rate of success against the sequence length, with its confidence interval, a panel a group of runs.

    Args:
      panels: title -> label -> ``lengths [D]`` in steps, positive and ascending, ``rates [D]``, and ``lowest [D]`` and
        ``highest [D]``, the ends of their intervals, all in [0, 1].

    Returns:
      The figure.

    Raises:
      ValueError: no panels or runs; an array missing, empty or of another shape.

    Example:
      >>> runs = {"SGD": {"lengths": [20, 40], "rates": [1.0, 0.5], "lowest": [0.6, 0.2], "highest": [1.0, 0.8]}}
      >>> success_against_length({"tanh": runs}).axes[0].get_title()
      'tanh'

    Source: R. Pascanu et al., On the difficulty of training recurrent neural networks, ICML 2013, figure 7.
    """
    if not panels:
        raise ValueError("panels must hold at least one group of runs, got none")
    groups = {title: _checked(f"panels[{title!r}]", runs, _SUCCESS) for title, runs in panels.items()}
    figure, grid = drawing.new_figure(1, len(groups), height=3.4, sharey=True)
    styles: dict[str, Style] = {}
    for axes, (title, runs) in zip(grid[0], groups.items(), strict=True):
        axes.set_title(title, fontsize="medium")
        for label, run in runs.items():
            style = styles.setdefault(label, drawing.run_style(len(styles)))
            _draw_rates(axes, run, style)
        _logarithmic_ticks(axes, [run["lengths"] for run in runs.values()])
    grid[0, 0].set_ylim(-0.03, 1.04)
    drawing.label_axes(grid[0], "sequence length (steps)", "rate of success")
    drawing.add_legend(figure, styles)
    drawing.add_notes(figure, "Bands: 95 % intervals of the rate.")
    return figure


def _draw_rates(axes: "Axes", run: Arrays, style: Style) -> None:
    axes.fill_between(run["lengths"], run["lowest"], run["highest"], color=style["color"], alpha=0.12, linewidth=0)
    axes.plot(run["lengths"], run["rates"], **style)


def _logarithmic_ticks(axes: "Axes", values: Sequence[np.ndarray]) -> None:
    """Makes the x axis logarithmic with ticks at the values themselves."""
    axes.set_xscale("log")
    axes.set_xticks(np.unique(np.concatenate(values)), minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _signed_axis(panels: np.ndarray) -> None:
    """Makes the y axis linear near 0, then logarithmic on both sides."""
    for axes in panels:
        axes.set_yscale("symlog", linthresh=_LINEAR_BELOW)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))


def _checked(where: str, runs: Runs, axes: Mapping[str, str]) -> dict[str, Arrays]:
    if not runs:
        raise ValueError(f"{where} must hold at least one run, got none")
    return {label: validation.named_arrays(f"{where}[{label!r}]", run, axes) for label, run in runs.items()}
