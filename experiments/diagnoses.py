"""Does the advice help? Networks that fail, each trained as it is and after the first remedy of its diagnosis.

  python -m experiments.diagnoses --workdir=results/diagnoses

trains every network of ``CASES`` from several seeds, diagnoses its initial weights with ``rnnjax.diagnosis.diagnose``,
follows the first remedy, trains again, and writes to --workdir a table of what was found, advised and gained, and a
figure. Healthy networks are among them; they should get no advice. Ctrl-C keeps what is finished.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from experiments import options
from experiments.ensembles import Ensemble, train_ensemble
from rnnjax import diagnosis_plots, plots
from rnnjax.configuration import RunConfig
from rnnjax.diagnosis import Diagnosis, diagnose
from rnnjax.models import RecurrentNetwork, layer_views
from rnnjax.workdir import Workdir

FLAGS = flags.FLAGS
RECALL = {"task": "language_recall", "length": 30}
ADDING = {"task": "adding", "length": 40}
ORDER = {"task": "temporal_order", "length": 30}
CASES: dict[str, dict[str, Any]] = {
    "tanh, gain ½, recall": {**RECALL, "gain": 0.5},
    "tanh, gain ½, adding": {**ADDING, "gain": 0.5},
    "tanh, gain ½, order": {**ORDER, "gain": 0.5},
    "tanh, Gaussian, gain 2, recall": {**RECALL, "initializer": "gaussian", "gain": 2.0},
    "tanh, gain 8, saturated, recall": {**RECALL, "gain": 8.0},
    "tanh, gain 4, order": {**ORDER, "gain": 4.0},
    "ReLU, gain ½, recall": {**RECALL, "activation": "relu", "gain": 0.5},
    "ReLU, gain ½, adding": {**ADDING, "activation": "relu", "gain": 0.5},
    "ReLU, He, gain 2, recall": {**RECALL, "activation": "relu", "initializer": "he", "gain": 2.0},
    "ReLU, dead, recall": {**RECALL, "activation": "relu"},
    "sigmoid, recall": {**RECALL, "activation": "sigmoid"},
    "leaky, gain 0.3, recall": {**RECALL, "cell": "leaky", "leak": 0.9, "gain": 0.3},
    "LSTM, forget bias −2, recall": {**RECALL, "cell": "lstm", "forget_bias": -2.0},
    "LSTM, gain 8, recall": {**RECALL, "cell": "lstm", "gain": 8.0},
    "GRU, recall": {**RECALL, "cell": "gru"},
    "GRU, forget bias −2, recall": {**RECALL, "cell": "gru", "forget_bias": -2.0},
    "healthy: tanh, orthogonal, recall": RECALL,
    "healthy: ReLU, identity, recall": {**RECALL, "activation": "relu", "initializer": "identity"},
    "healthy: LSTM, recall": {**RECALL, "cell": "lstm"},
    "healthy: GRU, chrono, recall": {**RECALL, "cell": "gru", "chrono": 35},
}
CAPTION = """\
regime: of the last recurrent layer before training, with its confidence; advice: the first remedy of the diagnosis.
accuracy, loss: held-out, mean over the seeds, without and with the advice followed. better: the loss is lower and the
accuracy no worse. Networks that get no advice are trained once.
"""
FULL = {"steps": 1600, "num_seeds": 5, "hidden_size": 64}
_DIAGNOSED = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the experiment.

    Attributes:
      steps: training steps of each network.
      num_seeds: networks trained of each configuration.
      hidden_size: number of units.
      seed: the first seed.
    """

    steps: int = 400
    num_seeds: int = 2
    hidden_size: int = 32
    seed: int = 0

    def run_config(self, **settings: Any) -> RunConfig:
        """Returns the configuration of one case."""
        own = {"hidden_size": self.hidden_size, "steps": self.steps, "seed": self.seed, "batch_size": 32}
        rest = {"learning_rate": 2e-3, "evaluate_every": self.steps}
        return RunConfig(**{**own, **rest, **settings})


def kill(network: RecurrentNetwork) -> None:
    """Gives three units in four a bias that no input overcomes: their ReLU never answers."""
    for layer in network.layers:
        hidden = layer.bias[...].shape[-1]
        layer.bias[...] = jnp.where(jnp.arange(hidden) % 4 == 0, 0.0, -30.0)[None]


def diagnosed(config: RunConfig, ensemble: Ensemble) -> Diagnosis:
    """Returns the diagnosis of the first network before training, on a few sequences of its first batch."""
    inputs = config.make_task().batch(config.seed, 0, config.batch_size).inputs[:, :_DIAGNOSED]
    layer = layer_views(*nnx.split(ensemble.network(0, trained=False)), inputs)[-1]
    return diagnose(layer.cell, layer.params, layer.inputs)


def one_case(name: str, config: RunConfig, num_seeds: int) -> dict[str, Any]:
    """Trains a configuration, diagnoses it, follows the first advice, and returns the row of the table."""
    before = train_ensemble(name, config, num_seeds, prepare=kill if "dead" in name else None)
    found = diagnosed(config, before)
    regime = found.symptoms.regime
    row = {
        "network": name,
        "regime": regime.name,
        "confidence": regime.confidence,
        "log σ₁": regime.log_spectral_norm,
        "advice": found.remedies[0].name if found.remedies else "none",
        **_scores("before", before),
    }
    if not found.remedies:
        return row | {"accuracy after": np.nan, "loss after": np.nan, "better": "", "limit": found.limit}
    advised = dataclasses.replace(config, **found.remedies[0].settings)
    after = _scores("after", train_ensemble(f"{name}, advised", advised, num_seeds))
    better = after["loss after"] < row["loss before"] and after["accuracy after"] >= row["accuracy before"]
    return row | after | {"better": "yes" if better else "no", "limit": found.limit}


def _scores(moment: str, ensemble: Ensemble) -> dict[str, float]:
    return {f"{key} {moment}": float(np.nanmean(ensemble.held_out[key][:, -1])) for key in ("accuracy", "loss")}


def run(config: Config, workdir: Workdir, cases: dict[str, dict[str, Any]] | None = None) -> int:
    """Runs all cases and writes table and figure; returns the exit status."""
    rows: list[dict[str, Any]] = []
    status = 0
    try:
        for name, settings in (CASES if cases is None else cases).items():
            rows.append(one_case(name, config.run_config(**settings), config.num_seeds))
            workdir.write_table("table", rows)
    except KeyboardInterrupt:
        status = options.INTERRUPTED
    if rows:
        report(workdir, rows)
    return status


def report(workdir: Workdir, rows: Sequence[dict[str, Any]]) -> None:
    """Prints the table, saves it as arrays, and draws the figure from them."""
    shown = [{key: value for key, value in row.items() if key != "limit"} for row in rows]
    sys.stdout.write(f"\n{workdir.write_table('table', shown)}\n\n{CAPTION}\n")
    for row in rows:
        sys.stdout.write(f"{row['network']}: {row['limit']}\n")
    advised = [row for row in rows if row["advice"] != "none"]
    better = sum(row["better"] == "yes" for row in advised)
    sys.stdout.write(f"\nThe first advice made {better} of {len(advised)} networks better.\n")
    arrays = {key.replace(" ", "_"): np.array([row[key] for row in rows]) for key in rows[0]}
    workdir.save_arrays("diagnoses", **arrays)
    plots.save_figure(diagnosis_plots.advice(workdir.load_arrays("diagnoses")), workdir.path / "advice.png")
    sys.stdout.write(f"Results are in {workdir.path}\n")


def main(argv: Sequence[str]) -> int:
    """Reads the flags and runs."""
    with options.user_errors():
        options.no_arguments(argv)
        names = [field.name for field in dataclasses.fields(Config)]
        config = Config(**{name: FLAGS[name].value for name in names} | options.larger_settings(FULL))
        config.run_config()
        workdir = options.open_workdir(config)
    return run(config, workdir)


if __name__ == "__main__":
    flags.DEFINE_integer("steps", Config.steps, "training steps of each network", lower_bound=1)
    flags.DEFINE_integer("num_seeds", Config.num_seeds, "networks trained of each configuration", lower_bound=1)
    flags.DEFINE_integer("hidden_size", Config.hidden_size, "number of units", lower_bound=1)
    flags.DEFINE_integer("seed", Config.seed, "the first seed", lower_bound=0)
    options.define_full_flag(FULL)
    options.define_workdir_flag("results/diagnoses")
    flags.adopt_module_key_flags(options)
    options.run(main)
