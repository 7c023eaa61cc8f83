"""The figure of what a computation costs beside others, drawn from measured times."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rnnjax import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_TICKS = (0.5, 1, 2, 5, 10)


def times_beside(measured: Sequence[Mapping[str, Any]], unit: str) -> "Figure":
    """Draws times as multiples of one contestant's, a panel for each cell and a row for each size.

    Args:
      measured: each with ``cell``, ``size`` and ``what``, texts, and ``median_ms``.
      unit: whose time is 1, a ``what`` that every cell and size has.

    Returns:
      The figure.

    Raises:
      ValueError: nothing measured, an entry missing, a cell and size without the unit, a time that is not positive.

    Example:
      >>> ours = {"cell": "gru", "size": "9, 1, 4, 2", "what": "ours", "median_ms": 2.0}
      >>> times_beside([ours, ours | {"what": "theirs", "median_ms": 3.0}], "ours").axes[0].get_title()
      'gru'
    """
    ratios = _ratios(measured, unit)
    names = [name for name in dict.fromkeys(row["what"] for row in measured) if name != unit]
    cells = list(dict.fromkeys(cell for cell, _ in ratios))
    sizes = list(dict.fromkeys(size for _, size in ratios))
    figure, panels = drawing.new_figure(1, len(cells), 1.6 + 0.35 * len(sizes), sharex=True, sharey=True)
    rows = np.arange(len(sizes))[::-1]
    for axes, cell in zip(panels.flat, cells, strict=True):
        axes.axvline(1, color="0.5", linewidth=1, zorder=1)
        for index, name in enumerate(names):
            values = [ratios.get((cell, size), {}).get(name, np.nan) for size in sizes]
            style = drawing.run_style(index)
            # Side by side, so that equal times do not hide each other.
            beside = rows + 0.7 / max(len(names), 6) * ((len(names) - 1) / 2 - index)
            axes.scatter(values, beside, color=style["color"], marker=style["marker"], s=30, zorder=2, label=name)
        axes.set_title(cell)
        axes.set_xscale("log")
        axes.set_yticks(rows, sizes)
        axes.grid(axis="x", color="0.9")
        for row in rows[:-1]:
            axes.axhline(row - 0.5, color="0.9", linewidth=0.8, zorder=0)
        axes.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
        axes.minorticks_off()
        axes.set_xlabel(f"time / time of {unit}")
    panels.flat[0].set_ylabel("T, B, H, D")
    drawing.add_legend(figure, {name: drawing.run_style(i) | {"linewidth": 0} for i, name in enumerate(names)})
    return figure


def _ratios(measured: Sequence[Mapping[str, Any]], unit: str) -> dict[tuple[str, str], dict[str, float]]:
    """Returns times over that of the unit, by cell and size."""
    if not measured:
        raise ValueError("measured must hold at least one time, got none")
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in measured:
        missing = [key for key in ("cell", "size", "what", "median_ms") if key not in row]
        if missing:
            raise ValueError(f"measured must hold cell, size, what and median_ms; missing: {', '.join(missing)}")
        if not row["median_ms"] > 0:
            raise ValueError(f"median_ms must be positive, got {row['median_ms']} for {row['what']}")
        times.setdefault((row["cell"], row["size"]), {})[row["what"]] = row["median_ms"]
    for (cell, size), own in times.items():
        if unit not in own:
            raise ValueError(f"unit must be among what was measured for {cell} at {size}, got {unit!r}")
    return {place: {name: value / own[unit] for name, value in own.items()} for place, own in times.items()}
