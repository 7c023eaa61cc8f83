"""What each remedy for exploding gradients changes, from two starts that explode, on the adding problem.

  python -m experiments.exploding_remedies --workdir=results/exploding_remedies

One start is a ReLU network whose recurrent matrix is the identity times 1.05, whose states have no bound; the other a
tanh network with an orthogonal matrix times 3, whose gradient explodes while its states cannot. Both descend by plain
SGD. Each remedy is that run with what the table says changed. Measured, for several seeds: the norm of the gradient
before and after clipping at every step; the steps skipped because a gradient was not finite, and the pass, layer and
time step in which the first such value arose; log ‖∂s_T/∂s_0‖₂ before and after training; held-out loss and accuracy.
Ctrl-C keeps the remedies that are done, with their tables and figures.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import measures, options
from experiments.ensembles import Ensemble, train_ensemble
from experiments.vanishing_remedies import spread
from rnnjax import comparison_plots, plots, validation
from rnnjax.configuration import RunConfig
from rnnjax.workdir import Workdir

FLAGS = flags.FLAGS
CONFIG_FLAGS = {
    "num_seeds": "networks trained with each remedy",
    "steps": "training steps",
    "adding_length": "steps T of the adding problem",
    "hidden_size": "units of the network",
}
FULL = {"num_seeds": 10, "steps": 10_000, "adding_length": 100, "hidden_size": 100}
STARTS: dict[str, dict[str, Any]] = {
    "relu": {"activation": "relu", "initializer": "identity", "gain": 1.05, "learning_rate": 0.05},
    "tanh": {"activation": "tanh", "initializer": "orthogonal", "gain": 3.0, "learning_rate": 0.05},
}
TITLES = {"relu": "ReLU, 1.05 × identity", "tanh": "tanh, 3 × orthogonal"}
REMEDIES: dict[str, dict[str, Any]] = {
    "none": {},
    "clip by value": {"clip_value": 0.01},
    "clip by global norm": {"clip_norm": 1.0},
    "clip adaptively": {"clip_ratio": 0.1},
    "clip by step": {"clip_carry": 0.01},
    "clip by step and norm": {"clip_carry": 0.01, "clip_norm": 1.0},
    "truncate to 10 steps": {"truncation": 10},
    "learning rate / 10³": {"learning_rate": 5e-5},
    "learning rate / 10⁵": {"learning_rate": 5e-7},
    "gain 1": {"gain": 1.0},
    "orthogonal of gain 1": {"initializer": "orthogonal", "gain": 1.0},
}
JUMP = 10.0
"""A training loss this many times that of the best answer that remembers nothing counts as a jump."""
_MEASURED_SEQUENCES = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained.

    Attributes:
      num_seeds: networks trained with each remedy.
      steps: training steps.
      adding_length: steps T of the adding problem.
      hidden_size: units of the network.
      batch_size: sequences in a training step.
      num_evaluations: evaluations on held-out data during training.
      seed: the first seed.
      remedies: which remedies to try.
    """

    num_seeds: int = 5
    steps: int = 1500
    adding_length: int = 50
    hidden_size: int = 32
    batch_size: int = 32
    num_evaluations: int = 15
    seed: int = 0
    remedies: tuple[str, ...] = tuple(REMEDIES)

    def __post_init__(self) -> None:
        for name in (*CONFIG_FLAGS, "batch_size", "num_evaluations"):
            validation.positive_integer(name, getattr(self, name))
        if not self.remedies:
            raise ValueError("remedies must name at least one remedy, got none")
        for remedy in self.remedies:
            validation.one_of("remedies", remedy, REMEDIES)
        self.run("relu", "none").make_task()

    def run(self, start: str, remedy: str) -> RunConfig:
        """Returns the training run from one of the starts with one of the remedies."""
        return RunConfig(
            task="adding",
            length=self.adding_length,
            hidden_size=self.hidden_size,
            optimizer="sgd",
            steps=self.steps,
            batch_size=self.batch_size,
            evaluate_every=-(-self.steps // self.num_evaluations),
            seed=self.seed,
            **{"clip_norm": 0.0} | STARTS[start] | REMEDIES[remedy],
        )

    def runs(self, start: str) -> dict[str, RunConfig]:
        """Returns the training runs from one start by remedy, without those that are the same as one before."""
        found: dict[str, RunConfig] = {}
        for remedy in self.remedies:
            settings = self.run(start, remedy)
            if settings not in found.values():
                found[remedy] = settings
        return found


def train(name: str, run: RunConfig, num_seeds: int) -> dict[str, np.ndarray]:
    """Trains with one remedy; returns what is measured, by name, for n seeds and N steps.

    ``gradient_norm``, ``gradient_norm_clipped``, ``skipped`` and ``training_loss``, ``[n, N]``; ``evaluation_steps
    [E]``; held-out ``loss`` and ``accuracy``, ``[n, E]``; ``log_spectral_norm [n, 2]`` before and after training;
    ``origin_step``, ``origin_layer`` and ``origin_time [n]``, −1 where there is none, and ``origin_pass [n]``, of the
    first non-finite value; ``baseline_loss``; ``seconds``.
    """
    ensemble, task = train_ensemble(name, run, num_seeds), run.make_task()
    norms = []
    for index in range(num_seeds):
        inputs = task.batch(run.seed + index, run.steps, _MEASURED_SEQUENCES).inputs
        states = [measures.spectral_state(ensemble.network(index, trained=end), inputs) for end in (False, True)]
        norms.append([state["log_spectral_norm"] for state in states])
    return {
        **{key: ensemble.metrics[key] for key in ("gradient_norm", "gradient_norm_clipped", "skipped")},
        "training_loss": ensemble.metrics["loss"],
        "evaluation_steps": ensemble.evaluation_steps,
        "loss": ensemble.held_out["loss"],
        "accuracy": ensemble.held_out["accuracy"],
        "log_spectral_norm": np.array(norms),
        **origins(ensemble),
        "baseline_loss": np.asarray(task.baseline_loss),
        "seconds": np.asarray(ensemble.seconds),
    }


def origins(ensemble: Ensemble) -> dict[str, np.ndarray]:
    """Returns where the first non-finite value of each network arose, as arrays."""
    keys = {"origin_step": "training_step", "origin_layer": "non_finite_layer", "origin_time": "non_finite_step"}
    found = {name: np.array([own.get(key, -1) for own in ensemble.origins]) for name, key in keys.items()}
    return found | {"origin_pass": np.array([own.get("non_finite_pass", "") for own in ensemble.origins])}


def table_row(remedy: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the line of one remedy: medians over the seeds, with their range."""
    skipped = arrays["skipped"].astype(bool)
    before, after = (np.where(skipped, np.nan, arrays[key]) for key in ("gradient_norm", "gradient_norm_clipped"))
    jumps = ~(arrays["training_loss"] <= JUMP * arrays["baseline_loss"])
    late = slice(arrays["training_loss"].shape[1] // 2, None)
    return {
        "remedy": remedy,
        "gradient at start": spread(before[:, 0]),
        "largest": spread(_largest(before)),
        "largest clipped": spread(_largest(after)),
        "skipped": spread(skipped.sum(axis=1), digits=6),
        "loss jumps, 2nd half": spread(jumps[:, late].sum(axis=1), digits=6),
        "log‖∂s_T/∂s_0‖ start": f"{np.median(arrays['log_spectral_norm'][:, 0]):.3g}".replace("-", "−"),
        "end": spread(arrays["log_spectral_norm"][:, 1]),
        "loss": spread(arrays["loss"][:, -1]),
        "accuracy": spread(arrays["accuracy"][:, -1]),
    }


def _largest(norms: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(norms), -np.inf, norms).max(axis=1)


def origin_rows(start: str, remedy: str, config: Config, arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Returns a line for each network that met a value that is not finite."""
    rows = []
    for index, step in enumerate(arrays["origin_step"]):
        if step < 0:
            continue
        row: dict[str, Any] = {"start": TITLES[start], "remedy": remedy, "seed": config.seed + index}
        row |= {"training step": step, "pass": str(arrays["origin_pass"][index])}
        located = arrays["origin_time"][index] >= 0
        row |= {"layer": int(arrays["origin_layer"][index]) if located else "–"}
        row |= {"time step": int(arrays["origin_time"][index]) if located else "–"}
        before = arrays["gradient_norm"][index, step - 1] if step > 0 else np.nan
        rows.append(row | {"gradient one step before": before, "steps skipped": arrays["skipped"][index].sum()})
    return rows


CAPTION = """\
Medians over {num_seeds} seeds, [smallest, largest]. gradient: its global norm in steps that were taken; clipped: what
the optimiser was given. skipped: steps whose gradient was not finite. jumps: steps in the second half whose training
loss was above ten times {baseline:.3g}, the held-out loss of the best answer that remembers nothing, or not a number.
Layers and steps are counted from 0; a state that overflows does so in the forward pass.
"""


def write_report(config: Config, workdir: Workdir) -> None:
    """Prints and writes the tables and draws the figure from the saved arrays of the remedies that are done."""
    results = {start: finished(workdir, start) for start in STARTS}
    results = {start: runs for start, runs in results.items() if runs}
    for start, runs in results.items():
        rows = [table_row(remedy, arrays) for remedy, arrays in runs.items()]
        sys.stdout.write(f"\n{TITLES[start]}\n{workdir.write_table(f'table_{start}', rows)}\n")
    pairs = [(start, name, arrays) for start, runs in results.items() for name, arrays in runs.items()]
    lines = [line for start, name, arrays in pairs for line in origin_rows(start, name, config, arrays)]
    if lines:
        sys.stdout.write(f"\nfirst value that is not finite\n{workdir.write_table('table_origins', lines)}\n")
    figures = {"exploding_remedies": comparison_plots.results_by_remedy({TITLES[k]: v for k, v in results.items()})}
    for start, runs in results.items():
        figures[f"exploding_gradient_norms_{start}"] = comparison_plots.gradient_norms_by_remedy(runs)
    for name, figure in figures.items():
        plots.save_figure(figure, workdir.path / f"{name}.png")
    caption = CAPTION.format(num_seeds=config.num_seeds, baseline=pairs[0][2]["baseline_loss"])
    sys.stdout.write(f"\n{caption}Results are in {workdir.path}\n")


def finished(workdir: Workdir, start: str) -> dict[str, dict[str, np.ndarray]]:
    """Returns the arrays of the remedies that are done."""
    names = {remedy: file_name(start, remedy) for remedy in REMEDIES}
    return {
        remedy: workdir.load_arrays(name) for remedy, name in names.items() if (workdir.path / f"{name}.npz").exists()
    }


def file_name(start: str, remedy: str) -> str:
    """Returns the name of the arrays of one run."""
    return f"{start}_{list(REMEDIES).index(remedy):02d}"


def train_all(config: Config, workdir: Workdir) -> None:
    """Trains with every remedy and saves what is measured below ``workdir``."""
    for start in STARTS:
        runs = config.runs(start)
        for index, (remedy, settings) in enumerate(runs.items()):
            label = f"{TITLES[start]} {index + 1}/{len(runs)}, {remedy}"
            workdir.save_arrays(file_name(start, remedy), **train(label, settings, config.num_seeds))


def run(config: Config, workdir: Workdir) -> int:
    """Trains everything and writes all results below ``workdir``; returns the exit status."""
    arguments = (config, workdir)
    return options.measure_and_report(lambda: train_all(*arguments), lambda: write_report(*arguments), workdir)


def main(argv: Sequence[str]) -> int:
    """Reads the flags and runs."""
    with options.user_errors():
        options.no_arguments(argv)
        sizes = {name: FLAGS[name].value for name in CONFIG_FLAGS} | options.larger_settings(FULL)
        config = Config(remedies=tuple(FLAGS.remedies), **sizes)
        workdir = options.open_workdir(config)
    return run(config, workdir)


if __name__ == "__main__":
    options.define_integer_flags(Config, CONFIG_FLAGS, FULL)
    flags.DEFINE_list("remedies", list(REMEDIES), "which remedies to try")
    options.define_workdir_flag("results/exploding_remedies")
    flags.adopt_module_key_flags(options)
    options.run(main)
