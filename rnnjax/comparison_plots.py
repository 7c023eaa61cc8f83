"""Figures that set remedies side by side, a row or a panel each, with every seed or the range of the seeds drawn.

Each function takes arrays by name and returns a matplotlib figure, as the functions of ``rnnjax.plots`` do. Letters in
shapes: n seeds, N training steps, E evaluations; "2" is before and after training.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rnnjax import drawing, validation
from rnnjax.drawing import Arrays, Runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_VANISHING = {"log_spectral_norm": "n2", "accuracy": "nE", "baseline_accuracy": ""}
_GRADIENTS = {"gradient_norm": "nN", "gradient_norm_clipped": "nN", "skipped": "nN"}
_RESULTS = {"skipped": "nN", "loss": "nE", "baseline_loss": ""}
_BEFORE, _AFTER, _BROKEN = "#D55E00", "#0072B2", "#000000"
_ROW_HEIGHT = 0.21
"""Inches."""


def remedies_for_vanishing(tasks: Mapping[str, Runs], kinds: Mapping[str, str]) -> "Figure":
    r"""Draws log ‖∂s_T/∂s_0‖₂ before and after training beside the accuracy, a row for each remedy.

    Dots are medians over the seeds, bars reach from the smallest to the largest. Norms of zero are left out of both and
    marked at the left edge.

    Args:
      tasks: title -> remedy -> ``log_spectral_norm [n, 2]`` in nats, before and after training, held-out ``accuracy
        [n, E]``, of which the last is drawn, and ``baseline_accuracy``, which needs no memory.
      kinds: remedy -> what kind it is of; remedies of one kind, which must follow each other, share a background.

    Returns:
      The figure.

    Raises:
      ValueError: no tasks, no remedies; an array missing, empty or of another shape; a remedy without a kind.

    Example:
      >>> arrays = {"log_spectral_norm": [[-35, -30]], "accuracy": [[0.1, 0.9]], "baseline_accuracy": 0.08}
      >>> figure = remedies_for_vanishing({"adding": {"none": arrays}}, {"none": "start"})
      >>> [axes.get_xlabel() for axes in figure.axes]
      ['$\\log\\,\\Vert\\partial s_T\\,/\\,\\partial s_0\\Vert_2$ (nats)', 'held-out accuracy']
    """
    checked = _checked_groups("tasks", tasks, _VANISHING)
    names = list(dict.fromkeys(name for runs in checked.values() for name in runs))
    missing = [name for name in names if name not in kinds]
    if missing:
        raise ValueError(f"kinds must name the kind of every remedy; missing: {', '.join(missing)}")
    figure, grid = _rows_figure(checked, names)
    for column, runs in enumerate(checked.values()):
        norm, score = grid[2 * column : 2 * column + 2]
        before, after = ({name: run["log_spectral_norm"][:, i] for name, run in runs.items()} for i in (0, 1))
        dots_and_ranges(norm, names, before, color=_BEFORE, filled=False, offset=-0.16)
        dots_and_ranges(norm, names, after, color=_AFTER, offset=0.16)
        dots_and_ranges(score, names, {name: run["accuracy"][:, -1] for name, run in runs.items()}, color=_AFTER)
        norm.axvline(0, color="0.4", linewidth=0.8, zorder=1)
        score.axvline(float(next(iter(runs.values()))["baseline_accuracy"]), color="0.4", linewidth=0.8, linestyle=":")
        score.set_xlim(-0.03, 1.03)
        norm.set_xlabel(r"$\log\,\Vert\partial s_T\,/\,\partial s_0\Vert_2$ (nats)")
        score.set_xlabel("held-out accuracy")
    _shade_kinds(grid, [kinds[name] for name in names])
    styles = {"before training": _dot(_BEFORE, filled=False), "after training": _dot(_AFTER)}
    drawing.add_legend(figure, styles | {"no memory": {"color": "0.4", "linestyle": ":", "linewidth": 0.8}})
    norms = [run["log_spectral_norm"] for runs in checked.values() for run in runs.values()]
    drawing.add_notes(figure, drawing.note_not_finite(norms, "at the edge, or not drawn"))
    return figure


def gradient_norms_by_remedy(runs: Runs) -> "Figure":
    """Draws the norm of the gradient over training before and after clipping, a panel for each remedy.

    Every seed is a line; where nothing was clipped, the second line covers the first. A cross marks the first step at
    which a seed's gradient was not finite, at the height of the last that was.

    Args:
      runs: remedy -> ``gradient_norm``, ``gradient_norm_clipped`` and ``skipped``, ``[n, N]``, skipped being 1 at the
        steps whose gradient was not finite.

    Returns:
      The figure.

    Raises:
      ValueError: no remedies; an array missing, empty or of another shape.

    Example:
      >>> arrays = {"gradient_norm": [[2, 9]], "gradient_norm_clipped": [[1, 1]], "skipped": [[0, 0]]}
      >>> [axes.get_title() for axes in gradient_norms_by_remedy({"clip by norm": arrays}).axes]
      ['clip by norm']
    """
    checked = _checked_group("runs", runs, _GRADIENTS)
    columns = min(4, len(checked))
    rows = -(-len(checked) // columns)
    figure, grid = drawing.new_figure(rows, columns, height=1.9, sharex=True, sharey=True)
    for axes, (name, run) in zip(grid.flat, checked.items(), strict=False):
        _draw_norms(axes, run)
        axes.set_title(name, fontsize="medium")
    for axes in grid.flat[len(checked) :]:
        axes.remove()
    drawing.label_axes(figure.axes, "", "gradient norm")
    for index, axes in enumerate(figure.axes):
        if index + columns >= len(checked):
            axes.set_xlabel("training step")
            axes.tick_params(axis="x", labelbottom=True)
    lines = {"before clipping": {"color": _BEFORE}, "given to the optimiser": {"color": _AFTER}}
    drawing.add_legend(figure, lines | {"first gradient that is not finite": _cross()})
    return figure


def results_by_remedy(starts: Mapping[str, Runs]) -> "Figure":
    """Draws the held-out loss after training and the share of steps skipped, a row for each remedy.

    Dots are medians over the seeds whose loss is finite, bars reach from the smallest to the largest; a cross at the
    right edge says that there is a seed whose loss is no number, or infinite.

    Args:
      starts: title -> remedy -> held-out ``loss [n, E]``, of which the last is drawn, ``skipped [n, N]``, 1 at the
        steps whose gradient was not finite, and ``baseline_loss``, which needs no memory.

    Returns:
      The figure.

    Raises:
      ValueError: no starts, no remedies; an array missing, empty or of another shape.

    Example:
      >>> arrays = {"loss": [[0.2, 0.1]], "skipped": [[0, 1]], "baseline_loss": 0.17}
      >>> [axes.get_xlabel() for axes in results_by_remedy({"ReLU": {"none": arrays}}).axes]
      ['held-out loss', 'share of steps skipped']
    """
    checked = _checked_groups("starts", starts, _RESULTS)
    names = list(dict.fromkeys(name for runs in checked.values() for name in runs))
    figure, grid = _rows_figure(checked, names)
    for column, runs in enumerate(checked.values()):
        loss, share = grid[2 * column : 2 * column + 2]
        last = {name: run["loss"][:, -1] for name, run in runs.items()}
        loss.set_xscale("log")
        dots_and_ranges(loss, names, {k: np.where(np.isfinite(v), v, np.nan) for k, v in last.items()}, color=_AFTER)
        for name, values in last.items():
            if not np.isfinite(values).all():
                edge = {"transform": loss.get_yaxis_transform(), "clip_on": False}
                loss.plot([0.97], [names.index(name)], **_cross() | edge)
        skipped = {name: run["skipped"].mean(axis=1) for name, run in runs.items()}
        dots_and_ranges(share, names, skipped, color=_BEFORE)
        share.set_xlim(-0.05, 1.05)
        loss.axvline(float(next(iter(runs.values()))["baseline_loss"]), color="0.4", linewidth=0.8, linestyle=":")
        _few_powers_of_ten(loss)
        loss.set_xlabel("held-out loss")
        share.set_xlabel("share of steps skipped")
    memoryless = {"no memory": {"color": "0.4", "linestyle": ":", "linewidth": 0.8}}
    drawing.add_legend(figure, memoryless | {"a seed whose loss is not finite": _cross()})
    return figure


def dots_and_ranges(
    axes: "Axes",
    names: Sequence[str],
    values: Mapping[str, np.ndarray],
    *,
    color: str,
    filled: bool = True,
    offset: float = 0.0,
) -> None:
    """Draws median and range of the finite values of each name in its row; a triangle at the left edge where −inf."""
    for name, own in values.items():
        row, drawn = names.index(name) + offset, own[np.isfinite(own)]
        if drawn.size:
            axes.plot([drawn.min(), drawn.max()], [row, row], color=color, linewidth=1.4, zorder=2)
            axes.plot([np.median(drawn)], [row], **_dot(color, filled=filled), zorder=3)
        if np.isneginf(own).any():
            at_edge = {"marker": "<", "transform": axes.get_yaxis_transform()}
            axes.plot([0.02], [row], **_dot(color, filled=filled) | at_edge)


def _draw_norms(axes: "Axes", run: Arrays) -> None:
    steps = np.arange(run["skipped"].shape[1])
    axes.set_yscale("log")
    for name, color in (("gradient_norm", _BEFORE), ("gradient_norm_clipped", _AFTER)):
        for norms, skipped in zip(run[name], run["skipped"], strict=True):
            shown = np.where((skipped > 0) | ~np.isfinite(norms) | (norms <= 0), np.nan, norms)
            axes.plot(steps, shown, color=color, linewidth=0.7, alpha=0.8)
    for norms, skipped in zip(run["gradient_norm"], run["skipped"], strict=True):
        if skipped.any():
            first = int(skipped.argmax())
            finite = norms[: first + 1][np.isfinite(norms[: first + 1])]
            height = finite[-1] if finite.size else 1.0
            axes.plot([first], [height], **_cross())


def _rows_figure(groups: Mapping[str, Any], names: Sequence[str]) -> tuple["Figure", np.ndarray]:
    """Returns a figure with two panels for each group, whose rows are the names from top to bottom."""
    height = 0.9 + _ROW_HEIGHT * len(names)
    figure, grid = drawing.new_figure(1, 2 * len(groups), height=height, sharey=True)
    for axes, title in zip(grid[0], (title for title in groups for _ in range(2)), strict=True):
        axes.set_title(title, fontsize="small")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    grid[0, 0].set_yticks(range(len(names)), names)
    grid[0, 0].set_ylim(len(names) - 0.5, -0.5)
    return figure, grid[0]


def _few_powers_of_ten(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.get_xlim()
    narrow = high < 100 * low
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 3) if narrow else (1,), numticks=5))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if narrow:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _shade_kinds(row: np.ndarray, kinds: Sequence[str]) -> None:
    """Gives every second kind a grey background."""
    number = 0
    for index, kind in enumerate(kinds):
        number += index > 0 and kind != kinds[index - 1]
        if number % 2:
            for axes in row:
                axes.axhspan(index - 0.5, index + 0.5, color="0.95", linewidth=0, zorder=0)


def _dot(color: str, *, filled: bool = True) -> dict[str, Any]:
    inside = color if filled else "white"
    return {"color": color, "marker": "o", "markersize": 4.5, "markerfacecolor": inside, "linestyle": "none"}


def _cross() -> dict[str, Any]:
    return {"color": _BROKEN, "marker": "x", "markersize": 7, "markeredgewidth": 1.8, "linestyle": "none"}


def _checked_groups(where: str, groups: Mapping[str, Runs], axes: Mapping[str, str]) -> dict[str, dict[str, Arrays]]:
    if not groups:
        raise ValueError(f"{where} must hold at least one group of remedies, got none")
    return {title: _checked_group(f"{where}[{title!r}]", runs, axes) for title, runs in groups.items()}


def _checked_group(where: str, runs: Runs, axes: Mapping[str, str]) -> dict[str, Arrays]:
    if not runs:
        raise ValueError(f"{where} must hold at least one remedy, got none")
    return {name: validation.named_arrays(f"{where}[{name!r}]", run, axes) for name, run in runs.items()}
