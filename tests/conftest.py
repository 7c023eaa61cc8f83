"""Strict settings for every test: no silent broadcasting, no silent promotion, no setting left changed."""

import gc
import os

os.environ["MPLBACKEND"] = "Agg"  # Before anything imports matplotlib: tests run without a screen.
# Before anything loads LAPACK: a second thread gains nothing on small matrices, and on a busy machine waits for ages.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # Two test processes share a GPU's memory.

import hypothesis
import jax
import jax.numpy as jnp
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# XLA compiles within some examples, so their times say nothing; fixed examples keep every run the same.
hypothesis.settings.register_profile("rnnjax", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("rnnjax")


@pytest.fixture(autouse=True)
def unchanged_jax_config():
    """Fails a test that leaves a JAX setting other than it found it."""
    before = dict(jax.config.values)
    yield
    after = dict(jax.config.values)
    changed = {name: (before.get(name), after[name]) for name in after if after[name] != before.get(name)}
    for name, (value, _) in changed.items():
        jax.config.update(name, value)
    assert not changed, f"the test left JAX settings changed (before, after): {changed}"


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_let_go():
    """Frees the programs of a file: each maps memory of its own, and a process may have 65,530 maps on Linux."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Runs a test in both precisions; 64-bit types are enabled within the test alone."""
    with jax.enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)
