"""Trains one network on one task, monitored.

  python -m experiments.train --task=language_recall --cell=lstm --workdir=results/lstm

writes to --workdir a table, figures, and in run/ the files config.json, environment.json, metrics.jsonl (a line a
step), monitor.npz and profiles.npz. Ctrl-C ends training and keeps everything so far.
"""

from collections.abc import Sequence

from absl import flags

from experiments import options
from experiments.report import write_report
from experiments.runs import train_and_record
from rnnjax.configuration import RunConfig
from rnnjax.workdir import Workdir

FLAGS = flags.FLAGS


def run(config: RunConfig, workdir: Workdir, *, tensorboard: bool = False) -> int:
    """Trains ``config`` and writes all results below ``workdir``; returns the exit status."""
    name = f"{config.cell} on {config.task}"
    finished = train_and_record(name, config, workdir.path / "run", tensorboard=tensorboard)
    write_report(workdir, {name: "run"}, [finished.row])
    return options.INTERRUPTED if finished.interrupted else 0


def main(argv: Sequence[str]) -> int:
    """Reads the flags and runs."""
    with options.user_errors():
        options.no_arguments(argv)
        config = options.config_from_flags()
        options.check_packages(config.task, tensorboard=FLAGS.tensorboard)
        config.make_task()
        workdir = Workdir.create(FLAGS.workdir)
        workdir.write_config(config)
    return run(config, workdir, tensorboard=FLAGS.tensorboard)


if __name__ == "__main__":
    options.define_config_flags()
    options.define_workdir_flags("results/train")
    flags.adopt_module_key_flags(options)
    options.run(main)
