"""Scans in two loops that XLA runs side by side: the same numbers, and loops that do not wait for one another."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnjax
from rnnjax import affine_scan, side_by_side
from tests.test_affine_scan import EVERY_CELL, agree, loss, problem, random_like


@pytest.fixture
def loops(monkeypatch):
    """Sets the number of loops, whatever the size."""

    def set_number(number):
        jax.clear_caches()
        monkeypatch.setattr(affine_scan, "number_of_loops", lambda *_: number)

    yield set_number
    monkeypatch.undo()
    jax.clear_caches()


def in_one_and_two(loops, function, *arguments):
    results = []
    for number in (1, 2):
        loops(number)
        results.append(function(*arguments))
    return results


@EVERY_CELL
def test_values_and_gradients_of_every_cell(name, loops):
    with jax.enable_x64():
        cell, *arguments = problem(name, batch=(5,))
        gradient = jax.value_and_grad(functools.partial(loss, rnnjax.unroll, cell), argnums=(0, 1, 2))
        agree(*in_one_and_two(loops, gradient, *arguments), 1e-12)


@pytest.mark.parametrize("name", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize(
    "options",
    [
        {"lengths": [11, 4, 0, 7, 1]},
        {"resets": jnp.arange(55).reshape(11, 5) % 7 == 3, "truncation": 4},
        {"truncation": 3, "reverse": True, "lengths": [2, 11, 3, 0, 9]},
        {"checkpoint_every": 4, "reverse": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_values_and_gradients_with_every_option(name, options, loops):
    with jax.enable_x64():
        cell, *arguments = problem(name, batch=(5,))
        options = {key: np.array(value) if isinstance(value, list) else value for key, value in options.items()}
        gradient = jax.value_and_grad(
            functools.partial(loss, functools.partial(rnnjax.unroll, **options), cell), argnums=(0, 1, 2)
        )
        agree(*in_one_and_two(loops, gradient, *arguments), 1e-12)


@pytest.mark.parametrize("name", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("batch", [(), (1,), (2,), (3, 2)])
def test_hidden_gradients_of_any_batch(name, batch, loops):
    with jax.enable_x64():
        cell, params, inputs, carry = problem(name, batch=batch)
        zeros = jnp.zeros((*inputs.shape[:-1], cell.hidden_size))

        def of(perturbations):
            return loss(functools.partial(rnnjax.unroll, perturbations=perturbations), cell, params, inputs, carry)

        # One sequence has no batch to split.
        agree(
            *in_one_and_two(lambda number: loops(number if batch and batch[0] > 1 else 1), jax.grad(of), zeros), 1e-12
        )


@pytest.mark.parametrize("name", ["tanh", "gru", "lstm", "tangled"])
def test_higher_derivatives_and_batching(name, loops):
    with jax.enable_x64():
        cell, *arguments = problem(name, batch=(3,))
        scalar = functools.partial(loss, rnnjax.unroll, cell)
        moved = tuple(random_like(argument, 7 + i, np.float64) for i, argument in enumerate(arguments))

        def everything(params, inputs, carry):
            at = (params, inputs, carry)
            forward_over_reverse = jax.jvp(jax.grad(scalar, argnums=(0, 1, 2)), at, moved)[1]
            reverse_over_forward = jax.grad(lambda *x: jax.jvp(scalar, x, moved)[1], argnums=(0, 1))(*at)
            reverse_over_reverse = jax.grad(
                lambda p: sum(map(jnp.vdot, *map(jax.tree.leaves, (jax.grad(scalar)(p, inputs, carry), moved[0]))))
            )(params)
            batched = jax.vmap(jax.grad(scalar), (None, 0, None))(params, jnp.stack([inputs, 2 * inputs]), carry)
            return forward_over_reverse, reverse_over_forward, reverse_over_reverse, batched

        agree(*in_one_and_two(loops, everything, *arguments), 1e-11)


def test_rounded_factors(loops):
    cell, *arguments = problem("gru", np.float32, batch=(4,))
    run = functools.partial(rnnjax.unroll, compute_dtype=jnp.bfloat16)
    agree(*in_one_and_two(loops, jax.grad(functools.partial(loss, run, cell)), *arguments), 1e-6)


def test_steps_that_are_neither_too_small_nor_too_large_are_split(monkeypatch):
    monkeypatch.setattr(side_by_side, "_number_of_cores", lambda: 2)
    split = side_by_side.number_of_loops
    assert split((64, 256), 1, 100) == split((64, 256), 4, 100) == split((32, 128), 4, 200) == 2
    assert split((32, 128), 1, 1000) == split((128, 512), 1, 50) == split((64, 256), 1, 3) == 1
    assert split((2048,), 1, 1000) == split((1, 2048), 1, 1000) == 1  # nothing to split
    monkeypatch.setattr(side_by_side, "_number_of_cores", lambda: 1)
    assert split((64, 256), 1, 100) == 1
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert split((64, 256), 1, 100) == 1


_PROGRAM = """
import jax, rnnjax
from rnnjax import affine_scan
affine_scan.number_of_loops = lambda *_: 2
cell = rnnjax.{cell}
inputs = jax.numpy.ones((200, 32, 32))
params = cell.init(jax.random.key(0), input_size=32)
gradient = jax.jit(jax.grad(lambda params, inputs: (rnnjax.unroll(cell, params, inputs)[1] ** 2).mean()))
gradient.lower(params, inputs).compile()
"""


@pytest.mark.parametrize(
    "cell",
    [
        "VanillaCell(128)",
        "VanillaCell(128, activation='relu')",
        "LeakyCell(128, leak=0.5)",
        "GRUCell(128)",
        "LSTMCell(128)",
    ],
)
def test_xla_has_no_loop_wait_for_another(cell):
    """By what XLA's runtime logs of which part of a program waits for which."""
    log = {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "thunk_executor=6", "JAX_PLATFORMS": "cpu"}
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | log
    command = [sys.executable, "-c", _PROGRAM.format(cell=cell)]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=300).stderr
    last = said.rpartition("Constructed ThunkExecutor with")[2]
    waits = dict(re.findall(r"op_name=([\w.]+), kind=while, dependencies=\[(.*?)\]", last))
    if not waits:
        pytest.skip("this version of XLA does not log what waits for what")
    assert len(waits) == 4, "two loops forwards, two backwards"
    assert "is_sequential=false" in last
    for name, others in waits.items():
        assert not set(others.split(", ")) & set(waits), f"{name} waits for {others}"
