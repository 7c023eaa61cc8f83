"""Sequences spread over several devices, on meshes with explicit axes (JAX's own choice) and with automatic ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rnnjax

# A process of its own: a process has as many devices as it started with.
_BEGIN = """
import jax, jax.numpy as jnp, numpy as np, rnnjax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from rnnjax.jacobians import jacobian_operator
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_x64", True)
assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.{kind},))
inputs = jax.random.normal(jax.random.key(1), (20, 4, 3), jnp.float64)
spread = jax.device_put(inputs, NamedSharding(mesh, P(None, "batch")))

def oscillator(params, h, x):
    return jnp.tanh(params * h + x), {{"square": h**2}}

def equal(results, expected, atol=1e-12):
    results, expected = jax.tree.map(np.asarray, (results, expected))
    jax.tree.map(lambda r, e: np.testing.assert_allclose(r, e, rtol=atol, atol=atol), results, expected)

step_cell = rnnjax.StepCell(oscillator, example_carry=jnp.zeros(3))
cells = [(cell, cell.init(jax.random.key(0), 3, jnp.float64)) for cell in (rnnjax.VanillaCell(6), rnnjax.LSTMCell(6))]
cells.append((step_cell, jnp.float64(0.5)))
"""

_TRAINING = (
    _BEGIN
    + """
options = {{"lengths": np.array([20, 3, 0, 5]), "resets": np.arange(20)[:, None] % 7 == np.arange(4), "truncation": 6}}
every = [({{}}, {{"reverse": True, "checkpoint_every": 5}}), (options,), ({{"max_carry_gradient": 0.01}},)]

def value_and_gradients(cell, params, inputs, options):
    def loss(params, inputs):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(rnnjax.unroll(cell, params, inputs, **options)[1]))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, inputs)

for (cell, params), several in zip(cells, every):
    for chosen in several:
        expected = value_and_gradients(cell, params, inputs, chosen)
        equal(value_and_gradients(cell, params, spread, chosen), expected)
    with jax.set_mesh(mesh):
        equal(value_and_gradients(cell, params, spread, chosen), expected)
    carry, outputs = rnnjax.unroll(cell, params, spread)
    assert jax.tree.leaves(carry)[0].sharding.spec[0] == jax.tree.leaves(outputs)[0].sharding.spec[1] == "batch"
    equal((carry, outputs), rnnjax.unroll(cell, params, inputs))
    equal(rnnjax.trajectory(cell, params, spread).carries, rnnjax.trajectory(cell, params, inputs).carries)
    misses = rnnjax.meshes._with_automatic_axes._cache_size()
    rnnjax.unroll(cell, params, spread)
    assert rnnjax.meshes._with_automatic_axes._cache_size() == misses
    if isinstance(cell, rnnjax.LSTMCell):
        both = (params, params)
        equal(rnnjax.unroll_bidirectional(cell, both, spread), rnnjax.unroll_bidirectional(cell, both, inputs))
"""
)

_ANALYSIS = (
    _BEGIN
    + """
def refused(name, function):
    try:
        function()
    except ValueError as error:
        start = f"{{name}} must not be spread over explicit axes of a mesh, got float64["
        assert str(error).startswith(start) and "axis_types=(jax.sharding.AxisType.Auto,)" in str(error), error
        return
    assert False, f"{{name}} was taken"

for cell, params in cells[1:]:
    path, plain = rnnjax.trajectory(cell, params, spread), rnnjax.trajectory(cell, params, inputs)
    analyses = {{
        "operator": lambda path, inputs: rnnjax.factor_product(jacobian_operator(cell, params, path)),
        "dense": lambda path, inputs: rnnjax.step_jacobians(cell, params, path),
        "profile": lambda path, inputs: rnnjax.spectral_profile(cell, params, inputs),
        "exponents": lambda path, inputs: rnnjax.lyapunov_spectrum(cell, params, inputs),
    }}
    for analysis in analyses.values():
        if "{kind}" == "Explicit":
            refused("trajectory", lambda: analysis(path, spread))
        else:
            equal(analysis(path, spread), analysis(plain, inputs), atol=1e-9)
if "{kind}" == "Explicit":
    loss = lambda outputs: jnp.sum(outputs["square"])
    refused("inputs", lambda: rnnjax.gradient_flow(step_cell, params, spread, loss))
    matrices = jax.device_put(jnp.ones((20, 4, 2, 2)), NamedSharding(mesh, P(None, "batch")))
    refused("matrices", lambda: rnnjax.factor_product(matrices))
    refused("jacobians", lambda: rnnjax.spectral_norm_profile(matrices))
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
@pytest.mark.parametrize("program", [_TRAINING, _ANALYSIS], ids=["training", "analysis"])
def test_a_batch_spread_over_devices_gives_what_one_device_gives_or_says_why_not(program, kind):
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_force_host_platform_device_count=2 " + os.environ["XLA_FLAGS"],
        OPENBLAS_NUM_THREADS="1",
        PYTHONPATH=str(Path(rnnjax.__file__).parents[1]),
    )
    command = [sys.executable, "-W", "error", "-c", program.format(kind=kind)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
