"""How far back networks learn to remember: language recall at growing distances, and where the gradient comes from.

  python -m experiments.long_term_dependency --workdir=results/long_term_dependency

"I grew up in Maharashtra . … I speak fluent" asks for "Marathi", a number of words after the word that decides. Plain,
gated and remedied networks are trained at every distance, several seeds each; written to --workdir are their held-out
accuracies and, at one distance, the share of the loss gradient that each lag contributes before and after training, as
arrays, tables and figures. Ctrl-C keeps and reports the networks that are done.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

import rnnjax
from experiments import measures, options
from experiments.ensembles import Ensemble, train_ensemble
from rnnjax import dependency_plots, plots, validation
from rnnjax.configuration import RunConfig
from rnnjax.tasks import Task
from rnnjax.workdir import Workdir

FLAGS = flags.FLAGS
SLOW, FAST = {"learning_rate": 3e-3}, {"learning_rate": 1e-2}
"""Of these two the one at which a kind of network learned better in a few short trials."""
BY_LENGTH = "by length"
"""In place of a setting: the longest memory of chrono gates is the sequence length, the span of a skip a quarter of the
distance, so that four of them bridge it."""
NETWORKS: dict[str, dict[str, Any]] = {
    # Uniform in ±1/√H, as PyTorch's recurrent layers start.
    "vanilla": {"initializer": "glorot", "gain": 1 / math.sqrt(3), **SLOW},
    "vanilla, orthogonal": {"initializer": "orthogonal", **SLOW},
    "vanilla, skip": {"cell": "skip", "span": BY_LENGTH, **FAST},
    "LSTM": {"cell": "lstm", **FAST},
    "LSTM, chrono": {"cell": "lstm", "chrono": BY_LENGTH, **FAST},
    "GRU": {"cell": "gru", **FAST},
    "GRU, chrono": {"cell": "gru", "chrono": BY_LENGTH, **FAST},
}
"""What tells the networks apart."""
CONFIG_FLAGS = ("hidden_size", "steps", "batch_size", "clip_norm", "evaluate_every", "seed")
DEFAULTS = {"hidden_size": 32, "steps": 400, "batch_size": 16, "evaluate_every": 50}
FULL = {"hidden_size": 128, "steps": 4000, "batch_size": 64, "evaluate_every": 200, "num_seeds": 8}
SOLVED = 0.9
"""Accuracy from which on a distance counts as bridged."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained and measured.

    Attributes:
      training: what all networks have in common.
      distances: numbers of words to remember over.
      num_seeds: networks trained of each kind at each distance.
      share_distance: distance at which the gradient is split by lag, one of ``distances``.
    """

    training: RunConfig = dataclasses.field(default_factory=lambda: RunConfig(task="language_recall", **DEFAULTS))
    distances: tuple[int, ...] = (5, 20, 50, 100, 200)
    num_seeds: int = 3
    share_distance: int = 50

    def __post_init__(self) -> None:
        if not self.distances or list(self.distances) != sorted(set(self.distances)):
            raise ValueError(f"distances must ascend, at least one, got {list(self.distances)}")
        for distance in self.distances:
            dataclasses.replace(self.training, length=distance).make_task()
        validation.positive_integer("num_seeds", self.num_seeds)
        if self.share_distance not in self.distances:
            raise ValueError(f"share_distance must be one of {list(self.distances)}, got {self.share_distance}")

    @property
    def task(self) -> Task:
        """The task at the distance at which the gradient is split."""
        return dataclasses.replace(self.training, length=self.share_distance).make_task()


def network_config(config: Config, name: str, distance: int) -> RunConfig:
    """Returns the training run of one kind of network at one distance."""
    run = dataclasses.replace(config.training, length=distance)
    length = run.make_task().sequence_length
    by_length = {"chrono": length, "span": max(2, distance // 4)}
    own = {key: by_length[key] if value == BY_LENGTH else value for key, value in NETWORKS[name].items()}
    return dataclasses.replace(run, **own)


def train(config: Config, workdir: Workdir, name: str, distance: int) -> None:
    """Trains one kind of network at one distance and saves what came of it."""
    run = network_config(config, name, distance)
    ensemble = train_ensemble(f"{name}, {distance} words", run, config.num_seeds)
    shares = gradient_shares(config, run, ensemble) if distance == config.share_distance else {}
    workdir.save_arrays(
        array_name(name, distance),
        evaluation_steps=ensemble.evaluation_steps,
        held_out_accuracy=ensemble.held_out["accuracy"],
        held_out_loss=ensemble.held_out["loss"],
        steps_to_solve=ensemble.steps_to_solve(SOLVED),
        skipped=ensemble.metrics["skipped"].sum(axis=1),
        seconds=ensemble.seconds,
        **shares,
    )


def gradient_shares(config: Config, run: RunConfig, ensemble: Ensemble) -> dict[str, np.ndarray]:
    """Returns the share of the held-out loss gradient by lag before and after training, each ``[n, T]``."""
    task = run.make_task()

    def shares(index: int, trained: bool) -> np.ndarray:
        network = ensemble.network(index, trained=trained)
        return measures.by_lag(network, task, task.evaluation_batch(run.seed + index))

    moments = {"before": False, "after": True}
    return {
        name: np.stack([shares(index, trained) for index in range(config.num_seeds)])
        for name, trained in moments.items()
    }


def array_name(name: str, distance: int) -> str:
    """Returns under which name the arrays of a kind of network are saved."""
    return f"{name.lower().replace(', ', '_')}_{distance}"


def saved(config: Config, workdir: Workdir, name: str) -> dict[int, dict[str, np.ndarray]]:
    """Returns the arrays of one kind of network by distance, as far as they are done."""
    done = [distance for distance in config.distances if (workdir.path / f"{array_name(name, distance)}.npz").exists()]
    return {distance: workdir.load_arrays(array_name(name, distance)) for distance in done}


def worth_training(config: Config, workdir: Workdir, name: str, distance: int) -> bool:
    """Returns whether a kind of network learned anything at the longest distance so far, from ``share_distance`` on."""
    results = saved(config, workdir, name)
    tried = [results[shorter] for shorter in results if config.share_distance <= shorter < distance]
    return not tried or tried[-1]["held_out_accuracy"][:, -1].mean() >= 2 * config.task.baseline_accuracy


def accuracy_arrays(results: dict[int, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the last held-out accuracies of one kind of network, ``[D, n]``, and their distances ``[D]``."""
    accuracies = [arrays["held_out_accuracy"][:, -1] for arrays in results.values()]
    return {"distances": np.array(list(results)), "accuracies": np.stack(accuracies)}


def run_rows(name: str, results: dict[int, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Returns a line for each distance of one kind of network."""
    rows = []
    for distance, arrays in results.items():
        accuracy = arrays["held_out_accuracy"][:, -1]
        solved = arrays["steps_to_solve"]
        rows.append(
            {
                "network": name,
                "distance": distance,
                "accuracy": accuracy.mean(),
                "lowest": accuracy.min(),
                "highest": accuracy.max(),
                "seeds that solve": int(np.isfinite(solved).sum()),
                "median steps to solve": float(np.median(np.where(np.isfinite(solved), solved, np.inf))),
                "skipped steps": int(arrays["skipped"].sum()),
                "seconds": float(arrays["seconds"]),
            }
        )
    return rows


def accuracy_row(config: Config, name: str, results: dict[int, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Returns a line of the table of accuracies, in per cent: mean (lowest–highest) at each distance."""
    row: dict[str, Any] = {"network": name}
    for distance in config.distances:
        accuracy = 100 * results[distance]["held_out_accuracy"][:, -1] if distance in results else np.array([])
        text = f"{accuracy.mean():.0f} ({accuracy.min():.0f}–{accuracy.max():.0f})" if accuracy.size else "–"
        row[f"{distance} words"] = text
    return row


def share_row(config: Config, name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns a line of the table of where the gradient comes from, medians over the seeds."""
    short = config.share_distance // 5
    row: dict[str, Any] = {"network": name}
    for moment in ("before", "after"):
        shares = arrays[moment]
        near, far = shares[:, :short].sum(axis=1), shares[:, config.share_distance :].sum(axis=1)
        row[f"{moment}: lag < {short}"] = float(np.median(near))
        row[f"{moment}: lag ≥ {config.share_distance}"] = float(np.median(far))
        row[f"{moment}: horizon"] = float(np.median([_horizon(share) for share in shares]))
    return row


def _horizon(share: np.ndarray) -> float:
    """Returns the lag from which on 90 % of the gradient is gathered; NaN where there is no gradient."""
    nothing: list[Any] = [None] * 3
    horizon = rnnjax.GradientFlow(*nothing, share, *nothing).memory_horizon(measures.HORIZON_SHARE)
    return np.nan if horizon < 0 else horizon


CAPTION = """\
Held-out accuracy in per cent after the last step: mean over the seeds (lowest–highest). Without memory: {baseline:.1f}.
–: not trained, because the same network got less than twice that at a shorter distance (of {distance} or more).
Shares of the loss gradient (signed, they sum to 1; medians over the seeds) at {distance} words: of lags below {short};
of lags from {distance} on, where the word that decides is read; horizon: lag from which on 90 % is gathered.
"""


def write_report(config: Config, workdir: Workdir) -> None:
    """Prints and writes the tables and draws the figures from the saved arrays, as far as they are there."""
    results = {name: saved(config, workdir, name) for name in NETWORKS}
    results = {name: arrays for name, arrays in results.items() if arrays}
    accuracies = [accuracy_row(config, name, arrays) for name, arrays in results.items()]
    workdir.write_table("table_runs", [row for name, arrays in results.items() for row in run_rows(name, arrays)])
    sys.stdout.write(f"\n{workdir.write_table('table_accuracy', accuracies)}\n")
    curves = {name: accuracy_arrays(found) for name, found in results.items()}
    figure = dependency_plots.accuracy_against_distance(curves, config.task.baseline_accuracy)
    plots.save_figure(figure, workdir.path / "accuracy_against_distance.png")
    shares = {name: found[config.share_distance] for name, found in results.items() if config.share_distance in found}
    if shares:
        rows = [share_row(config, name, arrays) for name, arrays in shares.items()]
        sys.stdout.write(f"\n{workdir.write_table('table_shares', rows)}\n")
        figure = dependency_plots.gradient_share_by_lag(shares, config.share_distance)
        plots.save_figure(figure, workdir.path / "gradient_share_by_lag.png")
    told = {"baseline": 100 * config.task.baseline_accuracy, "distance": config.share_distance}
    sys.stdout.write(f"\n{CAPTION.format(short=config.share_distance // 5, **told)}Results are in {workdir.path}\n")


def train_all(config: Config, workdir: Workdir) -> None:
    """Trains and measures every network and saves the results below ``workdir``."""
    for distance in config.distances:
        for name in NETWORKS:
            if worth_training(config, workdir, name, distance):
                train(config, workdir, name, distance)


def run(config: Config, workdir: Workdir) -> int:
    """Trains and measures everything and writes all results below ``workdir``; returns the exit status."""
    arguments = (config, workdir)
    return options.measure_and_report(lambda: train_all(*arguments), lambda: write_report(*arguments), workdir)


def main(argv: Sequence[str]) -> int:
    """Reads the flags and runs."""
    with options.user_errors():
        options.no_arguments(argv)
        larger = options.larger_settings(FULL)
        num_seeds = larger.pop("num_seeds", FLAGS.num_seeds)
        config = Config(
            options.config_from_flags(task="language_recall", **larger),
            tuple(options.positive_integer("distances", text) for text in FLAGS.distances),
            num_seeds,
            FLAGS.share_distance,
        )
        workdir = options.open_workdir(config, networks=NETWORKS)
    return run(config, workdir)


if __name__ == "__main__":
    options.define_config_flags(*CONFIG_FLAGS, **DEFAULTS)
    flags.DEFINE_list("distances", [str(distance) for distance in Config.distances], "numbers of words in between")
    flags.DEFINE_integer("num_seeds", Config.num_seeds, "networks trained of each kind at each distance")
    flags.DEFINE_integer("share_distance", Config.share_distance, "distance at which the gradient is split by lag")
    options.define_full_flag(FULL)
    options.define_workdir_flag("results/long_term_dependency")
    flags.adopt_module_key_flags(options)
    options.run(main)
