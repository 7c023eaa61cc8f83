"""The figure of what following a diagnosis changes, drawn from saved arrays."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rnnjax import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_NAMES = ("network", "regime", "advice", "accuracy_before", "accuracy_after")


def advice(arrays: Mapping[str, Any]) -> "Figure":
    """Draws the accuracy of each network without and with the first advice of its diagnosis.

    Args:
      arrays: ``network``, ``regime`` and ``advice``, texts ``[N]``; ``accuracy_before`` and ``accuracy_after`` ``[N]``
        in [0, 1], the latter NaN where there was no advice.

    Returns:
      The figure.

    Raises:
      ValueError: no networks, an array missing.

    Example:
      >>> rows = {"network": ["tanh"], "regime": ["vanishing"], "advice": ["gain 1"]}
      >>> figure = advice(rows | {"accuracy_before": [0.1], "accuracy_after": [0.9]})
      >>> figure.axes[0].get_xlabel()
      'held-out accuracy'
    """
    missing = [key for key in _NAMES if key not in arrays]
    if missing:
        raise ValueError(f"arrays must hold {', '.join(_NAMES)}; missing: {', '.join(missing)}")
    names, regimes, remedies = (np.asarray(arrays[key]).astype(str) for key in ("network", "regime", "advice"))
    before, after = (np.asarray(arrays[key], float) for key in ("accuracy_before", "accuracy_after"))
    if names.size == 0:
        raise ValueError("arrays must hold at least one network, got none")
    figure, panels = drawing.new_figure(1, 1, 1.3 + 0.3 * len(names))
    axes = panels.flat[0]
    rows = np.arange(len(names))[::-1]
    axes.hlines(rows, before, np.where(np.isnan(after), before, after), color="0.7", linewidth=2, zorder=1)
    axes.scatter(before, rows, color="#D55E00", marker="o", s=36, zorder=2, label="as it was")
    axes.scatter(after, rows, color="#0072B2", marker="D", s=36, zorder=2, label="first advice followed")
    axes.set_yticks(rows, [f"{name} ({regime})" for name, regime in zip(names, regimes, strict=True)])
    for row, remedy in zip(rows, remedies, strict=True):
        axes.text(1.03, row, "no advice" if remedy == "none" else remedy, va="center", fontsize=8, color="0.3")
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("held-out accuracy")
    axes.grid(axis="x", color="0.9")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure
