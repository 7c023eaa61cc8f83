"""Which gradients vanish, and which explode: five networks trained on one task, measured beside training.

  python -m experiments.gradient_regimes --workdir=results/gradient_regimes

trains a vanilla network with small, critical and large gain, an LSTM and a GRU, and writes to --workdir a directory for
each network, a table, and figures: the log spectral norm of ∂s_T/∂s_(T−lag) against lag before and after training,
‖∂L/∂h_t‖ against t, all singular values against lag, and the spectrum over training steps.
Ctrl-C ends training and keeps everything so far.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import options
from experiments.report import write_report
from experiments.runs import train_and_record
from rnnjax.configuration import RunConfig
from rnnjax.workdir import Workdir

FLAGS = flags.FLAGS
NETWORKS: dict[str, dict[str, Any]] = {
    "vanilla, gain 0.5": {"cell": "vanilla", "gain": 0.5},
    "vanilla, gain 1": {"cell": "vanilla", "gain": 1.0},
    "vanilla, gain 2": {"cell": "vanilla", "gain": 2.0},
    "LSTM": {"cell": "lstm"},
    "GRU": {"cell": "gru"},
}
CONFIG_FLAGS = (
    *("task", "length", "hidden_size", "steps", "batch_size", "learning_rate", "clip_norm"),
    *("evaluate_every", "monitor_every", "seed"),
)


def run(config: RunConfig, workdir: Workdir, *, tensorboard: bool = False) -> int:
    """Trains every network of ``NETWORKS`` and writes all results below ``workdir``; returns the exit status."""
    rows: list[dict[str, Any]] = []
    directories: dict[str, str] = {}
    interrupted = False
    try:
        for name, settings in NETWORKS.items():
            directory = name.lower().replace(", ", "_").replace(" ", "_")
            own = dataclasses.replace(config, **settings)
            finished = train_and_record(name, own, workdir.path / directory, tensorboard=tensorboard)
            rows.append(finished.row)
            directories[name] = directory
            if interrupted := finished.interrupted:
                break
    except KeyboardInterrupt:  # outside of training, such as while a network is analysed
        interrupted = True
    if rows:
        write_report(workdir, directories, rows)
    return options.INTERRUPTED if interrupted else 0


def main(argv: Sequence[str]) -> int:
    """Reads the flags and runs."""
    with options.user_errors():
        options.no_arguments(argv)
        config = options.config_from_flags()
        options.check_packages(config.task, tensorboard=FLAGS.tensorboard)
        config.make_task()
        workdir = Workdir.create(FLAGS.workdir)
        workdir.write_config(config, networks=NETWORKS)
    return run(config, workdir, tensorboard=FLAGS.tensorboard)


if __name__ == "__main__":
    options.define_config_flags(*CONFIG_FLAGS)
    options.define_workdir_flags("results/gradient_regimes")
    flags.adopt_module_key_flags(options)
    options.run(main)
