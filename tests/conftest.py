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

# Compiling takes most of the time of a test; with XLA_FLAGS set, even to nothing, it compiles as it does for users.
_QUICK_TO_COMPILE = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__[:2] == (0, 10):  # A flag that other versions do not know ends the process.
    _QUICK_TO_COMPILE.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_QUICK_TO_COMPILE))

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
