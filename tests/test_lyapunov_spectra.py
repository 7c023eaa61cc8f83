"""The experiment on Lyapunov spectra in miniature."""

import csv
import json
import signal
import time

import jax
import mpmath
import numpy as np
import pytest
from matplotlib.image import imread

import rnnjax
from experiments import lyapunov_spectra
from rnnjax.workdir import Workdir
from tests.command_line import start

pytestmark = pytest.mark.slow

CONFIG = lyapunov_spectra.Config(
    num_units=24,
    num_networks=2,
    num_steps=600,
    gains=(0.5, 3.0),
    spectrum_gains=(0.5, 3.0),
    gated_gains=(0.125, 0.25),
    forget_biases=(-2.0, 0.0),
    product_lengths=(1, 2, 4, 64),
)
FIGURES = {f"lyapunov_{name}.png" for name in ("singular_values", "largest_exponent", "spectrum", "gates")}
TABLES = {f"table_{name}.{suffix}" for name in ("tanh", "gates", "products") for suffix in ("txt", "csv")}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    workdir = Workdir.create(tmp_path_factory.mktemp("spectra") / "results")
    assert lyapunov_spectra.run(CONFIG, workdir) == 0
    return workdir


def test_every_file_is_written(results):
    arrays = {f"{name}.npz" for name in ("shears", "gaussians", "vanilla", "leaky", "lstm", "gru")}
    assert {path.name for path in results.path.iterdir()} == FIGURES | TABLES | arrays | {"environment.json"}
    for name in FIGURES:
        assert 0 < (results.path / name).stat().st_size < 300_000
        assert imread(results.path / name).shape[1] == 900


def weights(kind, num_units, gate, **settings):
    """The recurrent matrices [n, N, N] of one gate, such that h W is its pre-activation."""
    _, params, _ = lyapunov_spectra.draw_networks(CONFIG, kind, num_units, **settings)
    return np.asarray(params.recurrent_kernel[:, :, gate], np.float64)


def test_weights_have_the_variance_that_theory_speaks_of():
    for gate in range(4):
        assert weights(rnnjax.LSTMCell, 100, gate).std() == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize(("name", "leak"), [("vanilla", 1.0), ("leaky", 0.5)])
def test_below_the_critical_gain_exponents_are_those_of_the_matrix(results, name, leak):
    """The state dies out; what is left is h ← (1 − a) h + a g h W, whose exponents are logs of eigenvalues."""
    eigenvalues = 1 - leak + leak * np.linalg.eigvals(0.5 * weights(rnnjax.LeakyCell, 24, 0, leak=leak))
    expected = -np.sort(-np.log(np.abs(eigenvalues)), axis=-1)
    np.testing.assert_allclose(results.load_arrays(name)["exponents"][0], expected, atol=0.03)
    eigenvalues = 1 - leak + leak * np.linalg.eigvals(0.5 * weights(rnnjax.LeakyCell, 48, 0, leak=leak))
    expected = np.log(np.abs(eigenvalues)).max(axis=-1)
    np.testing.assert_allclose(results.load_arrays(name)["largest_exponents"][0], expected, atol=0.01)


def test_theory_is_that_of_the_literature_and_the_networks_come_near_it(results):
    """tanh: λ₁ = ln g below the critical gain; 0.31025 and a share of .1528 at g = 3. Leaky: ln(1 − a + a g) below."""
    vanilla, leaky = (results.load_arrays(name) for name in ("vanilla", "leaky"))
    np.testing.assert_allclose(vanilla["theory_largest_exponents"], [np.log(0.5), 0.31025], atol=1e-5)
    np.testing.assert_allclose(vanilla["theory_positive_shares"], [0, 0.1528], atol=1e-3)
    assert leaky["theory_largest_exponents"][0] == pytest.approx(np.log(0.75))
    for arrays in (vanilla, leaky):
        measured = arrays["largest_exponents"].mean(axis=1)
        np.testing.assert_allclose(measured, arrays["theory_largest_exponents"], atol=0.1)
        assert arrays["exponents"].shape == (2, 2, 24)
        assert arrays["theory_exponents"].shape == (2, 24)


@pytest.mark.parametrize(("name", "leak"), [("vanilla", 1.0), ("leaky", 0.5)])
def test_theory_of_all_exponents_is_that_of_infinitely_many_units(results, name, leak):
    """Below the critical gain their eigenvalues fill the disk of radius a g around 1 − a evenly (Girko 1985)."""
    index = np.arange(100_000) + 0.5
    points = np.sqrt(index / 100_000) * np.exp(1j * np.pi * (3 - np.sqrt(5)) * index)  # even: a spiral of golden angles
    logs = np.log(np.abs(1 - leak + 0.5 * leak * points))
    expected = np.quantile(logs, 1 - (np.arange(24) + 0.5) / 24)
    np.testing.assert_allclose(results.load_arrays(name)["theory_exponents"][0], expected, atol=1e-3)


def test_gated_networks_at_rest_have_the_exponent_of_their_linearisation(results):
    """h = 0 without input: ln max|f + eig W/4| for the memory of an LSTM, ln max|z + (1 − z) eig W/2| for a GRU."""
    candidates = {"lstm": weights(rnnjax.LSTMCell, 6, 2), "gru": weights(rnnjax.GRUCell, 6, 2)}
    for name, matrices in candidates.items():
        measured = results.load_arrays(name)["autonomous_exponents"]
        for row, gain in enumerate(CONFIG.gated_gains):
            for column, bias in enumerate(CONFIG.forget_biases):
                kept, eigenvalues = 1 / (1 + np.exp(-bias)), gain * np.linalg.eigvals(matrices)
                moved = eigenvalues / 4 if name == "lstm" else (1 - kept) * eigenvalues / 2
                expected = np.log(np.abs(kept + moved)).max(axis=-1)
                np.testing.assert_allclose(measured[row, column], expected, atol=0.01)


def test_input_changes_the_exponents_of_gated_networks(results):
    for name in ("lstm", "gru"):
        arrays = results.load_arrays(name)
        assert np.abs(arrays["driven_exponents"] - arrays["autonomous_exponents"]).min() > 1e-3


@pytest.mark.parametrize("kind", [rnnjax.LSTMCell, rnnjax.GRUCell])
@pytest.mark.parametrize("bias", [-2.0, 0.0, 2.0])
def test_critical_gains_are_where_the_linearisation_reaches_one(kind, bias):
    """max|f + g W/4| and max|z + (1 − z) g W/2| over the disk of eigenvalues, whose rightmost point is g."""
    gain, kept = lyapunov_spectra.critical_gains(kind, np.array([bias]))[0], 1 / (1 + np.exp(-bias))
    rightmost = gain / 4 if kind is rnnjax.LSTMCell else (1 - kept) * gain / 2
    assert kept + rightmost == pytest.approx(1)


def test_powers_of_a_shear(results):
    arrays = results.load_arrays("shears")
    powers = [np.linalg.matrix_power([[1.0, 1.0], [0.0, 1.0]], length) for length in arrays["product_lengths"]]
    expected = np.log(np.linalg.svd(powers, compute_uv=False))
    np.testing.assert_allclose(arrays["log_singular_values"], expected, atol=1e-5)
    np.testing.assert_allclose(arrays["exact_log_singular_values"], expected, atol=1e-9)
    np.testing.assert_array_equal(arrays["qr_sums"], 0)
    np.testing.assert_array_equal(arrays["product_exponents"], 0)


def test_products_of_gaussian_matrices(results):
    arrays = results.load_arrays("gaussians")
    exact = [(mpmath.log(mpmath.mpf(2) / 6) + mpmath.digamma(mpmath.mpf(6 - i) / 2)) / 2 for i in range(6)]
    np.testing.assert_allclose(arrays["product_exponents"], np.array(exact, float), atol=1e-5)
    values, sums = arrays["log_singular_values"], arrays["qr_sums"]
    np.testing.assert_allclose(values.sum(axis=1), sums.sum(axis=1), atol=1e-3)  # both are log|det|
    matrices = np.asarray(jax.random.normal(jax.random.key(0), (64, 6, 6)), np.float64) / np.sqrt(6)
    for row, length in enumerate((1, 2, 4)):
        product = np.linalg.multi_dot([*matrices[:length][::-1], np.eye(6)])
        np.testing.assert_allclose(values[row], np.log(np.linalg.svd(product, compute_uv=False)), atol=1e-4)
    spread = np.sqrt([float(mpmath.psi(1, mpmath.mpf(6 - i) / 2)) / 4 / 64 for i in range(6)])
    assert np.all(np.abs(values[3] / 64 - arrays["product_exponents"]) < 4 * spread)


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_tables_rest_on_the_arrays(results):
    vanilla, lstm, shears = (results.load_arrays(name) for name in ("vanilla", "lstm", "shears"))
    row = rows_of(results.path / "table_tanh.csv")[1]
    largest, positive = vanilla["largest_exponents"][1], (vanilla["exponents"][1] > 0).sum(axis=1) / 24
    assert (row["network"], float(row["gain"])) == ("tanh", 3.0)
    assert float(row["λ₁"]) == pytest.approx(largest.mean())
    assert float(row["± λ₁"]) == pytest.approx(abs(largest[0] - largest[1]) / np.sqrt(2), rel=1e-5)
    assert float(row["positive"]) == pytest.approx(positive.mean())
    for column, name in (("λ₁ theory", "theory_largest_exponents"), ("positive theory", "theory_positive_shares")):
        assert float(row[column]) == pytest.approx(vanilla[name][1])
    deviations = sum(vanilla["exponents"][1]) / 2 - vanilla["theory_exponents"][1]
    assert float(row["mean |Δλ_i|"]) == pytest.approx(sum(abs(deviations)) / 24)
    gates = rows_of(results.path / "table_gates.csv")
    assert [(row["cell"], row["input"]) for row in gates] == [
        (cell, drive) for cell in ("LSTM", "GRU") for drive in ("none", "white noise")
    ]
    assert float(gates[0]["bias -2"]) == pytest.approx(lstm["autonomous_exponents"][0, 0].mean())
    assert float(gates[1]["bias -2"]) == pytest.approx(lstm["driven_exponents"][0, 0].mean())
    first = rows_of(results.path / "table_products.csv")[0]
    assert float(first["log σ₁ / T"]) == pytest.approx(shears["log_singular_values"][0, 0])


def test_interrupted_it_keeps_the_parts_that_are_done(tmp_path):
    workdir = tmp_path / "results"
    process = start("lyapunov_spectra", "--num_steps=400", f"--workdir={workdir}")
    deadline = time.monotonic() + 90
    while not (workdir / "gaussians.npz").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 130
    assert "interrupted; parts that are done: shears, gaussians" in errors
    assert "singular values of shears" in errors
    assert "13/13" in errors
    assert "Gaussian matrices" in output
    assert "Traceback" not in errors
    assert {path.name for path in workdir.iterdir()} == {
        *("config.json", "environment.json", "shears.npz", "gaussians.npz"),
        *("table_products.txt", "table_products.csv", "lyapunov_singular_values.png"),
    }
    assert json.loads((workdir / "config.json").read_text())["num_steps"] == 400
