"""What each remedy for vanishing gradients changes, on the adding problem and on language recall.

  python -m experiments.vanishing_remedies --workdir=results/vanishing_remedies

The start is a tanh network whose recurrent matrix is half an orthogonal one, so that ‖∂s_T/∂s_0‖₂ ≤ 2^−T at every
input. Each remedy is that network with what the table says, and nothing else, changed. Measured on the last recurrent
layer before and after training, for several seeds: log ‖∂s_T/∂s_0‖₂ and the largest finite-time exponent, the memory
horizon of the loss gradient, held-out loss and accuracy, and the steps until the task is solved. Ctrl-C keeps the
remedies that are done, with their table and figures.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from flax import nnx

from experiments import measures, options
from experiments.ensembles import Ensemble, train_ensemble
from rnnjax import comparison_plots, plots, validation
from rnnjax.configuration import RunConfig
from rnnjax.mean_field import critical_gain
from rnnjax.models import layer_views
from rnnjax.workdir import Workdir

FLAGS = flags.FLAGS
CONFIG_FLAGS = {
    "num_seeds": "networks trained for each remedy",
    "steps": "training steps on the adding problem",
    "recall_steps": "training steps on language recall",
    "adding_length": "steps of the adding problem",
    "recall_distance": "words between cue and answer in language recall",
    "hidden_size": "units in each layer",
}
FULL = {"num_seeds": 5, "steps": 6000, "recall_steps": 6000, "adding_length": 100, "recall_distance": 60}
TASKS = {"adding": "adding problem", "language_recall": "language recall"}
KINDS = ("none", "activation", "initialisation", "skip in time", "skip in depth", "penalty", "gated cell")
CRITICAL = "tanh, Gaussian of critical gain"
SOLVED = 0.1
"""A task is solved at this share of the loss of the best answer that remembers nothing."""
_MEASURED_SEQUENCES = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained.

    Attributes:
      num_seeds: networks trained for each remedy.
      steps: training steps on the adding problem.
      recall_steps: training steps on language recall.
      adding_length: T of the adding problem.
      recall_distance: words between cue and answer in language recall, T − 5.
      hidden_size: units in each layer.
      batch_size: sequences in a training step.
      learning_rate: Adam's.
      num_evaluations: evaluations on held-out data during training.
      seed: the first seed.
      kinds: which kinds of remedies to try.
    """

    num_seeds: int = 3
    steps: int = 800
    recall_steps: int = 600
    adding_length: int = 50
    recall_distance: int = 20
    hidden_size: int = 32
    batch_size: int = 32
    learning_rate: float = 0.005
    num_evaluations: int = 10
    seed: int = 0
    kinds: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        for name in (*CONFIG_FLAGS, "batch_size", "num_evaluations"):
            validation.positive_integer(name, getattr(self, name))
        if not self.kinds:
            raise ValueError("kinds must name at least one kind of remedy, got none")
        for kind in self.kinds:
            validation.one_of("kinds", kind, KINDS)
        for task in TASKS:
            self.run(task).make_task()

    def run(self, task: str, **remedy: Any) -> RunConfig:
        """Returns the training run of the network that vanishes, with a remedy."""
        length, steps = {
            "adding": (self.adding_length, self.steps),
            "language_recall": (self.recall_distance, self.recall_steps),
        }[task]
        start: dict[str, Any] = {"initializer": "orthogonal", "gain": 0.5}
        return RunConfig(
            task=task,
            length=length,
            hidden_size=self.hidden_size,
            learning_rate=self.learning_rate,
            steps=steps,
            batch_size=self.batch_size,
            evaluate_every=-(-steps // self.num_evaluations),
            seed=self.seed,
            **start | remedy,
        )

    def remedies(self, task: str) -> dict[str, tuple[str, RunConfig]]:
        """Returns, by the name of the remedy, its kind and its training run."""
        task_length = self.run(task).make_task().sequence_length
        skips: dict[str, Any] = {"span": 8, "skip": 0.5}
        remedies: dict[str, dict[str, dict[str, Any]]] = {
            "none": {"tanh, ½ orthogonal": {}},
            "activation": {f"{name}": {"activation": name} for name in ("relu", "leaky_relu", "elu", "softplus")},
            "initialisation": {
                "tanh, Glorot": {"initializer": "glorot", "gain": 1.0},
                "tanh, orthogonal": {"gain": 1.0},
                CRITICAL: {"initializer": "gaussian", "gain": self.critical_gain(task)},
                "relu, He": {"activation": "relu", "initializer": "he", "gain": 1.0},
                "relu, identity": {"activation": "relu", "initializer": "identity", "gain": 1.0},
            },
            "skip in time": {
                "leak 0.1": {"cell": "leaky", "leak": 0.1},
                "from h_(t−8)": {"cell": "skip", **skips},
                "leak 0.1 and h_(t−8)": {"cell": "skip", "leak": 0.1, **skips},
            },
            "skip in depth": {
                "two layers, none": {"num_layers": 2},
                "two layers, skip": {"num_layers": 2, "skip_connections": True},
            },
            "penalty": {"Pascanu's Ω": {"penalty": "vanishing_gradient"}, "flossing": {"penalty": "flossing"}},
            "gated cell": {
                "LSTM, forget bias 0": {"cell": "lstm", "forget_bias": 0.0},
                "LSTM, forget bias 1": {"cell": "lstm", "forget_bias": 1.0},
                "LSTM, chrono": {"cell": "lstm", "chrono": task_length},
                "GRU": {"cell": "gru"},
                "GRU, chrono": {"cell": "gru", "chrono": task_length},
            },
        }
        return {
            name: (kind, self.run(task, **remedy)) for kind in self.kinds for name, remedy in remedies[kind].items()
        }

    def critical_gain(self, task: str) -> float:
        """Returns σ_w on the critical line of mean-field theory, with what the inputs add as the variance σ_b²."""
        run = self.run(task)
        made = run.make_task()
        graph, weights = nnx.split(run.make_network(made))
        view = layer_views(graph, weights, made.batch(run.seed, run.steps, _MEASURED_SEQUENCES).inputs)[0]
        drive = np.einsum("tbd,dgh->tbgh", view.inputs, view.params.input_kernel)
        return critical_gain("tanh", bias_variance=float(np.mean(drive**2)))


def train(name: str, run: RunConfig, num_seeds: int) -> dict[str, np.ndarray]:
    """Trains with one remedy; returns what is measured, by name, for n seeds.

    ``log_spectral_norm``, ``exponent``, ``horizon`` and ``share_within``, as ``measures.measure`` gives them, before
    and after training, ``[n, 2]``; ``evaluation_steps [E]``; held-out ``loss`` and ``accuracy``, ``[n, E]``;
    ``steps_to_solve [n]``, NaN where never; ``baseline_loss`` and ``baseline_accuracy``; ``seconds``.
    """
    ensemble, task = train_ensemble(name, run, num_seeds), run.make_task()
    batches = [task.batch(run.seed + index, run.steps, _MEASURED_SEQUENCES) for index in range(num_seeds)]
    rows = [
        [measures.measure(ensemble.network(index, trained=trained), task, batch) for trained in (False, True)]
        for index, batch in enumerate(batches)
    ]
    measured = {key: np.array([[moment[key] for moment in row] for row in rows]) for key in rows[0][0]}
    return measured | {
        "evaluation_steps": ensemble.evaluation_steps,
        "loss": ensemble.held_out["loss"],
        "accuracy": ensemble.held_out["accuracy"],
        "steps_to_solve": steps_to_solve(ensemble, SOLVED * task.baseline_loss),
        "baseline_loss": np.asarray(task.baseline_loss),
        "baseline_accuracy": np.asarray(task.baseline_accuracy),
        "seconds": np.asarray(ensemble.seconds),
    }


def steps_to_solve(ensemble: Ensemble, loss: float) -> np.ndarray:
    """Returns after how many steps each network's held-out loss was first seen at ``loss`` or below; NaN if never."""
    solved = ensemble.held_out["loss"] <= loss
    return np.where(solved.any(axis=1), ensemble.evaluation_steps[solved.argmax(axis=1)], np.nan)


def table_row(kind: str, remedy: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the line of one remedy: medians over the seeds, with their range where they end."""
    row: dict[str, Any] = {"kind": kind, "remedy": remedy}
    for label, key in (("log‖∂s_T/∂s_0‖", "log_spectral_norm"), ("exponent", "exponent"), ("horizon", "horizon")):
        row |= {f"{label} start": f"{np.median(arrays[key][:, 0]):.3g}".replace("-", "−")}
        row |= {f"{label} end": spread(arrays[key][:, 1])}
    row |= {"loss": spread(arrays["loss"][:, -1]), "accuracy": spread(arrays["accuracy"][:, -1])}
    solved = arrays["steps_to_solve"]
    count = int(np.isfinite(solved).sum())
    return row | {"solved": f"{count}/{len(solved)}", "steps": spread(solved[np.isfinite(solved)])}


def spread(values: np.ndarray, digits: int = 3) -> str:
    """Returns the median and, in brackets, the smallest and the largest of some values; a dash where there are none."""
    if len(values) == 0:
        return "–"
    shown = [f"{value:.{digits}g}" for value in (np.median(values), np.min(values), np.max(values))]
    return "{} [{}, {}]".format(*shown).replace("-", "−")


CAPTION = """\
Medians over {num_seeds} seeds, [smallest, largest]. start and end: before and after training. ‖∂s_T/∂s_0‖: spectral
norm, in nats; exponent: the same over T. horizon: lag in steps from which on 90 % of the loss gradient is gathered.
solved: held-out loss seen at or below a tenth of that of the best answer that remembers nothing ({baselines}); steps:
those until then. loss and accuracy are held-out, at the end. All but these: measured on the last recurrent layer.
"""


def write_report(config: Config, workdir: Workdir) -> None:
    """Prints and writes the tables and draws the figures from the saved arrays of the remedies that are done."""
    results = {task: finished(config, workdir, task) for task in TASKS}
    results = {task: runs for task, runs in results.items() if runs}
    for task, runs in results.items():
        rows = [table_row(kind, remedy, arrays) for remedy, (kind, arrays) in runs.items()]
        sys.stdout.write(f"\n{TASKS[task]}\n{workdir.write_table(f'table_{task}', rows)}\n")
    arrays = {TASKS[task]: {name: own for name, (_, own) in runs.items()} for task, runs in results.items()}
    kinds = {name: kind for runs in results.values() for name, (kind, _) in runs.items()}
    figures = {
        "vanishing_remedies": comparison_plots.remedies_for_vanishing(arrays, kinds),
    }
    for name, figure in figures.items():
        plots.save_figure(figure, workdir.path / f"{name}.png")
    baselines = ", ".join(f"{next(iter(own.values()))['baseline_loss']:.3g} in {task}" for task, own in arrays.items())
    caption = CAPTION.format(num_seeds=config.num_seeds, baselines=baselines)
    sys.stdout.write(f"\n{caption}Results are in {workdir.path}\n")


def finished(config: Config, workdir: Workdir, task: str) -> dict[str, tuple[str, dict[str, np.ndarray]]]:
    """Returns, by remedy, the kind and the arrays of those that are done."""
    remedies = enumerate(config.remedies(task).items())
    names = {remedy: (kind, file_name(task, index)) for index, (remedy, (kind, _)) in remedies}
    return {
        remedy: (kind, workdir.load_arrays(name))
        for remedy, (kind, name) in names.items()
        if (workdir.path / f"{name}.npz").exists()
    }


def file_name(task: str, index: int) -> str:
    """Returns the name of the arrays of remedy number ``index``."""
    return f"{task}_{index:02d}"


def train_all(config: Config, workdir: Workdir) -> None:
    """Trains with every remedy and saves what is measured below ``workdir``."""
    for task in TASKS:
        remedies = config.remedies(task)
        for index, (name, (_, settings)) in enumerate(remedies.items()):
            label = f"{TASKS[task]} {index + 1}/{len(remedies)}, {name}"
            workdir.save_arrays(file_name(task, index), **train(label, settings, config.num_seeds))


def run(config: Config, workdir: Workdir) -> int:
    """Trains everything and writes all results below ``workdir``; returns the exit status."""
    arguments = (config, workdir)
    return options.measure_and_report(lambda: train_all(*arguments), lambda: write_report(*arguments), workdir)


def main(argv: Sequence[str]) -> int:
    """Reads the flags and runs."""
    with options.user_errors():
        options.no_arguments(argv)
        sizes = {name: FLAGS[name].value for name in CONFIG_FLAGS} | options.larger_settings(FULL)
        config = Config(kinds=tuple(FLAGS.kinds), **sizes)
        workdir = options.open_workdir(config)
    return run(config, workdir)


if __name__ == "__main__":
    options.define_integer_flags(Config, CONFIG_FLAGS, FULL)
    flags.DEFINE_list("kinds", list(KINDS), "which kinds of remedies to try")
    options.define_workdir_flag("results/vanishing_remedies")
    flags.adopt_module_key_flags(options)
    options.run(main)
