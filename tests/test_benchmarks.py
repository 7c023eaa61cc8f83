"""Every benchmark in miniature, as a user calls it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import rnnjax
from experiments.benchmarks import accuracy, recurrent_peers, spectra
from experiments.benchmarks import unroll as unroll_benchmark
from experiments.benchmarks.turns import take_turns
from rnnjax import testing

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def run(name, *arguments):
    command = [sys.executable, "-m", f"experiments.benchmarks.{name}", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_cost_of_spectra():
    result = run("spectra", "--cells=GRU", "--sizes=4", "--num_steps=6", "--repeats=1")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 7
    assert {line["cell"] for line in lines} == {"GRU"}
    assert all(line["median_ms"] > 0 and line["first_call_s"] > line["median_ms"] / 1e3 for line in lines)
    assert "jacrev of scan" in result.stdout.splitlines()[-3]


def test_a_batch_is_held_against_the_calls_of_its_own_turn():
    results = {"all of 16": {"times_ms": [8.0, 40.0, 6.0]}, "16 one by one": {"times_ms": [8.0, 50.0, 8.0]}}
    assert spectra.times_one(results) == pytest.approx(12.8)


def test_what_is_timed_is_right():
    programs = spectra.contestants(rnnjax.GRUCell(8), 4)
    params, many = programs["all of 16"][1]
    path = rnnjax.trajectory(rnnjax.GRUCell(8), params, many[:, 0])
    chain = np.asarray(rnnjax.autodiff_step_jacobians(rnnjax.GRUCell(8), params, path), np.float64)
    exact = [np.log(np.linalg.svd(np.linalg.multi_dot([np.eye(8), *chain[4 - lag :][::-1]]))[1]) for lag in range(1, 5)]
    names = ("jacrev of scan", "jacrev of unroll", "all", "norm at every lag")
    usual, ours, every, norms = (program(*arguments) for program, arguments in map(programs.get, names))
    np.testing.assert_allclose(usual, exact[-1], atol=1e-3)
    np.testing.assert_allclose(ours, exact[-1], atol=1e-3)
    np.testing.assert_allclose(every.log_singular_values, exact[-1], atol=1e-3)
    np.testing.assert_allclose(norms, np.max(exact, axis=1), atol=1e-3)
    for name, shape in (("leading quarter", (2,)), ("all of 16", (16, 8))):
        program, arguments = programs[name]
        assert jax.eval_shape(program, *arguments).log_singular_values.shape == shape
    together, (one_by_one, _) = programs["all of 16"][0](params, many), programs["16 one by one"]
    one_by_one = np.stack([result.log_singular_values for result in one_by_one()])
    np.testing.assert_allclose(one_by_one, together.log_singular_values, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "argument"),
    [("spectra", "--sizes=0"), ("spectra", "--repeats=0"), ("lyapunov", "--sizes=x"), ("unroll", "--repeats=0")],
)
def test_impossible_settings_are_one_line_and_a_status(name, argument):
    result = run(name, argument)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "must be a positive integer, got" in result.stderr


def test_a_line_of_the_accuracy_table():
    steps = accuracy.gaussian(np.random.default_rng(0), 6, 80)
    line = accuracy.measured("Gaussian", steps)
    error, estimate = (float(word.strip("(≤)")) for word in line["float64"].replace("≤ ", "").split())
    assert 0 <= error <= estimate < 1e-9
    assert (line["S"], line["T"]) == (6, 80)
    exact = testing.exact_log_singular_values(steps)
    assert line["log σ"] == f"{exact[0]:.0f} … {exact[-1]:.0f}"
    assert float(line["sum of log|R|"]) == pytest.approx(np.abs(accuracy.qr_sums(steps) - exact).max(), abs=0.05)
    rounded, narrow = (float(line[name].split()[0]) for name in ("float32 Jacobians", "all float32"))
    assert 1e-12 < rounded < 1e-5 and 10 * rounded < narrow < 1e-2


def test_the_usual_ways_of_the_accuracy_table_are_what_they_are_called():
    rng = np.random.default_rng(1)
    steps = np.triu(rng.normal(size=(5, 3, 3)), 1) + np.diag([4.0, 2.0, 1.0])
    np.testing.assert_allclose(accuracy.qr_sums(steps), 5 * np.log([4, 2, 1]), atol=1e-12)  # Q stays the identity
    exact = np.log(np.linalg.svd(np.linalg.multi_dot(list(steps[::-1])), compute_uv=False))
    np.testing.assert_allclose(accuracy.product_then_svd(steps), exact, atol=1e-10)
    lost = accuracy.measured("beyond floats", np.stack([np.diag([1.0, 1e-20, 1e-30])] * 20))
    assert lost["multiply, then SVD"] == "1 of 3 right"


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


def test_cost_of_unrolling():
    result = run("unroll", "--cells=gru", "--sizes=6,2,4,3", "--sizes=5,2,3,2", "--repeats=2")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    here = [name for name in recurrent_peers.JAX_PEERS if recurrent_peers.is_installed(name)]
    others = ["PyTorch"] if recurrent_peers.is_installed("PyTorch") else []
    names = ["rnnjax", "rnnjax, side by side", *here, *others, "matmuls only"]
    assert [line["what"] for line in lines[: len(lines) // 2]] == names
    times, first_calls = result.stdout.split("\n\n")[1:]
    assert "geometric mean" in times.splitlines()[-1]
    assert [line.count("×)") for line in first_calls.strip().splitlines()[2:]] == [len(lines) // 2] * 2
    own = run(
        "unroll",
        "--cells=gru",
        "--sizes=9,2,3,2",
        "--repeats=1",
        *(f"--contestants={name}" for name in ("rnnjax", "rnnjax, checkpoints")),
    )
    assert [json.loads(line)["what"] for line in own.stdout.splitlines()[:2]] == ["rnnjax", "rnnjax, checkpoints"]


def test_ratios_of_unrolling():
    """Two sizes whose ratios are 2 and 8: their geometric mean is 4."""
    times = {
        "a": {"rnnjax": 1.0, "Flax Linen": 2.0, "Haiku": 3.0},
        "b": {"rnnjax": 1.0, "Flax Linen": 9.0, "Haiku": 8.0},
    }
    measured = [
        {"cell": "gru", "size": size, "what": what, "median_ms": value}
        for size, row in times.items()
        for what, value in row.items()
    ]
    mean = unroll_benchmark.rows(measured)[-1]
    assert mean["fastest JAX peer"] == "4.00×" and mean["Haiku"] == "4.90×" and mean["Flax Linen"] == "4.24×"


def test_first_calls_of_unrolling():
    made = {"rnnjax": 0.5, "Flax Linen": 0.4}
    measured = [{"cell": "gru", "size": "a", "what": what, "first_call_s": value} for what, value in made.items()]
    row = {"cell": "gru", "T, B, H, D": "a", "rnnjax": "0.50 (1.25×)", "Flax Linen": "0.40 (1.00×)"}
    assert unroll_benchmark.rows_of_first_calls(measured) == [row]
    assert unroll_benchmark.rows_of_first_calls(measured[:1])[0]["rnnjax"] == "0.50"


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,0", "1,2,3,x", ""])
def test_sizes_are_four_positive_integers(text):
    assert unroll_benchmark._sizes(" 5,1, 2,3") == (5, 1, 2, 3)
    with pytest.raises(ValueError, match="sizes must be four positive integers"):
        unroll_benchmark._sizes(text)


@pytest.mark.parametrize("kind", recurrent_peers.KINDS)
def test_peers_are_recurrent_layers_of_the_same_size(kind):
    inputs = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)
    for name, build in {"rnnjax": recurrent_peers.ours, **recurrent_peers.JAX_PEERS}.items():
        layer = build(kind, inputs, 4) if recurrent_peers.is_installed(name) else None
        if layer is None:
            continue
        run, params = layer
        outputs = np.asarray(run(params, inputs))
        assert outputs.shape == (5, 2, 4)
        changed = inputs.copy()
        changed[3] += 1
        differs = np.abs(np.asarray(run(params, changed)) - outputs).max(axis=(1, 2)) > 1e-7
        assert differs.tolist() == [False, False, False, True, True], name
        gradient = jax.grad(unroll_benchmark._loss(run))(params, inputs)
        assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient) if np.ndim(leaf) == 3), name


def test_other_programs_take_turns_too():
    calls = []
    made = {"other": (recurrent_peers.Uncompiled(lambda: calls.append(1)), ())}
    result = take_turns(made, 3, warm_up=0)["other"]
    assert len(calls) == 4 and result["temporary_bytes"] is None and result["median_ms"] < 1e3


def test_turns_open_with_calls_that_are_not_timed(monkeypatch):
    durations = [0.5, 0.02, 0.003, 0.02, 0.003]  # the first call; in each of two turns a slow one, then a fast one
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    program = recurrent_peers.Uncompiled(lambda: clock.__setitem__(0, clock[0] + durations.pop(0)))
    result = take_turns({"other": (program, ())}, 2, warm_up=0.01)["other"]
    assert result["median_ms"] == pytest.approx(3) and result["first_call_s"] == pytest.approx(0.5)
    assert result["times_ms"] == pytest.approx([3, 3])


def test_first_calls_in_turn(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def program(name, durations):
        def run():
            calls.append(name)
            clock[0] += durations.pop(0)

        return recurrent_peers.Uncompiled(run), ()

    programs = {"a": program("a", [3.0, 1.0, 2.0, 0.1]), "b": program("b", [5.0, 9.0, 4.0, 0.1])}
    result = take_turns(programs, 1, warm_up=0, first_calls=3, prepare=lambda: calls.append("prepare"))
    assert calls == ["prepare", "a", "prepare", "b"] * 3 + ["a", "b"]
    assert (result["a"]["first_call_s"], result["b"]["first_call_s"]) == (2, 5)


def test_nothing_is_compiled_before_a_first_call():
    traced = []
    program = jax.jit(lambda x: traced.append(1) or x + 1)
    take_turns({"program": (program, (1.0,))}, 1, warm_up=0, first_calls=2)
    assert len(traced) == 2


def test_cost_of_training():
    result = run(
        "training", "--cells=gru", "--num_steps=6", "--batch_size=2", "--hidden_size=4", "--steps=2", "--repeats=1"
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [line["what"] for line in lines] == ["rnnjax, monitored", "rnnjax", "Flax Linen"]
    assert all(line["ms_per_step"] > 0 for line in lines)
