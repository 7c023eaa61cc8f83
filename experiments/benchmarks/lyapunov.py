"""What a Lyapunov spectrum costs, beside lyapax.

  python -m experiments.benchmarks.lyapunov

times the leading quarter and all exponents of random tanh networks h ← tanh(W h), W_ij ~ N(0, g²/N), in float64: ours,
ours with a QR at every step, and lyapax (the extra "benchmarks"; only this one needs it), called plainly and inside
jax.jit. All run on the same network from the same state, compiled first and then in turns, and the table sets our
median time against the faster of the two lyapax. The difference is the largest of any exponent from those of a QR at
every step of the same frame. Lines of JSON, with the machine and the versions, then the table.
"""

import functools
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import rnnjax
from experiments import options
from rnnjax.serialization import format_table

FLAGS = flags.FLAGS
GAIN = 2.0


def contestants(size: int, count: int, num_steps: int, seed: int) -> dict[str, Callable[[], Any]]:
    """Returns the programs to time, all for one network; each returns its exponents ``[k]``."""
    from lyapax import lyapunov_spectrum as lyapax_spectrum

    rng = np.random.default_rng(seed)
    weights = jnp.asarray(GAIN * rng.normal(size=(size, size)) / np.sqrt(size))
    state = jnp.asarray(rng.normal(size=size))
    kernel = jnp.asarray(np.asarray(weights).T[:, None].copy())
    params = rnnjax.CellParams(jnp.zeros((1, 1, size)), kernel, jnp.zeros((1, size)))
    cell = rnnjax.VanillaCell(size)

    @functools.partial(jax.jit, static_argnames="block_length")
    def ours(params: Any, state: Any, block_length: int | None = None) -> Any:
        spectrum = rnnjax.lyapunov_spectrum
        lengths = {"num_steps": num_steps, "num_exponents": count, "block_length": block_length}
        return spectrum(cell, params, carry=state, **lengths).exponents

    def other(weights: Any, state: Any) -> Any:
        return lyapax_spectrum(lambda h: jnp.tanh(weights @ h), state, dt=1.0, n_steps=num_steps, k=count).exponents

    compiled = jax.jit(other)
    return {
        "rnnjax": lambda: ours(params, state),
        "QR every step": lambda: ours(params, state, block_length=1),
        "lyapax": lambda: other(weights, state),
        "lyapax, jit": lambda: compiled(weights, state),
    }


def timed(function: Callable[[], Any], warm_up: bool = False) -> tuple[float, np.ndarray]:
    """Returns seconds and the result, of a second call in a row if there is to be a warm-up."""
    if warm_up:
        jax.block_until_ready(function())
    start = time.perf_counter()
    result = np.asarray(jax.block_until_ready(function()))
    return time.perf_counter() - start, result


def measured(size: int, count: int, num_steps: int, repeats: int, seed: int) -> dict[str, Any]:
    """Runs every contestant in turns and returns a line of results; times in milliseconds a step."""
    programs = contestants(size, count, num_steps, seed)
    first = {name: timed(program) for name, program in programs.items()}
    rounds = [{name: timed(program, warm_up=True)[0] for name, program in programs.items()} for _ in range(repeats)]
    steady = {name: statistics.median(times[name] for times in rounds) * 1e3 / num_steps for name in programs}
    difference = np.abs(first["rnnjax"][1] - first["QR every step"][1]).max()
    return {
        "N": size,
        "k": count,
        "T": num_steps,
        "first_call_s": {name: round(seconds, 3) for name, (seconds, _) in first.items()},
        "ms_per_step": {name: round(value, 5) for name, value in steady.items()},
        "speedup": round(min(steady["lyapax"], steady["lyapax, jit"]) / steady["rnnjax"], 2),
        "difference": float(difference),
        "seed": seed,
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def table_row(line: dict[str, Any]) -> dict[str, Any]:
    """Returns one row of the table."""
    times = {f"{name} (ms/step)": f"{value:.4f}" for name, value in line["ms_per_step"].items()}
    return {
        "N": line["N"],
        "k": line["k"],
        **times,
        "faster by": f"{line['speedup']:.1f}×",
        "difference": f"{line['difference']:.0e}",
    }


def main(argv: Sequence[str]) -> None:
    """Prints the lines and the table."""
    with options.user_errors():
        options.no_arguments(argv)
        sizes = [options.positive_integer("sizes", size) for size in FLAGS.sizes]
        if importlib.util.find_spec("lyapax") is None:
            raise ImportError("lyapax must be installed: pip install 'rnnjax[benchmarks]'")
    lines = []
    with jax.enable_x64(True):
        for size in sizes:
            for count in (max(1, size // 4), size):
                lines.append(measured(size, count, FLAGS.num_steps, FLAGS.repeats, FLAGS.seed))
                sys.stdout.write(json.dumps(lines[-1]) + "\n")
                sys.stdout.flush()
    sys.stdout.write(format_table([table_row(line) for line in lines]) + "\n")


if __name__ == "__main__":
    flags.DEFINE_list("sizes", ["64", "128", "256"], "numbers of units N")
    flags.DEFINE_integer("num_steps", 1000, "steps T", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "rounds after the first call", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "seed of the networks")
    options.run(main)
