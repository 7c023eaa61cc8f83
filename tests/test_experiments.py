"""Every experiment in miniature, and its command line as a user meets it."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import gradient_regimes, train
from rnnjax.configuration import RunConfig
from rnnjax.metrics import read_metrics
from rnnjax.workdir import Workdir
from tests.command_line import start

ROOT = Path(__file__).parent.parent
MINIATURE = {"hidden_size": 4, "steps": 4, "batch_size": 4, "evaluate_every": 2, "monitor_every": 2}
FIGURES = {
    "spectral_norm_against_lag.png",
    "hidden_gradient_against_time.png",
    "singular_values_against_lag.png",
    "spectrum_over_training.png",
    "training_curves.png",
}


@pytest.fixture(scope="module", autouse=True)
def _promotion_as_optax_needs_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def regimes(tmp_path_factory):
    workdir = Workdir.create(tmp_path_factory.mktemp("regimes") / "results")
    config = RunConfig(task="language_recall", length=6, **MINIATURE)
    assert gradient_regimes.run(config, workdir) == 0
    return workdir.path


def test_gradient_regimes_writes_every_file(regimes):
    directories = {path.name for path in regimes.iterdir() if path.is_dir()}
    assert directories == {"vanilla_gain_0.5", "vanilla_gain_1", "vanilla_gain_2", "lstm", "gru"}
    assert FIGURES | {"table.txt", "table.csv"} <= {path.name for path in regimes.iterdir()}
    for name in directories:
        assert {"config.json", "environment.json", "metrics.jsonl", "monitor.npz", "profiles.npz"} == {
            path.name for path in (regimes / name).iterdir()
        }
    assert all(0 < (regimes / name).stat().st_size < 300_000 for name in FIGURES)


def test_gradient_regimes_table_rests_on_the_arrays(regimes):
    with (regimes / "table.csv").open() as file:
        rows = {row["network"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(gradient_regimes.NETWORKS)
    arrays = Workdir(regimes / "lstm").load_arrays("monitor")
    at_longest_lag = arrays["log_spectral_norms"][-1, -1, -1].mean()
    assert float(rows["LSTM"]["log σ₁ after"]) == pytest.approx(at_longest_lag, rel=1e-6)
    assert float(rows["LSTM"]["λ₁ after"]) == pytest.approx(at_longest_lag / 11, rel=1e-6)
    last = read_metrics(regimes / "lstm" / "metrics.jsonl")[-1]
    assert float(rows["LSTM"]["accuracy"]) == last["held_out_accuracy"]


def test_gain_orders_the_regimes_at_the_start(regimes):
    norms = [
        Workdir(regimes / f"vanilla_gain_{gain}").load_arrays("monitor")["log_spectral_norms"][0, -1, -1].mean()
        for gain in ("0.5", "1", "2")
    ]
    assert norms[0] < norms[1] < norms[2]
    # ‖J_t‖₂ ≤ gain · sup φ' = ½, so eleven steps shrink by at least 11 ln 2.
    assert norms[0] < -11 * np.log(2)


def test_profiles_agree_with_the_monitor(regimes):
    """Two routes to the same number: all singular values by graded factors, the spectral norm by rescaled products."""
    for name in ("vanilla_gain_2", "lstm", "gru"):
        monitor, profiles = (Workdir(regimes / name).load_arrays(file) for file in ("monitor", "profiles"))
        by_lag = monitor["log_spectral_norms"][0][:, profiles["profile_lags"] - 1]
        np.testing.assert_allclose(profiles["profile_initial"][..., 0], by_lag, rtol=1e-4, atol=1e-4)


def test_metrics_have_the_documented_fields(regimes):
    rows = read_metrics(regimes / "gru" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    fields = {"step", "seconds", "loss", "gradient_norm", "gradient_norm_clipped", "accuracy"}
    assert all(fields <= row.keys() for row in rows)
    assert all(row["gradient_norm_clipped"] <= 1 + 1e-6 for row in rows)
    assert [row["step"] for row in rows if "regime" in row] == [0, 2, 3]
    assert json.loads((regimes / "gru" / "config.json").read_text())["cell"] == "gru"


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"task": "adding", "length": 6, "cell": "leaky", "truncation": 3}, marks=pytest.mark.slow),
        pytest.param({"task": "copy", "length": 2, "cell": "gru", "monitor_every": 0}, marks=pytest.mark.slow),
        {"task": "digits", "num_layers": 2, "skip_connections": True, "activation": "relu", "initializer": "identity"},
    ],
    ids=lambda settings: settings["task"],
)
def test_train(tmp_path, settings):
    workdir = Workdir.create(tmp_path / "results")
    assert train.run(RunConfig(**{**MINIATURE, **settings}), workdir) == 0
    last = read_metrics(workdir.path / "run" / "metrics.jsonl")[-1]
    assert np.isfinite(last["held_out_loss"])
    assert ("regime" in last) == (workdir.path / "run" / "monitor.npz").exists() == ("monitor_every" not in settings)
    assert (workdir.path / "training_curves.png").exists()


def command(*arguments, **options):
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cell=lst"], "--cell=lst"),
        (["--hidden_size=0"], "hidden_size must be a positive integer, got 0"),
        (["--learning_rate=nan"], "learning_rate must be a positive finite number, got nan"),
        (["--task=digits", "--length=5"], "length is fixed for task 'digits'"),
        (["digits"], "settings are given as --name=value"),
    ],
)
def test_bad_settings_end_in_one_line(tmp_path, arguments, words):
    result = command("experiments.train", *arguments, f"--workdir={tmp_path / 'new'}")
    assert result.returncode not in (0, None)
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "new").exists()


def test_a_used_workdir_is_refused(tmp_path):
    (tmp_path / "earlier.txt").write_text("results")
    result = command("experiments.gradient_regimes", f"--workdir={tmp_path}")
    assert result.returncode == 2
    assert result.stderr.startswith("error: workdir must be empty or not exist yet")
    assert [path.name for path in tmp_path.iterdir()] == ["earlier.txt"]


def test_help_describes_every_flag():
    text = command("experiments.train", "--help").stdout
    for flag in ("task", "cell", "hidden_size", "steps", "batch_size", "learning_rate", "initializer", "gain"):
        assert f"--{flag}:" in text
    for flag in ("clip_norm", "clip_value", "truncation", "monitor_every", "seed", "workdir"):
        assert f"--{flag}:" in text
    assert "None" not in text


def test_interrupted_training_leaves_readable_results(tmp_path):
    sizes = ("--hidden_size=4", "--batch_size=4", "--task=copy", "--length=2")
    process = start("train", "--steps=100000", *sizes, f"--workdir={tmp_path / 'run'}")
    metrics = tmp_path / "run" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and len(read_metrics(metrics)) > 20):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 130
    assert "copy" in output
    assert {"monitor.npz", "metrics.jsonl", "profiles.npz"} <= {
        path.name for path in (tmp_path / "run" / "run").iterdir()
    }
    assert (tmp_path / "run" / "table.csv").exists()
