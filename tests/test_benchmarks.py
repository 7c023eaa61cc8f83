"""Every benchmark in miniature, as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import accuracy

ROOT = Path(__file__).parent.parent


def run(name, *arguments):
    command = [sys.executable, "-m", f"experiments.benchmarks.{name}", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_cost_of_spectra():
    result = run("spectra", "--cells=GRU", "--sizes=4", "--num_steps=6", "--repeats=1")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 5
    assert {line["cell"] for line in lines} == {"GRU"}
    assert all(line["median_ms"] > 0 and line["first_call_s"] > line["median_ms"] / 1e3 for line in lines)
    assert "jacrev + SVD" in result.stdout.splitlines()[-3]


@pytest.mark.parametrize(
    ("name", "argument"), [("spectra", "--sizes=0"), ("spectra", "--repeats=0"), ("lyapunov", "--sizes=x")]
)
def test_impossible_settings_are_one_line_and_a_status(name, argument):
    result = run(name, argument)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "must be a positive integer, got" in result.stderr


def test_a_line_of_the_accuracy_table():
    steps = accuracy.gaussian(np.random.default_rng(0), 3, 20)
    line = accuracy.measured("Gaussian", steps)
    error, estimate = (float(word.strip("(≤)")) for word in line["float64"].replace("≤ ", "").split())
    assert 0 <= error <= estimate < 1e-9
    assert (line["S"], line["T"]) == (3, 20)


def test_chains_of_the_accuracy_table_are_what_they_are_called():
    rng = np.random.default_rng(0)
    steps = accuracy.henon(rng, 2, 50)
    np.testing.assert_allclose(np.linalg.det(steps), -0.3)
    rotations = accuracy.orthogonal(rng, 3, 4)
    np.testing.assert_allclose(
        rotations @ np.swapaxes(rotations, 1, 2), np.broadcast_to(np.eye(3), (4, 3, 3)), atol=1e-12
    )
    assert np.median(np.linalg.cond(accuracy.saturated_lstm(rng, 12, 30))) > 1e5
    np.testing.assert_allclose(np.linalg.cond(accuracy.prescribed_condition(rng, 4, 3)), 900)
