"""Scans in two loops that XLA runs side by side: the same numbers, and loops that do not wait for one another."""

import dataclasses
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rnnjax
from rnnjax import affine_scan, frames, side_by_side
from rnnjax.configuration import RunConfig
from rnnjax.jacobians import jacobian_operator
from rnnjax.train import create_state, train_step
from tests.test_affine_scan import EVERY_CELL, agree, loss, problem, random_like

unroll = functools.partial(rnnjax.unroll, side_by_side=True)


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
        gradient = jax.value_and_grad(functools.partial(loss, unroll, cell), argnums=(0, 1, 2))
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
            functools.partial(loss, functools.partial(unroll, **options), cell), argnums=(0, 1, 2)
        )
        agree(*in_one_and_two(loops, gradient, *arguments), 1e-12)


@pytest.mark.parametrize("name", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("batch", [(), (1,), (2,), (3, 2)])
def test_hidden_gradients_of_any_batch(name, batch, loops):
    with jax.enable_x64():
        cell, params, inputs, carry = problem(name, batch=batch)
        zeros = jnp.zeros((*inputs.shape[:-1], cell.hidden_size))

        def of(perturbations):
            return loss(functools.partial(unroll, perturbations=perturbations), cell, params, inputs, carry)

        # One sequence has no batch to split.
        agree(
            *in_one_and_two(lambda number: loops(number if batch and batch[0] > 1 else 1), jax.grad(of), zeros), 1e-12
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tanh", "gru", "lstm", "tangled"])
def test_higher_derivatives_and_batching(name, loops):
    with jax.enable_x64():
        cell, *arguments = problem(name, batch=(3,))
        scalar = functools.partial(loss, unroll, cell)
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
    run = functools.partial(unroll, compute_dtype=jnp.bfloat16)
    agree(*in_one_and_two(loops, jax.grad(functools.partial(loss, run, cell)), *arguments), 1e-6)


def loops_of(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text().count(" while(")


def test_two_loops_are_what_is_asked_for(loops):
    cell, *arguments = problem("gru", np.float32, batch=(4,))
    loops(2)
    either = [jax.grad(functools.partial(loss, run, cell)) for run in (rnnjax.unroll, unroll)]
    assert [loops_of(gradient, *arguments) for gradient in either] == [2, 4]


def test_training_takes_two_loops(loops):
    config = RunConfig(task="adding", length=6, cell="gru", hidden_size=4, batch_size=4)
    task, optimizer = config.make_task(), config.make_optimizer()
    network = config.make_network(task)
    settings, state = config.backpropagation_settings(), create_state(network, optimizer)
    step = functools.partial(train_step, nnx.split(network)[0], task, optimizer)
    loops(2)
    either = [functools.partial(step, dataclasses.replace(settings, side_by_side=asked)) for asked in (False, True)]
    with jax.numpy_dtype_promotion("standard"):  # as Optax needs it
        assert [loops_of(of, state, task.batch(0, 0, 4)) for of in either] == [2, 4]
    assert settings.side_by_side


def test_steps_that_are_neither_too_small_nor_too_large_are_split(monkeypatch):
    monkeypatch.setattr(side_by_side, "_number_of_cores", lambda: 2)
    split = side_by_side.number_of_loops
    assert split(64 * 256**2, 100, 64) == split(4 * 64 * 256**2, 100, 64) == split(32 * 128**2, 200, 32) == 2
    assert split(16 * 128**2, 1000, 16) == split(128 * 512**2, 50, 128) == split(64 * 256**2, 3, 64) == 1
    assert split(2048**2, 1000, 1) == 1  # nothing to split
    monkeypatch.setattr(side_by_side, "_number_of_cores", lambda: 1)
    assert split(64 * 256**2, 100, 64) == 1
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert split(64 * 256**2, 100, 64) == 1


@pytest.mark.parametrize(("first", "stop"), [(0, 1), (3, 10)])
def test_two_loops_do_what_one_does_to_each_of_two_carries(first, stop):
    with jax.enable_x64():
        matrix = jax.random.normal(jax.random.key(0), (4, 4))
        factors = jax.random.normal(jax.random.key(1), (10, 4, 1))

        def step(index, carry):
            columns, total = carry
            after = jnp.tanh(matrix @ columns) * factors[index] + columns * columns.sum()
            return after, total + after.sum() / jnp.linalg.norm(columns)

        parts = [(jnp.ones((4, 3)), jnp.ones(())), (jnp.eye(4)[:, :2], jnp.zeros(()))]
        run = functools.partial(side_by_side.fori_side_by_side, step=step, carries=parts)
        expected = [jax.lax.fori_loop(first, stop, step, part) for part in parts]
        agree(run(jnp.int32(first), jnp.int32(stop)), expected, 1e-13)
        agree(jax.jit(run)(jnp.int32(first), jnp.int32(stop)), expected, 1e-13)
        batched = jax.vmap(run)(jnp.array([first, 0], jnp.int32), jnp.array([stop, 2], jnp.int32))
        agree(jax.tree.map(lambda x: x[0], batched), expected, 1e-13)


def test_two_loops_start_from_what_is_not_finite():
    start = [jnp.array([jnp.nan, 1.0]), jnp.array([jnp.inf, 2.0])]
    found = side_by_side.fori_side_by_side(jnp.int32(0), jnp.int32(3), lambda index, x: x + 1, start)
    np.testing.assert_array_equal(np.array(found), [[np.nan, 4], [np.inf, 5]])


@pytest.mark.parametrize("cell", [rnnjax.VanillaCell(12), rnnjax.LeakyCell(12, leak=0.3), rnnjax.GRUCell(12)])
@pytest.mark.parametrize("backward", [False, True])
def test_frames_carried_along_by_halves(cell, backward, monkeypatch):
    with jax.enable_x64():
        params = jax.tree.map(lambda x: x.astype(float), cell.init(jax.random.key(0), input_size=3))
        path = rnnjax.trajectory(cell, params, jax.random.normal(jax.random.key(1), (40, 3)))
        jacobians = jacobian_operator(cell, params, path)
        frame = frames.random_frame(jax.random.key(2), jacobians, 5)
        found = []
        for number in (1, 2):
            monkeypatch.setattr(frames, "number_of_loops", lambda *_, number=number: number)
            jax.clear_caches()
            found.append(frames.block_growth(jacobians, frame, (0, 15, 40), backward))
        jax.clear_caches()
        agree(*found, 1e-10)


_PROGRAM = """
import jax, rnnjax
from rnnjax import affine_scan
affine_scan.number_of_loops = lambda *_: 2
cell = rnnjax.{cell}
inputs = jax.numpy.ones((200, 32, 32))
params = cell.init(jax.random.key(0), input_size=32)
run = lambda params, inputs: rnnjax.unroll(cell, params, inputs, side_by_side=True)[1]
gradient = jax.jit(jax.grad(lambda params, inputs: (run(params, inputs) ** 2).mean()))
gradient.lower(params, inputs).compile()
"""


@pytest.mark.slow  # compiled as for users
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
    last = _logged(_PROGRAM.format(cell=cell))[-1]
    loops = [name for name, (kind, _) in last.items() if kind == "while"]
    assert len(loops) == 4, "two loops forwards, two backwards"
    for name in loops:
        assert not set(last[name][1]) & set(loops), f"{name} waits for {last[name][1]}"


_GROWTH = """
import jax, rnnjax
jax.config.update("jax_enable_x64", True)
from rnnjax import side_by_side
side_by_side._number_of_cores = lambda: 2
cell = rnnjax.VanillaCell(128)
params = cell.init(jax.random.key(0), input_size=1)
spectrum = jax.jit(lambda params: rnnjax.lyapunov_spectrum(cell, params, num_steps=500, num_exponents=32).exponents)
spectrum.lower(params).compile()
"""


@pytest.mark.slow  # compiled as for users
def test_xla_hands_one_of_two_loops_to_another_thread():
    check_two_threads(_GROWTH)


def check_two_threads(program):
    """XLA halves what can be computed next: one loop has to wait for an early part of that, the other for the rest."""
    for thunks in _logged(program):
        for before in thunks:
            after = [name for name, (_, waits) in thunks.items() if before in waits and "tanh" in before]
            if len(after) > 9:
                break
        else:
            continue
        needs = [_needs(thunks, name) & set(after) for name, (kind, _) in thunks.items() if kind == "while"]
        loops = [need for need in needs if need and need != set(after)]
        assert len(loops) == 2
        first, second = sorted(loops, key=len)
        assert first.isdisjoint(second)
        assert first <= set(after[: len(after) // 2])
        assert second >= set(after[len(after) // 2 :])
        return
    pytest.fail("nothing is waited for by many")


def _logged(program):
    """Returns for each part of a program that is not sequential: name → (kind, what it waits for), in order."""
    log = {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "thunk_executor=6", "JAX_PLATFORMS": "cpu"}
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | log
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=300).stderr
    parts = [part for part in said.split("Constructed ThunkExecutor with")[1:] if "is_sequential=false" in part]
    found = [re.findall(r"op_name=([\w.-]+), kind=([\w-]+), dependencies=\[(.*?)\]", part) for part in parts]
    if not any(found):
        pytest.skip("this version of XLA does not log what waits for what")
    return [{name: (kind, waits.split(", ")) for name, kind, waits in part} for part in found]


def _needs(thunks, name):
    """Returns all that has to be computed before."""
    found, left = set(), [name]
    while left:
        new = [wait for wait in thunks.get(left.pop(), ("", []))[1] if wait and wait not in found]
        found.update(new)
        left += new
    return found
