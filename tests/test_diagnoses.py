"""Ensembles against runs of ``fit``, and the experiment on diagnoses in miniature."""

import csv

import jax
import numpy as np
import pytest

from experiments import diagnoses
from experiments.benchmarks import remedies
from experiments.benchmarks.turns import take_turns
from experiments.ensembles import Ensemble, train_ensemble
from rnnjax import diagnosis_plots
from rnnjax.configuration import RunConfig
from rnnjax.train import fit
from rnnjax.workdir import Workdir

pytestmark = pytest.mark.slow

SMALL = {"task": "adding", "length": 6, "hidden_size": 4, "steps": 5, "batch_size": 4, "evaluate_every": 2}


@pytest.fixture(scope="module", autouse=True)
def _promotion_as_optax_needs_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_every_network_of_an_ensemble_is_trained_as_fit_trains_it():
    config = RunConfig(**SMALL, seed=3)
    ensemble = train_ensemble("adding", config, 2)
    assert ensemble.evaluation_steps.tolist() == [2, 4, 5]
    for index, seed in enumerate((3, 4)):
        own = RunConfig(**SMALL, seed=seed)
        task, losses = own.make_task(), []
        result = fit(
            own.make_network(task),
            task,
            own.make_optimizer(),
            own.fit_settings(),
            on_step=lambda step, row, losses=losses: losses.append(row["loss"]),
        )
        np.testing.assert_allclose(ensemble.metrics["loss"][index], losses, rtol=1e-5)
        held_out = [scores["loss"] for scores in result.evaluations]
        np.testing.assert_allclose(ensemble.held_out["loss"][index], held_out, rtol=1e-5)


def test_first_non_finite_value_is_located_within_a_chunk():
    """Linear units of gain 100 over 30 steps overflow at once; those of gain 1 never do."""
    settings = SMALL | {"length": 30, "activation": "identity", "clip_norm": 0.0}
    broken = train_ensemble("explodes", RunConfig(**settings, gain=100.0), 2)
    for origin in broken.origins:
        assert origin["training_step"] == 0 and origin["non_finite_pass"] in ("forward", "backward", "loss")
    assert broken.metrics["skipped"].all()
    assert train_ensemble("holds", RunConfig(**settings), 2).origins == [{}, {}]


def test_steps_to_solve():
    accuracy = np.array([[0.2, 0.95, 0.9], [0.1, 0.2, 0.3]])
    nothing = {"graph": None, "initial": None, "final": None, "metrics": {}, "origins": [], "seconds": 0.0}
    ensemble = Ensemble(evaluation_steps=np.array([10, 20, 30]), held_out={"accuracy": accuracy}, **nothing)
    np.testing.assert_array_equal(ensemble.steps_to_solve(0.9), [20, np.nan])


def test_experiment_writes_table_arrays_and_figure(tmp_path, capsys):
    config = diagnoses.Config(steps=4, num_seeds=2, hidden_size=8)
    chosen = ["tanh, gain ½, order", "ReLU, dead, recall", "healthy: GRU, chrono, recall"]
    cases = {name: diagnoses.CASES[name] | {"length": 12} for name in chosen}
    cases["healthy: GRU, chrono, recall"]["chrono"] = 200
    workdir = Workdir.create(tmp_path / "results")
    assert diagnoses.run(config, workdir, cases) == 0
    with (workdir.path / "table.csv").open() as file:
        rows = {row["network"]: row for row in csv.DictReader(file)}
    assert [rows[name]["advice"] for name in chosen] == [
        "orthogonal initialisation at gain 1",
        "identity initialisation",
        "none",
    ]
    assert rows["tanh, gain ½, order"]["regime"] == "vanishing"
    # ‖J_t‖ ≤ ½, over twelve steps.
    assert float(rows["tanh, gain ½, order"]["log σ₁"]) < -12 * np.log(2)
    arrays = workdir.load_arrays("diagnoses")
    for index, name in enumerate(chosen):
        assert float(rows[name]["loss before"]) == pytest.approx(float(arrays["loss_before"][index]), rel=1e-5)
    better = [after < before for before, after in zip(arrays["loss_before"][:2], arrays["loss_after"][:2], strict=True)]
    accuracies = arrays["accuracy_after"][:2] >= arrays["accuracy_before"][:2]
    expected = sum(lower and high for lower, high in zip(better, accuracies, strict=True))
    output = capsys.readouterr().out
    assert f"The first advice made {expected} of 2 networks better." in output
    assert "of the units answer nothing at any step" in output
    assert 0 < (workdir.path / "advice.png").stat().st_size < 300_000


def test_figure_has_a_row_for_each_network():
    rows = {"network": ["a", "b"], "regime": ["vanishing", "critical"], "advice": ["gain 1", "none"]}
    figure = diagnosis_plots.advice(rows | {"accuracy_before": [0.1, 0.8], "accuracy_after": [0.9, np.nan]})
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["a (vanishing)", "b (critical)"]
    with pytest.raises(ValueError, match="missing: accuracy_after"):
        diagnosis_plots.advice(rows | {"accuracy_before": [0.1, 0.8]})
    with pytest.raises(ValueError, match="arrays must hold at least one network"):
        diagnosis_plots.advice({key: [] for key in (*rows, "accuracy_before", "accuracy_after")})


def test_benchmark_of_remedies_times_every_one():
    programs = remedies.contestants("gru", 4, 6)
    assert list(programs) == [*remedies.SETTINGS, "split by lag"]
    results = take_turns(programs, 2)
    assert all(result["median_ms"] > 0 and result["first_call_s"] > 0 for result in results.values())
    # The penalised gradients are others than the plain one, and truncation at 25 of 6 steps is none.
    gradients = {
        name: program(*arguments)[1] for name, (program, arguments) in programs.items() if name != "split by lag"
    }
    flat = {name: np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for name, g in gradients.items()}
    np.testing.assert_allclose(flat["truncated at 25"], flat[remedies.PLAIN], rtol=1e-5, atol=1e-7)
    for name in ("Ω", "flossing, k = 4"):
        assert np.abs(flat[name] - flat[remedies.PLAIN]).max() > 1e-4
