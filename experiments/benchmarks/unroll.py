"""What value and gradient of a sequence loss cost, beside other packages.

  python -m experiments.benchmarks.unroll

times value and gradient, with respect to all weights, of the mean squared hidden state of one recurrent layer, float32,
for rnnjax, Flax (Linen and NNX), Haiku, Equinox and PyTorch (the extra "benchmarks"; what is not installed is left
out), and the products of matrices alone as a floor; "rnnjax, side by side" is ``unroll(…, side_by_side=True)``, as in
training. All take turns in one process. Lines of JSON with first call (compilation included, the median of some, each
with nothing compiled before but what all share), median time and temporary memory, then two tables: medians in ms with
our time as the unit and the geometric means over the sizes, and first calls in seconds beside Flax Linen's; and a
figure if --figure names a file.

  python -m experiments.benchmarks.unroll --sizes=1000,1,128,32 --sizes=100000,1,128,32 --contestants=rnnjax

is for long sequences; "rnnjax, checkpoints" keeps every ⌈√T⌉-th state alone.
"""

import functools
import json
import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments import options
from experiments.benchmarks import recurrent_peers as peers
from experiments.benchmarks.turns import take_turns
from rnnjax.cost_plots import times_beside
from rnnjax.plots import save_figure
from rnnjax.serialization import format_table

FLAGS = flags.FLAGS
SIZES = ("200,32,128,32", "200,16,64,8", "100,64,256,128", "1000,8,64,4", "50,128,512,256")
"""T, B, H, D."""
FLOOR = "matmuls only"
FASTEST = "fastest JAX peer"
CHECKPOINTS = "rnnjax, checkpoints"
SIDE_BY_SIDE = "rnnjax, side by side"
LINEN = "Flax Linen"
NAMES = (peers.OURS, SIDE_BY_SIDE, CHECKPOINTS, *peers.JAX_PEERS, "PyTorch", FLOOR)


def contestants(
    kind: str, sizes: tuple[int, int, int, int], names: Sequence[str]
) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Returns programs by name, not compiled yet, and the arguments of each; those that are not here are left out."""
    num_steps, batch_size, hidden_size, input_size = sizes
    inputs = jax.random.normal(jax.random.key(1), (num_steps, batch_size, input_size))
    made: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for name in (name for name in names if peers.is_installed(name)):
        if name == "PyTorch":
            made[name] = (peers.torch(kind, inputs, hidden_size), ())
        elif name == FLOOR:
            run, params = peers.matmul_floor(kind, inputs, hidden_size)
            made[name] = (jax.jit(run), (params, inputs))
        elif (layer := _layer(name, kind, inputs, hidden_size)) is not None:
            made[name] = (jax.jit(jax.value_and_grad(_loss(layer[0]))), (layer[1], inputs))
    return made


def _layer(name: str, kind: str, inputs: Any, hidden_size: int) -> peers.Layer | None:
    if name in peers.JAX_PEERS:
        return peers.JAX_PEERS[name](kind, inputs, hidden_size)
    every = math.ceil(math.sqrt(len(inputs))) if name == CHECKPOINTS else None
    return peers.ours(kind, inputs, hidden_size, checkpoint_every=every, side_by_side=name == SIDE_BY_SIDE)


def _loss(layer: Any) -> Any:
    return lambda params, inputs: jnp.mean(layer(params, inputs) ** 2)


def rows(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the table: a row a cell and size, and one a cell with the geometric means of the ratios to ours."""
    table = []
    for kind in dict.fromkeys(m["cell"] for m in measured):
        own = [m for m in measured if m["cell"] == kind]
        ratios: dict[str, list[float]] = {}
        for size in dict.fromkeys(m["size"] for m in own):
            times = {m["what"]: m["median_ms"] for m in own if m["size"] == size}
            unit = times.get(peers.OURS, math.nan)
            for name, value in times.items():
                ratios.setdefault(name, []).append(value / unit)
            shown = {name: f"{value:.1f} ({value / unit:.2f}×)" for name, value in times.items()}
            rivals = [value / unit for name, value in times.items() if name in peers.JAX_PEERS]
            if rivals:
                ratios.setdefault(FASTEST, []).append(min(rivals))
                shown[FASTEST] = f"{min(rivals):.2f}×"
            table.append({"cell": kind, "T, B, H, D": size} | shown)
        means = {name: f"{math.exp(sum(map(math.log, r)) / len(r)):.2f}×" for name, r in ratios.items()}
        table.append({"cell": kind, "T, B, H, D": "geometric mean"} | means | {peers.OURS: "1.00×"})
    return table


def rows_of_first_calls(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the table of first calls, a row a cell and size, with ratios to Flax Linen's where that is there."""
    table: dict[tuple[str, str], dict[str, float]] = {}
    for row in measured:
        table.setdefault((row["cell"], row["size"]), {})[row["what"]] = row["first_call_s"]
    rows = []
    for (cell, size), times in table.items():
        beside = {name: f" ({value / times[LINEN]:.2f}×)" if LINEN in times else "" for name, value in times.items()}
        shown = {name: f"{value:.2f}{beside[name]}" for name, value in times.items()}
        rows.append({"cell": cell, "T, B, H, D": size} | shown)
    return rows


def main(argv: Sequence[str]) -> None:
    """Prints JSON lines and the table."""
    with options.user_errors():
        options.no_arguments(argv)
        sizes = [_sizes(text) for text in FLAGS.sizes]
        repeats, first_calls = (options.positive_integer(n, getattr(FLAGS, n)) for n in ("repeats", "first_calls"))
        if not any(map(peers.is_installed, FLAGS.contestants)):
            raise ValueError(f"contestants must be installed, one of them at least, got {FLAGS.contestants}")
        if FLAGS.figure:
            options.check_new_figure("figure", FLAGS.figure)
    measured = []
    for kind in FLAGS.cells:
        for size in sizes:
            prepare = functools.partial(_compile_what_all_share, size)
            programs = contestants(kind, size, FLAGS.contestants)
            results = take_turns(programs, repeats, first_calls=first_calls, prepare=prepare)
            for name, result in results.items():
                setting = {"cell": kind, "size": ", ".join(map(str, size)), "what": name}
                setting["device"] = jax.devices()[0].device_kind
                # Of the whole process up to now, in kibibytes: it says something of the first contestant alone.
                setting["process_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                measured.append(setting | result)
                sys.stdout.write(json.dumps(measured[-1]) + "\n")
            sys.stdout.flush()
            jax.clear_caches()
    for table in (rows(measured), rows_of_first_calls(measured)):
        sys.stdout.write("\n" + format_table(table) + "\n")
    if FLAGS.figure:
        save_figure(times_beside(measured, peers.OURS), Path(FLAGS.figure))


def _compile_what_all_share(sizes: tuple[int, int, int, int]) -> None:
    """Has no contestant's first call pay for the loss and its derivative, nor for the first matmul of the process."""
    inputs, kernel = jnp.zeros((*sizes[:2], sizes[3])), jnp.zeros((sizes[3], sizes[2]))
    jax.block_until_ready(jax.jit(jax.value_and_grad(_loss(lambda kernel, inputs: inputs @ kernel)))(kernel, inputs))


def _sizes(text: str) -> tuple[int, int, int, int]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--sizes must be four positive integers T,B,H,D, got {text!r}")
    num_steps, batch_size, hidden_size, input_size = map(int, parts)
    return num_steps, batch_size, hidden_size, input_size


if __name__ == "__main__":
    flags.DEFINE_multi_enum("cells", list(peers.KINDS), list(peers.KINDS), "which cells")
    flags.DEFINE_multi_string("sizes", list(SIZES), "sizes T,B,H,D, once each")
    everyone = [name for name in NAMES if name != CHECKPOINTS]
    flags.DEFINE_multi_enum("contestants", everyone, list(NAMES), "whom to time")
    flags.DEFINE_integer("repeats", 15, "timed calls of each contestant")
    flags.DEFINE_integer("first_calls", 3, "first calls of each contestant")
    flags.DEFINE_string("figure", None, "PNG file to draw the table to; must not exist yet")
    options.run(main)
