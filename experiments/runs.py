"""One monitored training run, from configuration to files: what all experiments share."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from rnnjax import validation
from rnnjax.clipping import clipping_state
from rnnjax.configuration import RunConfig
from rnnjax.metrics import MetricsWriter, read_metrics
from rnnjax.models import RecurrentNetwork, layer_views
from rnnjax.monitor import Reading, stacked
from rnnjax.profiles import spectral_profile
from rnnjax.tasks import Task
from rnnjax.train import FitResult, fit
from rnnjax.typing import Array
from rnnjax.workdir import Workdir

TABLE_CAPTION = """\
before, after: at the first and at the last monitored training step.
λ₁: largest finite-time Lyapunov exponent, nats per time step, ± its standard error over sequences.
log σ₁: log spectral norm of ∂s_T/∂s_0, the longest lag, nats; within ±ln 100 = 4.6 the network counts as critical.
accuracy: on held-out data. clipped: share of training steps whose gradient was clipped. non-finite: steps skipped.
overhead: time that monitoring added, compilation left out, as a share of the training time without it.
compiling: seconds that compiling the plain and the monitored step took. seconds: the whole run.
"""
_NUM_LAGS = 12
_PROFILE_SEQUENCES = 2


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished, or interrupted, run.

    Attributes:
      row: its line of the table.
      interrupted: whether Ctrl-C ended it.
    """

    row: dict[str, Any]
    interrupted: bool


def train_and_record(name: str, config: RunConfig, path: Path, *, tensorboard: bool = False) -> Run:
    """Trains one configuration and writes all its results to a directory of its own.

    Args:
      name: what the run is called in progress bar and table.
      config: the configuration.
      path: the run's directory, which must not hold anything yet.
      tensorboard: write the metrics for TensorBoard too.

    Returns:
      The ``Run``.
    """
    workdir = Workdir.create(path)
    workdir.write_config(config, name=name)
    task = config.make_task()
    network = config.make_network(task)
    began = time.monotonic()
    with MetricsWriter(workdir.path, tensorboard=tensorboard) as metrics:
        result = fit(
            network,
            task,
            config.make_optimizer(),
            config.fit_settings(),
            monitor=config.make_monitor(),
            metrics=metrics,
            label=name,
        )
    _save(workdir, config, task, network, result)
    return Run(_row(name, result, time.monotonic() - began), result.interrupted)


def load_run(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a run as the figures take them."""
    workdir = Workdir(path)
    rows = read_metrics(path / "metrics.jsonl")
    evaluated = [row for row in rows if "held_out_accuracy" in row]
    arrays = {
        "metric_step": np.array([row["step"] for row in rows]),
        "evaluation_step": np.array([row["step"] + 1 for row in evaluated]),
        "evaluation_accuracy": np.array([row["held_out_accuracy"] for row in evaluated]),
    }
    for key in ("loss", "gradient_norm", "gradient_norm_clipped"):
        arrays[key] = np.array([row[key] for row in rows], np.float64)
    for file in path.glob("*.npz"):
        arrays |= workdir.load_arrays(file.stem)
    return arrays


def _save(workdir: Workdir, config: RunConfig, task: Task, network: RecurrentNetwork, result: FitResult) -> None:
    """Writes what the monitor saw and all singular values against lag, before and after training."""
    if not result.readings:
        return
    workdir.save_arrays("monitor", steps=np.array(result.reading_steps), **stacked(result.readings))
    graph, initial = nnx.split(network)
    inputs = task.batch(config.seed, 0, config.batch_size).inputs[:, :_PROFILE_SEQUENCES]
    lags = _spread_lags(task.sequence_length)
    profiles = {
        "profile_lags": lags,
        "profile_initial": _profile(graph, initial, inputs, lags),
        "profile_final": _profile(graph, result.state.params, inputs, lags),
    }
    workdir.save_arrays("profiles", **profiles)


def _profile(graph: nnx.GraphDef, params: nnx.State, inputs: Array, lags: np.ndarray) -> np.ndarray:
    """Returns all log singular values ``[L, P, n, S]``; NaN for a layer whose states or Jacobians overflow."""
    profiles = []
    for layer in layer_views(graph, params, inputs):
        try:
            profile = spectral_profile(layer.cell, layer.params, layer.inputs, lags=lags.tolist())
            profiles.append(np.asarray(profile.log_singular_values))
        except validation.NonFiniteError:
            size = layer.cell.num_carries * layer.cell.hidden_size
            profiles.append(np.full((len(lags), layer.inputs.shape[1], size), np.nan, np.float32))
    return np.stack(profiles)


def _spread_lags(num_steps: int) -> np.ndarray:
    return np.unique(np.round(np.geomspace(1, num_steps, _NUM_LAGS)).astype(int))


def _row(name: str, result: FitResult, seconds: float) -> dict[str, Any]:
    row: dict[str, Any] = {"network": name}
    for moment, reading in zip(("before", "after"), _first_and_last(result.readings), strict=False):
        regime = reading.regimes()[-1]
        row[f"regime {moment}"] = regime.name
        row[f"λ₁ {moment}"] = regime.exponent
        row[f"± {moment}"] = regime.standard_error
        row[f"log σ₁ {moment}"] = regime.log_spectral_norm
    clipping = clipping_state(result.state.opt_state)
    return row | {
        "accuracy": result.evaluations[-1]["accuracy"] if result.evaluations else math.nan,
        "clipped": int(clipping.num_clipped) / max(int(clipping.num_steps), 1),
        "non-finite": int(clipping.num_nonfinite),
        "overhead": result.timing.monitor_overhead(),
        "compiling": round(result.timing.compile_seconds(), 1),
        "seconds": round(seconds, 1),
    }


def _first_and_last(readings: list[Reading]) -> list[Reading]:
    return [readings[0], readings[-1]] if readings else []
