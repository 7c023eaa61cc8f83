"""Experiments as their users start them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def start(experiment, *arguments):
    """Starts ``python -m experiments.EXPERIMENT`` in a process of its own."""
    # A shell that started the tests in the background has them, and what they start, ignore interrupts.
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", f"experiments.{experiment}", *arguments],
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "100"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, previous)


def command(experiment, *arguments):
    """Returns the exit status, what it printed, and its errors."""
    process = start(experiment, *arguments)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors
