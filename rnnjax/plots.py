"""Every figure, drawn from saved arrays; nothing is computed here but means and extremes over sequences.

Each function takes ``runs``, a mapping from a run's label to its arrays by name, and returns a matplotlib figure that
stands alone (no pyplot, no window). The legend keeps the order of ``runs``. Letters in shapes: L layers, M monitored
training steps, T sequence length, n sequences, k exponents, P lags, S state size, N training steps with metrics, E
evaluations. Matplotlib comes with ``rnnjax[experiments]``; it is imported, or asked for, when a figure is made.
"""

import io
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rnnjax import drawing
from rnnjax.drawing import Runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def spectral_norm_against_lag(runs: Runs, *, layer: int = -1) -> "Figure":
    """Draws log ‖∂s_T/∂s_{T−lag}‖₂ against the lag, at the first (dashed) and the last (solid) monitored step.

    Lines are means of the log norm over the sequences, bands reach from the smallest to the largest. The slope of a
    line tends to the largest Lyapunov exponent: below 0 gradients vanish with the lag, above 0 they can explode.

    Args:
      runs: label -> ``steps [M]`` and ``log_spectral_norms [M, L, T, n]`` in nats, entry i of T at lag i + 1.
      layer: which layer, as a Python index.

    Returns:
      The figure; it has one panel only where no run has a second monitored step.

    Raises:
      ValueError: no runs; an array missing, empty or of another shape; a layer that a run does not have.

    Example:
      >>> import numpy as np
      >>> run = {"steps": [0, 100], "log_spectral_norms": -0.7 * np.ones([2, 1, 8, 3])}
      >>> [axes.get_title() for axes in spectral_norm_against_lag({"vanilla": run}).axes]
      ['Before training (step 0)', 'After training (step 100)']

    Source: R. Pascanu et al., On the difficulty of training recurrent neural networks, ICML 2013.
    """
    arrays = drawing.checked_runs(runs, ("steps", "log_spectral_norms"), layer)
    figure, drawn = drawing.before_and_after(arrays)
    for axes, style, run in drawn:
        norms = run["log_spectral_norms"]
        lags = 1 + np.arange(len(norms))
        drawing.line(axes, lags, drawing.mean(norms, axis=-1), style)
        axes.fill_between(lags, norms.min(-1), norms.max(-1), color=style["color"], alpha=0.15, linewidth=0)
    drawing.mark_regions(figure.axes)
    norm = r"$\log\,\Vert\partial s_T\,/\,\partial s_{T-\mathrm{lag}}\Vert_2$ (nats)"
    drawing.label_axes(figure.axes, "lag (steps)", norm)
    drawing.add_powers_of_ten(figure.axes[-1])
    drawing.add_run_legend(figure, arrays)
    drawing.add_notes(figure, drawing.note_not_finite(run["log_spectral_norms"] for _, _, run in drawn))
    return figure


def hidden_gradient_against_time(runs: Runs, *, layer: int = -1) -> "Figure":
    """Draws ‖∂L/∂h_t‖ on a log axis against t, at the first (dashed) and the last (solid) monitored step.

    A norm that is exactly 0 has no place on a log axis: it is a marker without a line at the lower edge.

    Args:
      runs: label -> ``steps [M]`` and ``hidden_gradient_norms [M, L, T]`` in units of the loss per unit of h.
      layer: which layer, as a Python index.

    Returns:
      The figure; it has one panel only where no run has a second monitored step.

    Raises:
      ValueError: no runs; an array missing, empty or of another shape; a layer that a run does not have.

    Example:
      >>> import numpy as np
      >>> run = {"steps": [0], "hidden_gradient_norms": np.geomspace(1e-9, 1, 8).reshape(1, 1, 8)}
      >>> hidden_gradient_against_time({"vanilla": run}).axes[0].get_yscale()
      'log'

    Source: Y. Bengio et al., Learning long-term dependencies with gradient descent is difficult, 1994.
    """
    arrays = drawing.checked_runs(runs, ("steps", "hidden_gradient_norms"), layer)
    figure, drawn = drawing.before_and_after(arrays)
    for axes, style, run in drawn:
        norms = run["hidden_gradient_norms"]
        drawing.line_on_log_axis(axes, 1 + np.arange(len(norms)), norms, style)
    gradient = r"$\Vert\partial L\,/\,\partial h_t\Vert$ (loss per unit of $h_t$)"
    drawing.label_axes(figure.axes, "time step $t$", gradient)
    values = [run["hidden_gradient_norms"] for _, _, run in drawn]
    drawing.add_run_legend(figure, arrays)
    drawing.add_notes(figure, drawing.note_zeros(figure.axes[0], values), drawing.note_not_finite(values))
    return figure


def singular_values_against_lag(runs: Runs, *, layer: int = -1) -> "Figure":
    """Draws every log σ_i of ∂s_T/∂s_{T−lag} against the lag: a panel a run, before (grey) and after training.

    Lines are means over the sequences. Values of −inf (rank lost) cannot be drawn; the title counts them.

    Args:
      runs: label -> ``profile_lags [P]``, ``profile_initial`` and ``profile_final``, ``[L, P, n, S]`` in nats.
      layer: which layer, as a Python index.

    Returns:
      The figure. Each panel has its own scale, since spectra of different cells differ by hundreds of nats.

    Raises:
      ValueError: no runs; an array missing, empty or of another shape; a layer that a run does not have.

    Example:
      >>> import numpy as np
      >>> orthogonal = np.zeros([1, 2, 3, 4])
      >>> run = {"profile_lags": [1, 8], "profile_initial": orthogonal, "profile_final": orthogonal}
      >>> len(singular_values_against_lag({"vanilla": run}).axes[0].get_lines())  # 4 before, 4 after, the line at 0
      9
    """
    arrays = drawing.checked_runs(runs, ("profile_lags", "profile_initial", "profile_final"), layer)
    columns = min(3, len(arrays))
    figure, grid = drawing.new_figure(-(-len(arrays) // columns), columns, height=2.6)
    for axes in grid.flat[len(arrays) :]:
        axes.remove()
    for index, (axes, (label, run)) in enumerate(zip(figure.axes, arrays.items(), strict=True)):
        points = "o" if len(run["profile_lags"]) == 1 else ""
        for name, color in (("profile_initial", "0.65"), ("profile_final", drawing.run_style(index)["color"])):
            spectra = drawing.finite(drawing.mean(run[name], axis=1))
            axes.plot(run["profile_lags"], spectra, color=color, marker=points, linewidth=0.8, alpha=0.7)
        note = drawing.note_not_finite([run["profile_initial"], run["profile_final"]])
        axes.set_title("\n".join(filter(None, [label, note])), fontsize="medium")
        drawing.mark_regions([axes])
    drawing.label_axes(figure.axes, "lag (steps)", r"$\log\,\sigma_i$ (nats)")
    drawing.add_legend(figure, {"before training": {"color": "0.65"}, "after training (in colour)": {"color": "0"}})
    return figure


def spectrum_over_training(runs: Runs, *, layer: int = -1) -> "Figure":
    """Draws two heat maps a run over the training steps: the log spectral norm by lag, and the finite-time exponents.

    Colours are means over the sequences. All runs share the two scales, centred at 0: linear near 0 and logarithmic
    beyond, so that both a slow drift and a collapse can be seen.

    Args:
      runs: label -> ``steps [M]``, ``log_spectral_norms [M, L, T, n]`` in nats, entry i of T at lag i + 1, and
        ``finite_time_exponents [M, L, k, n]`` in nats per step, descending.
      layer: which layer, as a Python index.

    Returns:
      The figure.

    Raises:
      ValueError: no runs; an array missing, empty or of another shape; a layer that a run does not have.

    Example:
      >>> import numpy as np
      >>> run = {"steps": [0, 50], "log_spectral_norms": np.zeros([2, 1, 8, 3])}
      >>> run["finite_time_exponents"] = np.zeros([2, 1, 4, 3])
      >>> [axes.get_ylabel() for axes in spectrum_over_training({"vanilla": run}).axes][:2]
      ['lag (steps)', 'exponent (index)']
    """
    names = ("log_spectral_norms", "finite_time_exponents")
    arrays = drawing.checked_runs(runs, ("steps", *names), layer)
    figure, grid = drawing.new_figure(2, len(arrays), height=2.5, sharex="col", sharey="row")
    drawing.heat_maps(grid[0], arrays, names[0], "log spectral norm\n(nats)", linear_below=1.0)
    drawing.heat_maps(grid[1], arrays, names[1], "finite-time exponent\n(nats per step)", linear_below=0.1)
    for axes, label in zip(grid[0], arrays, strict=True):
        axes.set_title(textwrap.fill(label, 90 // max(4, len(arrays))), fontsize="medium")
    grid[1, 0].invert_yaxis()
    drawing.label_axes(grid[0], "", "lag (steps)")
    drawing.label_axes(grid[1], "training step", "exponent (index)")
    not_finite = drawing.note_not_finite([run[name] for run in arrays.values() for name in names], "in grey")
    drawing.add_notes(figure, not_finite)
    return figure


def training_curves(runs: Runs) -> "Figure":
    """Draws the training loss, the held-out accuracy and the gradient norm before and after clipping.

    Args:
      runs: label -> ``metric_step``, ``loss``, ``gradient_norm`` and ``gradient_norm_clipped``, ``[N]`` each, and
        ``evaluation_step`` and ``evaluation_accuracy`` in [0, 1], ``[E]`` each; N and E may be 0.

    Returns:
      The figure.

    Raises:
      ValueError: no runs; an array missing or of another shape.

    Example:
      >>> run = {"metric_step": [1, 2], "loss": [2.3, 2.1], "gradient_norm": [4.0, 0.5]}
      >>> run |= {"gradient_norm_clipped": [1.0, 0.5], "evaluation_step": [2], "evaluation_accuracy": [0.4]}
      >>> [axes.get_ylabel() for axes in training_curves({"LSTM": run}).axes]
      ['training loss', 'held-out accuracy (%)', 'gradient norm before clipping', 'gradient norm after clipping']
    """
    metrics = ("loss", "gradient_norm", "gradient_norm_clipped")
    arrays = drawing.checked_runs(runs, ("metric_step", *metrics, "evaluation_step", "evaluation_accuracy"))
    figure, ((loss, accuracy), (before, after)) = drawing.new_figure(2, 2, height=2.7)
    after.sharey(before)
    for index, run in enumerate(arrays.values()):
        style = drawing.run_style(index)
        drawing.line(accuracy, run["evaluation_step"], 100 * run["evaluation_accuracy"], style)
        for axes, name in zip((loss, before, after), metrics, strict=True):
            drawing.line_on_log_axis(axes, run["metric_step"], run[name], style | {"linewidth": 0.8})
    accuracy.set_ylim(-3, 103)
    names = ("training loss", "held-out accuracy (%)", "gradient norm before clipping", "gradient norm after clipping")
    for axes, name in zip(figure.axes, names, strict=True):
        axes.set(ylabel=name, xlabel="training step")
    figure.align_ylabels()
    losses = [run["loss"] for run in arrays.values()]
    norms = [run[name] for run in arrays.values() for name in ("gradient_norm", "gradient_norm_clipped")]
    zeros = drawing.note_zeros(loss, losses), drawing.note_zeros(before, norms)
    drawing.plain_log_ticks(loss)
    drawing.add_run_legend(figure, arrays)
    drawing.add_notes(figure, max(zeros), drawing.note_not_finite(losses + norms))
    return figure


def save_figure(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Writes a figure as a PNG file 900 pixels wide, of 256 colours, which keeps it small enough for a repository.

    Args:
      figure: the figure.
      path: where to, ending in ``.png``; a file that exists is replaced.

    Raises:
      ValueError: the path does not end in ``.png``.
      OSError: the file cannot be written.

    Example:
      >>> import tempfile, numpy as np
      >>> run = {"steps": [0], "hidden_gradient_norms": np.ones([1, 1, 8])}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_figure(hidden_gradient_against_time({"GRU": run}), f"{folder}/hidden_gradient.png")
    """
    from PIL import Image

    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"path must end in .png, got {os.fspath(path)!r}")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=drawing.DOTS_PER_INCH, format="png")
    Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)
