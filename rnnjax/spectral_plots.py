"""Figures of Lyapunov exponents and singular values beside theory, drawn from saved arrays.

Each function takes ``runs``, a mapping from a label to arrays by name, and returns a matplotlib figure, as the
functions of ``rnnjax.plots`` do. Letters in shapes: G gains, n networks, Q gains at which all N exponents are known,
B forget biases, P lengths of products, k singular values.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rnnjax import drawing
from rnnjax.drawing import Arrays, Runs, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_THEORY: Style = {"color": "0.3", "linewidth": 1.2}
_ZERO: Style = {"color": "0.6", "linewidth": 0.8, "zorder": 1}
_EXPONENT: Style = {"color": "0.6", "linewidth": 1.0, "linestyle": "--", "zorder": 1}
_SINGULAR_VALUE: Style = {"linestyle": "none", "marker": "o", "markersize": 4.5}
_QR_SUM: Style = {"linestyle": "none", "marker": "x", "markersize": 5}
_LINEAR_BELOW = 0.1
"""Nats per step up to which the colours of exponents are linear."""


def largest_exponent_against_gain(runs: Runs) -> "Figure":
    """Draws the largest Lyapunov exponent against the gain: measured points over the line of mean-field theory.

    Points are means over networks, error bars their standard deviation; the second panel is the difference to theory.

    Args:
      runs: label -> ``gains [G]``, ``largest_exponents [G, n]`` and ``theory_largest_exponents [G]``, nats per step.

    Returns:
      The figure.

    Raises:
      ValueError: no runs; an array missing, empty or of another shape.

    Example:
      >>> run = {"gains": [0.5, 2.0], "largest_exponents": [[-0.7, -0.69], [0.16, 0.14]]}
      >>> run["theory_largest_exponents"] = [-0.693, 0.15]
      >>> [axes.get_ylabel() for axes in largest_exponent_against_gain({"tanh": run}).axes]
      ['largest exponent λ₁ (nats per step)', 'measured − theory (nats per step)']

    Source: H. Sompolinsky, A. Crisanti & H. J. Sommers, Chaos in random neural networks, Physical Review Letters 61,
    1988.
    """
    arrays = drawing.checked_runs(runs, ("gains", "largest_exponents", "theory_largest_exponents"))
    figure, ((whole, difference),) = drawing.new_figure(1, 2, height=3.6)
    for index, run in enumerate(arrays.values()):
        theory, measured = run["theory_largest_exponents"], run["largest_exponents"]
        style = _points(index)
        whole.plot(run["gains"], drawing.finite(theory), color=style["color"], linewidth=1.2)
        for axes, drawn in ((whole, measured), (difference, measured - theory[:, None])):
            _draw_mean_and_deviation(axes, run["gains"], drawing.finite(drawn), style)
    for axes, label in ((whole, "largest exponent λ₁"), (difference, "measured − theory")):
        axes.axhline(0, **_ZERO)
        axes.set(xlabel="gain $g$", ylabel=f"{label} (nats per step)")
    keys = {f"{label}, measured": _points(index) for index, label in enumerate(arrays)}
    drawing.add_legend(figure, keys | {"mean-field theory": _THEORY})
    values = [run[name] for run in arrays.values() for name in ("largest_exponents", "theory_largest_exponents")]
    note = "Points and bars: mean and standard deviation over networks."
    drawing.add_notes(figure, note, drawing.note_not_finite(values))
    return figure


def _draw_mean_and_deviation(axes: "Axes", x: np.ndarray, values: np.ndarray, style: Style) -> None:
    deviation = values.std(axis=1, ddof=min(1, values.shape[1] - 1))
    axes.errorbar(x, values.mean(axis=1), deviation, **style)


def spectrum_against_theory(runs: Runs) -> "Figure":
    """Draws every Lyapunov exponent λ_i against i/N, measured and in mean-field theory: a column a run.

    Markers are means over networks, bands reach from the smallest to the largest, lines are theory. The lower row
    shows the first quarter of the exponents at a larger scale.

    Args:
      runs: label -> ``spectrum_gains [Q]``, ``exponents [Q, n, N]`` and ``theory_exponents [Q, N]``, nats per step.

    Returns:
      The figure.

    Raises:
      ValueError: no runs; an array missing, empty or of another shape.

    Example:
      >>> import numpy as np
      >>> run = {"spectrum_gains": [2.0], "exponents": np.zeros([1, 3, 8]), "theory_exponents": np.zeros([1, 8])}
      >>> [axes.get_xlabel() for axes in spectrum_against_theory({"tanh": run}).axes]
      ['', 'share of exponents $i/N$']

    Source: R. Engelken, F. Wolf & L. F. Abbott, Lyapunov spectra of chaotic recurrent neural networks, Physical Review
    Research 5, 2023.
    """
    arrays = drawing.checked_runs(runs, ("spectrum_gains", "exponents", "theory_exponents"))
    gains = sorted({gain for run in arrays.values() for gain in run["spectrum_gains"].tolist()})
    styles = {gain: _points(index) for index, gain in enumerate(gains)}
    figure, grid = drawing.new_figure(2, len(arrays), height=2.7)
    for (whole, leading), (label, run) in zip(grid.T, arrays.items(), strict=True):
        count = run["exponents"].shape[-1]
        _draw_spectra(whole, run, styles, count)
        _draw_spectra(leading, run, styles, -(-count // 4))
        whole.set_title(label, fontsize="medium")
    drawing.label_axes(grid[0], "", r"all $\lambda_i$ (nats per step)")
    drawing.label_axes(grid[1], "share of exponents $i/N$", r"leading $\lambda_i$ (nats per step)")
    drawing.add_legend(figure, {f"gain $g$ = {gain:g}": style for gain, style in styles.items()})
    values = [run[name] for run in arrays.values() for name in ("exponents", "theory_exponents")]
    note = "Markers: mean over networks. Bands: smallest to largest. Lines: mean-field theory."
    drawing.add_notes(figure, note, drawing.note_not_finite(values))
    return figure


def _draw_spectra(axes: "Axes", run: Arrays, styles: dict[float, Style], shown: int) -> None:
    """Draws the leading exponents of each gain."""
    from matplotlib.ticker import MaxNLocator

    share = (np.arange(shown) + 0.5) / run["exponents"].shape[-1]
    for gain, measured, theory in zip(run["spectrum_gains"], run["exponents"], run["theory_exponents"], strict=True):
        style, values = styles[gain], drawing.finite(measured[:, :shown])
        axes.fill_between(share, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)
        axes.plot(share, values.mean(0), markevery=max(1, shown // 16), **style)
        axes.plot(share, drawing.finite(theory[:shown]), color=style["color"], linewidth=1.2)
    axes.axhline(0, **_ZERO)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def largest_exponent_of_gates(runs: Runs) -> "Figure":
    """Draws heat maps of the largest exponent over forget bias and gain, without and with input: a column a run.

    Colours are means over networks, on one scale that is linear within ±0.1 and logarithmic beyond; the black line is
    the contour λ₁ = 0. Without input the dashed line is the gain above which h = 0 is unstable.

    Args:
      runs: label -> ``gated_gains [G]``, positive, ``forget_biases [B]``, both ascending; ``critical_gains [B]``;
        ``autonomous_exponents`` and ``driven_exponents``, ``[G, B, n]`` nats per step.

    Returns:
      The figure.

    Raises:
      ValueError: no runs; an array missing, empty or of another shape.

    Example:
      >>> import numpy as np
      >>> run = {"gated_gains": [0.5, 1.0], "forget_biases": [0.0, 2.0], "critical_gains": [0.6, 0.7]}
      >>> exponents = np.array([[-1.0, -0.5], [0.2, 0.1]])[..., None]
      >>> run |= {"autonomous_exponents": exponents, "driven_exponents": exponents - 0.1}
      >>> [axes.get_title() for axes in largest_exponent_of_gates({"LSTM": run}).axes[:2]]
      ['LSTM, no input', 'LSTM, white-noise input']

    Source: T. Can, K. Krishnamurthy & D. J. Schwab, Gating creates slow modes and controls phase-space complexity in
    GRUs and LSTMs, 2020.
    """
    names = {"no input": "autonomous_exponents", "white-noise input": "driven_exponents"}
    arrays = drawing.checked_runs(runs, ("gated_gains", "forget_biases", "critical_gains", *names.values()))
    figure, grid = drawing.new_figure(2, len(arrays), height=2.9)
    norm = _diverging([drawing.mean(run[name], -1) for run in arrays.values() for name in names.values()])
    for row, (drive, name) in zip(grid, names.items(), strict=True):
        for axes, (label, run) in zip(row, arrays.items(), strict=True):
            image = _draw_heat_map(axes, run, drawing.mean(run[name], -1), norm)
            axes.set_title(f"{label}, {drive}", fontsize="medium")
    unstable: Style = {"color": "black", "linewidth": 1.6, "linestyle": "--"}
    for axes, run in zip(grid[0], arrays.values(), strict=True):
        axes.plot(run["forget_biases"], np.log2(run["critical_gains"]), **unstable)
    drawing.label_axes(grid[0], "", "gain of the recurrent weights")
    drawing.label_axes(grid[1], "bias of the gate that keeps the state", "gain of the recurrent weights")
    _add_color_bar(figure, image, grid)
    keys = {r"measured $\lambda_1 = 0$": unstable | {"linestyle": "-"}, "theory: $h = 0$ becomes unstable": unstable}
    drawing.add_legend(figure, keys)
    values = [run[name] for run in arrays.values() for name in names.values()]
    drawing.add_notes(figure, drawing.note_not_finite(values, "in grey"))
    return figure


def singular_values_against_exponents(runs: Runs) -> "Figure":
    """Draws log σ_i of products of T matrices beside QR sums Σ_t log|R_ii| and exponents: a column a run.

    Above, both per step: they converge to the exponents. Below, their difference in nats, which does not vanish.

    Args:
      runs: label -> ``product_lengths [P]``; ``log_singular_values`` and ``qr_sums``, ``[P, k]`` nats;
        ``product_exponents [k]`` nats per step; and ``exact_log_singular_values [P, k]`` where there are any.

    Returns:
      The figure.

    Raises:
      ValueError: no runs; an array missing, empty or of another shape.

    Example:
      >>> import numpy as np
      >>> run = {"product_lengths": [1, 2], "log_singular_values": np.ones([2, 1]), "qr_sums": np.zeros([2, 1])}
      >>> run["product_exponents"] = [0.0]
      >>> [axes.get_title() for axes in singular_values_against_exponents({"shears": run}).axes]
      ['products of shears', '']

    Source: G. Benettin et al., Lyapunov characteristic exponents for smooth dynamical systems, Meccanica 15, 1980.
    """
    names = ("product_lengths", "log_singular_values", "qr_sums", "product_exponents")
    arrays = drawing.checked_runs(runs, names)
    known = {label: run for label, run in runs.items() if "exact_log_singular_values" in run}
    exact = drawing.checked_runs(known, (*names, "exact_log_singular_values")) if known else {}
    figure, grid = drawing.new_figure(2, len(arrays), height=2.7)
    for (rate, difference), (label, run) in zip(grid.T, arrays.items(), strict=True):
        _draw_product(rate, difference, exact.get(label, run))
        rate.set_title(f"products of {label}", fontsize="medium")
    drawing.label_axes(grid[0], "", "growth (nats per step)")
    drawing.label_axes(grid[1], "number of matrices $T$", r"$\log\,\sigma_i\;-$ QR sum (nats)")
    grey = {"color": "0.3"}
    keys = {r"$\log\,\sigma_i$, coloured by $i$": _SINGULAR_VALUE | grey}
    keys |= {r"QR sum $\Sigma_t \log|R_{ii}|$": _QR_SUM | grey, r"exponent $\lambda_i$": _EXPONENT}
    drawing.add_legend(figure, keys | ({"closed form": _THEORY} if exact else {}))
    values = [run[name] for run in arrays.values() for name in names[1:]]
    drawing.add_notes(figure, drawing.note_not_finite(values))
    return figure


def _draw_product(rate: "Axes", difference: "Axes", run: Arrays) -> None:
    """Draws growth per step, and log σ_i minus QR sum, of one product."""
    lengths, exact = run["product_lengths"], run.get("exact_log_singular_values")
    for index, exponent in enumerate(run["product_exponents"]):
        color = {"color": drawing.run_style(index)["color"]}
        values, sums = run["log_singular_values"][:, index], run["qr_sums"][:, index]
        rate.axhline(exponent, **_EXPONENT)
        rate.plot(lengths, drawing.finite(values / lengths), **_SINGULAR_VALUE | color)
        rate.plot(lengths, drawing.finite(sums / lengths), **_QR_SUM | color)
        difference.plot(lengths, drawing.finite(values - sums), **_SINGULAR_VALUE | color)
        if exact is not None:
            rate.plot(lengths, exact[:, index] / lengths, **_THEORY)
            difference.plot(lengths, exact[:, index] - sums, **_THEORY)
    difference.axhline(0, **_ZERO)
    for axes in (rate, difference):
        axes.set_xscale("log")
        axes.set_xlim(lengths.min() / 1.4, lengths.max() * 1.4)  # Also where nothing can be drawn.
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _points(index: int) -> Style:
    return drawing.run_style(index) | {"linestyle": "none"}


def _diverging(means: Sequence[np.ndarray]) -> Any:
    """Returns a scale of colours that is symmetric about 0, where it is linear."""
    from matplotlib.colors import SymLogNorm

    largest = max(_LINEAR_BELOW, *(np.abs(values[np.isfinite(values)]).max(initial=0) for values in means))
    return SymLogNorm(_LINEAR_BELOW, vmin=-largest, vmax=largest)


def _draw_heat_map(axes: "Axes", run: Arrays, means: np.ndarray, norm: Any) -> Any:
    """Draws a map of exponents with its contour at 0, and returns the coloured mesh."""
    from matplotlib.ticker import MaxNLocator

    biases, gains = run["forget_biases"], np.log2(run["gated_gains"])
    values = np.ma.masked_invalid(means)
    axes.set_facecolor("0.5")
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_formatter(lambda power, _: f"{2**power:g}")
    mesh = axes.pcolormesh(drawing.edges(biases), drawing.edges(gains), values, norm=norm, cmap="RdBu_r")
    if min(values.shape) > 1 and values.min() < 0 < values.max():
        axes.contour(biases, gains, values, levels=[0], colors="black", linewidths=1.6)
    # A line drawn later must not make room for itself where nothing was measured.
    axes.set(xlim=drawing.edges(biases)[[0, -1]], ylim=drawing.edges(gains)[[0, -1]])
    return mesh


def _add_color_bar(figure: "Figure", image: Any, grid: np.ndarray) -> None:
    from matplotlib.ticker import SymmetricalLogLocator

    ticks = SymmetricalLogLocator(base=10, linthresh=_LINEAR_BELOW, subs=(1, 3))
    bar = figure.colorbar(image, ax=list(grid.flat), label="largest exponent λ₁ (nats per step)", pad=0.02, ticks=ticks)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
