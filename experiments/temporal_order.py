"""How long sequences plain networks learn by SGD alone, by SGD with clipping, and with the penalty Ω beside it.

  python -m experiments.temporal_order --workdir=results/temporal_order

After Pascanu, Mikolov & Bengio (2013, section 4.1 and figure 7): networks of 50 tanh units name the order of two
symbols far apart among distractors. Trained are many networks for each method (SGD; SGD with clipping by norm; SGD with
clipping and the penalty Ω on vanishing gradients), initialisation and sequence length; a network has succeeded if at
one of its evaluations at most 1 % of the held-out sequences are wrong. Written to --workdir: arrays, a table, and the
rate of success against length with its confidence interval. Ctrl-C keeps and reports what is done.
"""

import dataclasses
import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import options
from experiments.ensembles import train_ensemble
from rnnjax import dependency_plots, plots, validation
from rnnjax.configuration import RunConfig
from rnnjax.workdir import Workdir

FLAGS = flags.FLAGS
PENALTY = {"penalty": "vanishing_gradient", "penalty_weight": 2.0}
METHODS: dict[str, dict[str, Any]] = {
    "SGD": {"clip_norm": 0.0},
    "SGD, clipped": {"clip_norm": 1.0},
    "SGD, clipped, Ω": {"clip_norm": 1.0, **PENALTY},
}
"""MSGD, MSGD-C and MSGD-CR of the source."""
INITIALIZATIONS: dict[str, dict[str, Any]] = {
    "small": {"initializer": "gaussian", "gain": 0.7},
    "critical": {"initializer": "gaussian", "gain": 0.95},
}
"""Gaussian recurrent weights. 0.7 = 0.1 √50 is a standard deviation of 0.1, as "basic tanh" of the source; 0.95 is the
spectral radius of its "smart tanh", whose matrix is sparse."""
CONFIG_FLAGS = ("hidden_size", "steps", "batch_size", "learning_rate", "evaluate_every", "seed")
DEFAULTS = {"hidden_size": 50, "steps": 1500, "batch_size": 20, "learning_rate": 0.1, "evaluate_every": 100}
FULL = {"steps": 250_000, "learning_rate": 0.01, "evaluate_every": 1000}
"""With 20 sequences a step, 5 million in all."""
FULL_RUNS = {"lengths": (20, 50, 100, 150, 200), "num_seeds": 50, "initializations": tuple(INITIALIZATIONS)}
SUCCESS = 0.99
"""Accuracy on held-out sequences that counts as success."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained.

    Attributes:
      training: what all networks have in common.
      lengths: sequence lengths in steps.
      num_seeds: networks trained of each kind.
      initializations: names in ``INITIALIZATIONS``.
    """

    training: RunConfig = dataclasses.field(
        default_factory=lambda: RunConfig(task="temporal_order", optimizer="sgd", **DEFAULTS)
    )
    lengths: tuple[int, ...] = (20, 30, 40, 60)
    num_seeds: int = 8
    initializations: tuple[str, ...] = ("critical",)

    def __post_init__(self) -> None:
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"lengths must ascend, at least one, got {list(self.lengths)}")
        for length in self.lengths:
            dataclasses.replace(self.training, length=length).make_task()
        validation.positive_integer("num_seeds", self.num_seeds)
        if not self.initializations:
            raise ValueError("initializations must hold at least one name, got none")
        for name in self.initializations:
            validation.one_of("initializations", name, INITIALIZATIONS)


def array_name(initialization: str, method: str, length: int) -> str:
    """Returns under which name the arrays of one kind of network are saved."""
    words = method.lower().replace("ω", "penalty").replace(", ", "_")
    return f"{initialization}_{words}_{length}"


def train(config: Config, workdir: Workdir, initialization: str, method: str, length: int) -> None:
    """Trains one kind of network at one length and saves what came of it."""
    settings = INITIALIZATIONS[initialization] | METHODS[method]
    run = dataclasses.replace(config.training, length=length, **settings)
    ensemble = train_ensemble(f"{method}, {initialization}, {length} steps", run, config.num_seeds)
    norms = ensemble.metrics["gradient_norm"]
    workdir.save_arrays(
        array_name(initialization, method, length),
        evaluation_steps=ensemble.evaluation_steps,
        held_out_accuracy=ensemble.held_out["accuracy"],
        steps_to_solve=ensemble.steps_to_solve(SUCCESS),
        largest_gradient=np.max(norms, axis=1, where=np.isfinite(norms), initial=0),
        clipped=ensemble.metrics["clipped"].mean(axis=1),
        skipped=ensemble.metrics["skipped"].sum(axis=1),
        seconds=ensemble.seconds,
    )


def success_interval(successes: int, trials: int) -> tuple[float, float]:
    """Returns the 95 % interval of a rate of success: those p with |successes/trials − p| ≤ z √(p(1 − p)/trials).

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, Journal of the American
    Statistical Association 22, 1927.
    """
    rate, square = successes / trials, statistics.NormalDist().inv_cdf(0.975) ** 2 / trials
    center = (rate + square / 2) / (1 + square)
    half = math.sqrt(square * (rate * (1 - rate) + square / 4)) / (1 + square)
    return max(center - half, 0.0), min(center + half, 1.0)


def row(initialization: str, method: str, length: int, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns a line of the table."""
    solved = np.isfinite(arrays["steps_to_solve"])
    low, high = success_interval(int(solved.sum()), len(solved))
    return {
        "initialisation": initialization,
        "method": method,
        "length": length,
        "successes": int(solved.sum()),
        "seeds": len(solved),
        "rate": solved.mean(),
        "lowest": low,
        "highest": high,
        "median steps": float(np.median(arrays["steps_to_solve"][solved])) if solved.any() else None,
        "last accuracy": arrays["held_out_accuracy"][:, -1].mean(),
        "clipped": arrays["clipped"].mean(),
        "largest gradient": float(np.median(arrays["largest_gradient"])),
        "skipped": int(arrays["skipped"].sum()),
    }


CAPTION = """\
Success: at least 99 % of the held-out sequences right at an evaluation. lowest, highest: Wilson's 95 % interval of the
rate. median steps: to success, of those that succeed. last accuracy: mean after the last step. clipped: share of the
steps. largest gradient: its norm before clipping, median over the seeds. skipped: steps with a non-finite gradient.
"""


def write_report(config: Config, workdir: Workdir) -> None:
    """Prints and writes the table and draws the figure from the saved arrays, as far as they are there."""
    rows = []
    for initialization in config.initializations:
        for method in METHODS:
            for length in config.lengths:
                name = array_name(initialization, method, length)
                if (workdir.path / f"{name}.npz").exists():
                    rows.append(row(initialization, method, length, workdir.load_arrays(name)))
    sys.stdout.write(f"\n{workdir.write_table('table', rows)}\n")
    figure = dependency_plots.success_against_length(panels(rows))
    plots.save_figure(figure, workdir.path / "success_against_length.png")
    sys.stdout.write(f"\n{CAPTION}Results are in {workdir.path}\n")


def panels(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Returns the table's rates of success and their intervals as the figure takes them."""
    groups: dict[str, dict[str, dict[str, list[float]]]] = {}
    keys = {"lengths": "length", "rates": "rate", "lowest": "lowest", "highest": "highest"}
    for line in rows:
        gain = INITIALIZATIONS[line["initialisation"]]["gain"]
        runs = groups.setdefault(f"{line['initialisation']} initial weights (gain {gain})", {})
        arrays = runs.setdefault(line["method"], {name: [] for name in keys})
        for name, key in keys.items():
            arrays[name].append(line[key])
    return groups


def train_all(config: Config, workdir: Workdir) -> None:
    """Trains every network and saves the results below ``workdir``."""
    for length in config.lengths:
        for initialization in config.initializations:
            for method in METHODS:
                train(config, workdir, initialization, method, length)


def run(config: Config, workdir: Workdir) -> int:
    """Trains everything and writes all results below ``workdir``; returns the exit status."""
    arguments = (config, workdir)
    return options.measure_and_report(lambda: train_all(*arguments), lambda: write_report(*arguments), workdir)


def main(argv: Sequence[str]) -> int:
    """Reads the flags and runs."""
    with options.user_errors():
        options.no_arguments(argv)
        own = {name: FLAGS[name].value for name in FULL_RUNS} | options.larger_settings(FULL_RUNS)
        config = Config(
            options.config_from_flags(task="temporal_order", optimizer="sgd", **options.larger_settings(FULL)),
            tuple(options.positive_integer("lengths", length) for length in own["lengths"]),
            own["num_seeds"],
            tuple(own["initializations"]),
        )
        workdir = options.open_workdir(config, methods=METHODS, initialization_settings=INITIALIZATIONS)
    return run(config, workdir)


if __name__ == "__main__":
    options.define_config_flags(*CONFIG_FLAGS, **DEFAULTS)
    flags.DEFINE_list("lengths", [str(length) for length in Config.lengths], "sequence lengths in steps")
    flags.DEFINE_integer("num_seeds", Config.num_seeds, "networks trained of each kind")
    flags.DEFINE_list("initializations", list(Config.initializations), f"out of {', '.join(INITIALIZATIONS)}")
    options.define_full_flag(FULL | FULL_RUNS)
    options.define_workdir_flag("results/temporal_order")
    flags.adopt_module_key_flags(options)
    options.run(main)
