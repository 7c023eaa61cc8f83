"""Figures of what remedies for vanishing and exploding gradients change, drawn from saved arrays.

Each function takes arrays by name and returns a matplotlib figure, as the functions of ``rnnjax.plots`` do. Letters in
shapes: N points of a descent, X weights and Y biases of a surface, C points of a cut through it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rnnjax import drawing, validation
from rnnjax.drawing import Arrays, Runs, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SURFACE = {"weights": "X", "biases": "Y", "losses": "YX"}
_CUT = {"weight": "", "biases": "C", "losses": "C", "log_jacobians": "C"}
_DESCENT = {"points": "N2", "losses": "N", "gradient_norms": "N", "log_jacobians": "N"}
_LOSSES = (1e-2, 10.0)
"""Losses between which shades of grey differ."""
_CUT_LINE: Style = {"color": "0.25", "linewidth": 1.2}


def error_surface(descents: Runs, surface: Mapping[str, Any], cut: Mapping[str, Any]) -> "Figure":
    r"""Draws the loss over weight and bias with the paths of descents on it, and a cut along the bias.

    A path that leaves the surface ends in an arrow that says where the update went.

    Args:
      descents: label -> ``points [N, 2]`` of (weight, bias), ``losses [N]``, ``gradient_norms [N]``, and
        ``log_jacobians [N]``, log|∂x_T/∂x_0| in nats.
      surface: ``weights [X]`` and ``biases [Y]``, both ascending, and ``losses [Y, X]``.
      cut: ``weight`` at which the surface is cut, ``biases [C]``, ``losses [C]`` and ``log_jacobians [C]``.

    Returns:
      The figure.

    Raises:
      ValueError: no descents; an array missing, empty or of another shape.

    Example:
      >>> path = {"points": [[5, -2.5], [9, 1]], "losses": [1, 9], "gradient_norms": [9, 1], "log_jacobians": [3, 0]}
      >>> surface = {"weights": [4, 6], "biases": [-3, -2], "losses": [[1, 2], [2, 1]]}
      >>> cut = {"weight": 5, "biases": [-3, -2], "losses": [1, 2], "log_jacobians": [0, 1]}
      >>> [axes.get_ylabel() for axes in error_surface({"unclipped": path}, surface, cut).axes][:3]
      ['loss', '$\\log\\,|\\partial x_T\\,/\\,\\partial x_0|$ (nats)', 'bias $b$']

    Source: R. Pascanu et al., On the difficulty of training recurrent neural networks, ICML 2013, figure 6.
    """
    paths = _checked_descents(descents)
    plane, section = validation.named_arrays("surface", surface, _SURFACE), validation.named_arrays("cut", cut, _CUT)
    figure, grid = drawing.new_figure(2, 2, height=2.4, sharex="col", width_ratios=[1.5, 1])
    place = grid[0, 0].get_gridspec()[:, 0]
    for axes in grid[:, 0]:
        axes.remove()
    _draw_cut(grid[:, 1], section)
    whole = figure.add_subplot(place)
    _draw_surface(whole, plane)
    for index, path in enumerate(paths.values()):
        _draw_path(whole, path["points"], drawing.run_style(index), zorder=4 - index)
    whole.axvline(section["weight"].item(), linestyle=":", **_CUT_LINE)
    drawing.add_legend(figure, {label: drawing.run_style(index) | {"marker": ""} for index, label in enumerate(paths)})
    drawn = [*plane.values(), *section.values(), *(path["points"] for path in paths.values())]
    note = "Circle: where a descent starts. Star: where it ends. Dotted: the cut."
    drawing.add_notes(figure, note, drawing.note_not_finite(drawn))
    return figure


def _draw_surface(axes: "Axes", surface: Arrays) -> None:
    """Draws the loss in shades of grey, lighter where it is smaller."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    shades = LinearSegmentedColormap.from_list("grey", ["1", "0.5"])
    axes.set_facecolor("black")
    x, y = drawing.edges(surface["weights"]), drawing.edges(surface["biases"])
    losses = np.ma.masked_invalid(surface["losses"])
    mesh = axes.pcolormesh(x, y, losses, norm=LogNorm(*_LOSSES, clip=True), cmap=shades)
    axes.figure.colorbar(mesh, ax=axes, label="loss", location="bottom", extend="both", aspect=40, pad=0.02)
    axes.set(xlim=x[[0, -1]], ylim=y[[0, -1]], xlabel="recurrent weight $w$", ylabel="bias $b$")


def _draw_path(axes: "Axes", points: np.ndarray, style: Style, zorder: int) -> None:
    """Draws a path with its start, its end, and where it first leaves the axes."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    fixed: Style = {"scalex": False, "scaley": False}
    mark: Style = {"linestyle": "none", "markeredgecolor": "black", "zorder": 6} | fixed
    axes.plot(*points.T, color=style["color"], linewidth=1.0, zorder=zorder, **fixed)
    axes.plot(*points[0], marker="o", markersize=7, color="white", **mark)
    axes.plot(*points[-1], marker="*", markersize=12, color=style["color"], **mark)
    inside = np.all((points >= (left, low)) & (points <= (right, high)), axis=1)
    leaving = np.flatnonzero(inside[:-1] & ~inside[1:] & np.isfinite(points[1:]).all(axis=1))
    if leaving.size:
        _draw_exit(axes, points[leaving[0]], points[leaving[0] + 1], style)


def _draw_exit(axes: "Axes", origin: np.ndarray, target: np.ndarray, style: Style) -> None:
    """Draws an arrow to the edge of the axes, and says where the update beyond it went."""
    limits = np.array([axes.get_xlim(), axes.get_ylim()])
    step = target - origin
    ahead = np.where(step > 0, limits[:, 1], limits[:, 0])
    edge = origin + step * np.min((ahead - origin)[step != 0] / step[step != 0])
    arrow: Style = {"arrowstyle": "-|>", "color": style["color"], "shrinkA": 0, "shrinkB": 0, "linewidth": 1.6}
    axes.annotate("", tuple(edge), tuple(origin), arrowprops=arrow, zorder=5)
    text = "to ({:.4g}, {:.4g})".format(*target).replace("-", "−")
    no_room = edge[0] > limits[0] @ (0.15, 0.85)
    placed: Style = {"ha": "right" if no_room else "left", "va": "center", "fontsize": "small", "zorder": 6}
    offset = (-8 if no_room else 8, 0)
    axes.annotate(text, tuple((origin + edge) / 2), offset, "data", "offset points", color=style["color"], **placed)


def _draw_cut(panels: np.ndarray, cut: Arrays) -> None:
    """Draws the loss and log|∂x_T/∂x_0| against the bias."""
    from matplotlib.ticker import MaxNLocator

    loss, jacobian = panels
    loss.plot(cut["biases"], drawing.finite(cut["losses"]), **_CUT_LINE)
    jacobian.plot(cut["biases"], drawing.finite(cut["log_jacobians"]), **_CUT_LINE)
    jacobian.axhline(0, color="0.6", linewidth=0.8, zorder=1)
    loss.set_ylabel("loss")
    loss.set_title(f"cut at $w$ = {cut['weight']:.2f}", fontsize="medium")
    jacobian.xaxis.set_major_locator(MaxNLocator(5))
    jacobian.set(xlabel="bias $b$", ylabel=r"$\log\,|\partial x_T\,/\,\partial x_0|$ (nats)")


def descent_over_updates(descents: Runs) -> "Figure":
    """Draws loss, gradient norm before clipping, and log|∂x_T/∂x_0| of descents against the number of updates.

    Args:
      descents: label -> arrays as in ``error_surface``.

    Returns:
      The figure.

    Raises:
      ValueError: no descents; an array missing, empty or of another shape.

    Example:
      >>> path = {"points": [[5, -2.5], [9, 1]], "losses": [1, 9], "gradient_norms": [9, 1], "log_jacobians": [3, 0]}
      >>> [axes.get_xlabel() for axes in descent_over_updates({"unclipped": path}).axes]
      ['update', 'update', 'update']
    """
    paths = _checked_descents(descents)
    figure, grid = drawing.new_figure(1, 3, height=3.0)
    loss, norm, jacobian = grid[0]
    styles = [drawing.run_style(index) | {"linewidth": 0.8, "marker": ""} for index in range(len(paths))]
    for path, style in zip(paths.values(), styles, strict=True):
        updates = 1 + np.arange(len(path["losses"]))
        drawing.line_on_log_axis(loss, updates, path["losses"], style)
        drawing.line_on_log_axis(norm, updates, path["gradient_norms"], style)
        drawing.line(jacobian, updates, path["log_jacobians"], style)
    jacobian.set_yscale("symlog")
    jacobian.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
    jacobian.axhline(0, color="0.6", linewidth=0.8, zorder=1)
    names = ("loss", "gradient norm before clipping", r"$\log\,|\partial x_T\,/\,\partial x_0|$ (nats)")
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(xlabel="update", ylabel=name)
    positive = [[path[name] for path in paths.values()] for name in ("losses", "gradient_norms")]
    notes = [drawing.note_zeros(axes, values) for axes, values in zip((loss, norm), positive, strict=True)]
    drawing.add_legend(figure, dict(zip(paths, styles, strict=True)))
    everything = [array for path in paths.values() for array in path.values()]
    drawing.add_notes(figure, max(notes), drawing.note_not_finite(everything))
    return figure


def _checked_descents(descents: Runs) -> dict[str, Arrays]:
    if not descents:
        raise ValueError("descents must hold at least one descent, got none")
    return {label: validation.named_arrays(f"descents[{label!r}]", path, _DESCENT) for label, path in descents.items()}
