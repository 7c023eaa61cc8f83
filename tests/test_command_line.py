"""What a command that cannot run says: one line, before anything is written."""

import subprocess
import sys

import pytest

from tests.command_line import ROOT, command

# Python ends by freeing JAX's client, with which XLA may still be compiling on a thread of its own.
INTERRUPTED = """
import atexit, os, signal, threading
import jax
import jax.numpy as jnp
from experiments import options

def many_products(x):
    for _ in range(300):
        x = jnp.sin(x) @ x
    return x

def main(argv):
    print("before")
    lowered = jax.jit(many_products).lower(jnp.ones((8, 8)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
    lowered.compile()
    threading.Event().wait(20)

atexit.register(print, "taken apart")
options.run(main)
"""

BAD_SETTINGS = [
    ("error_surface", "--learning_rate=0", "learning_rate must be a positive finite number, got 0.0"),
    ("error_surface", "--max_norm=nan", "max_norm must be a positive finite number, got nan"),
    ("error_surface", "--weight=200", "weight must be a number in [-100, 100], got 200.0"),
    ("error_surface", "--num_updates=0", "num_updates must be a whole number in [1, 10000], got 0"),
    ("lyapunov_spectra", "--num_units=1", "num_units must be an integer of at least 2, got 1"),
    ("lyapunov_spectra", "--num_networks=1", "num_networks must be an integer of at least 2, got 1"),
    ("lyapunov_spectra", "--seed=-1", "seed must be a non-negative integer, got -1"),
    ("lyapunov_spectra", "fast", "settings are given as --name=value, got 'fast'"),
    ("long_term_dependency", "--distances=50,5", "distances must ascend, at least one, got [50, 5]"),
    ("long_term_dependency", "--distances=5", "share_distance must be one of [5], got 50"),
    ("temporal_order", "--lengths=20,9", "lengths must ascend, at least one, got [20, 9]"),
    ("temporal_order", "--initializations=large", "initializations must be one of"),
    ("temporal_order", "--full --lengths=9", "length does not suit task 'temporal_order'"),
    ("vanishing_remedies", "--steps=0", "steps must be a positive integer, got 0"),
    ("vanishing_remedies", "--full --steps=0", "steps must be a positive integer, got 0"),
    ("vanishing_remedies", "--kinds=none,magic", "kinds must be one of"),
    ("vanishing_remedies", "--recall_distance=2", "length does not suit"),
    ("exploding_remedies", "--remedies=hope", "remedies must be one of"),
    ("exploding_remedies", "word", "settings are given as --name=value, got 'word'"),
    ("diagnoses", "word", "settings are given as --name=value, got 'word'"),
]

LOST = """
import gc, signal, time
from experiments import options

def press(phase, info):
    gc.callbacks.remove(press)
    raise KeyboardInterrupt

def main(argv):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.callbacks.append(press)
    gc.collect()
    time.sleep(20)

options.run(main)
"""


def output_of(program):
    """Returns the exit status of a Python program, what it printed, and its errors."""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize(("experiment", "arguments", "words"), BAD_SETTINGS)
def test_bad_settings_end_in_one_line(tmp_path, experiment, arguments, words):
    status, _, errors = command(experiment, *arguments.split(), f"--workdir={tmp_path / 'new'}")
    assert status == 2
    assert errors.startswith(f"error: {words}") and len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("experiment", sorted({experiment for experiment, _, _ in BAD_SETTINGS}))
def test_a_used_workdir_is_refused(tmp_path, experiment):
    (tmp_path / "earlier.txt").write_text("results")
    status, _, errors = command(experiment, f"--workdir={tmp_path}")
    assert status == 2
    assert errors.startswith("error: workdir must be empty or not exist yet")
    assert [path.name for path in tmp_path.iterdir()] == ["earlier.txt"]


def test_interrupted_while_xla_compiles_it_ends_at_once():
    assert output_of(INTERRUPTED) == (130, "before\n", "interrupted\n")


def test_an_interrupt_while_garbage_is_collected_is_not_lost():
    assert output_of(LOST) == (130, "", "interrupted\n")
