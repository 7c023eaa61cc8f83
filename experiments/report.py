"""The table and the figures of an experiment, made from the files of its runs."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.runs import TABLE_CAPTION, load_run
from rnnjax import plots
from rnnjax.workdir import Workdir

FIGURES = {
    "spectral_norm_against_lag": plots.spectral_norm_against_lag,
    "hidden_gradient_against_time": plots.hidden_gradient_against_time,
    "singular_values_against_lag": plots.singular_values_against_lag,
    "spectrum_over_training": plots.spectrum_over_training,
    "training_curves": plots.training_curves,
}


def write_report(workdir: Workdir, directories: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the table, writes it as text and CSV, and draws every figure the runs have the arrays for.

    Args:
      workdir: where everything goes.
      directories: label of each run, and its directory below ``workdir``.
      rows: the table.
    """
    sys.stdout.write(f"\n{workdir.write_table('table', rows)}\n\n{TABLE_CAPTION}\n")
    runs = {label: load_run(workdir.path / directory) for label, directory in directories.items()}
    measured = {label: arrays for label, arrays in runs.items() if "steps" in arrays}
    for name, draw in FIGURES.items():
        drawn = runs if draw is plots.training_curves else measured
        if drawn:
            plots.save_figure(draw(drawn), workdir.path / f"{name}.png")
    sys.stdout.write(f"Results are in {workdir.path}\n")
