"""What singular values of ∂s_T/∂s_0 cost, beside the usual way.

  python -m experiments.benchmarks.spectra

times one program each for: the usual way, ``jax.jacrev`` through a ``jax.lax.scan`` of the cell and an SVD, which over-
and underflows; the same through ``rnnjax.unroll``; all singular values; the leading quarter; the spectral norm at every
lag; all singular values of 16 sequences in one call, and in 16 calls. The contestants take turns in one process; the
table holds medians in ms, and their ratio to the usual way; for the one call, to the mean of the 16 calls that follow
it, the median over the turns, since sequences differ in how often their columns are factored. A line of JSON a
measurement comes before it, with the first call (compilation included) and the memory a program needs beyond its
arguments and results. Float32 states, factorised in float64 (the default) except for the leading quarter and the norms.
"""

import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.flatten_util import ravel_pytree

import rnnjax
from experiments import options
from experiments.benchmarks.turns import Uncompiled, take_turns
from rnnjax.jacobians import jacobian_operator
from rnnjax.serialization import format_table

FLAGS = flags.FLAGS
CELLS = {"LSTM": rnnjax.LSTMCell, "GRU": rnnjax.GRUCell}
_NUM_FEATURES = 8
_NUM_SEQUENCES = 16
_USUAL = "jacrev of scan"
_TOGETHER = f"all of {_NUM_SEQUENCES}"
_ONE_BY_ONE = f"{_NUM_SEQUENCES} one by one"


def usual_way(cell: rnnjax.Cell, params: Any, inputs: Any) -> Any:
    """Log singular values of ``jax.jacrev`` through a scan of the cell."""

    def last_carry(carry: Any) -> Any:
        return jax.lax.scan(lambda carry, x: (cell.apply(params, carry, x)[0], None), carry, inputs)[0]

    return _by_jacrev(cell, last_carry)


def through_unroll(cell: rnnjax.Cell, params: Any, inputs: Any) -> Any:
    """The same through ``rnnjax.unroll``, whose derivative is faster."""
    return _by_jacrev(cell, lambda carry: rnnjax.unroll(cell, params, inputs, carry)[0])


def _by_jacrev(cell: rnnjax.Cell, last_carry: Callable[[Any], Any]) -> Any:
    state, unravel = ravel_pytree(cell.initialize_carry())
    product = jax.jacrev(lambda start: ravel_pytree(last_carry(unravel(start)))[0])(state)
    return jnp.log(jnp.linalg.svd(product, compute_uv=False))


def all_values(cell: rnnjax.Cell, params: Any, inputs: Any) -> Any:
    """All log singular values with their evidence."""
    jacobians = jacobian_operator(cell, params, rnnjax.trajectory(cell, params, inputs))
    return rnnjax.singular_spectrum(rnnjax.factor_product(jacobians))


def leading_quarter(cell: rnnjax.Cell, params: Any, inputs: Any) -> Any:
    """The leading quarter of them, without matrices."""
    size = ravel_pytree(cell.initialize_carry())[0].size
    path = rnnjax.trajectory(cell, params, inputs)
    return rnnjax.leading_log_singular_values(cell, params, path, size // 4)


def norms(cell: rnnjax.Cell, params: Any, inputs: Any) -> Any:
    """The spectral norm at every lag."""
    path = rnnjax.trajectory(cell, params, inputs)
    return rnnjax.spectral_norm_profile(jacobian_operator(cell, params, path))


def contestants(cell: rnnjax.Cell, num_steps: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Returns programs by name, not compiled yet, and the arguments of each."""
    params = cell.init(jax.random.key(0), _NUM_FEATURES)
    many = jax.random.normal(jax.random.key(1), (num_steps, _NUM_SEQUENCES, _NUM_FEATURES))
    programs = {
        _USUAL: usual_way,
        "jacrev of unroll": through_unroll,
        "all": all_values,
        "leading quarter": leading_quarter,
        "norm at every lag": norms,
    }
    bound = {name: (program, many[:, 0]) for name, program in programs.items()}
    bound[_TOGETHER] = (all_values, many)
    jitted = {name: jax.jit(functools.partial(program, cell)) for name, (program, _) in bound.items()}
    each = [many[:, index] for index in range(_NUM_SEQUENCES)]
    # Each is waited for, as in the column of one: JAX would begin the next while the last is still computed.
    one_by_one = Uncompiled(lambda: [jax.block_until_ready(jitted["all"](params, inputs)) for inputs in each])
    return {name: (jitted[name], (params, inputs)) for name, (_, inputs) in bound.items()} | {
        _ONE_BY_ONE: (one_by_one, ())
    }


def measured(cell: rnnjax.Cell, num_steps: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Returns first call, median and memory of every contestant, which take turns."""
    return take_turns(contestants(cell, num_steps), repeats)


def times_one(results: dict[str, dict[str, Any]]) -> float:
    """Returns how many times the mean time of one sequence all take together, the median over turns.

    What slows the machine down for a while slows both of a turn down.
    """
    pairs = zip(results[_TOGETHER]["times_ms"], results[_ONE_BY_ONE]["times_ms"], strict=True)
    return _NUM_SEQUENCES * statistics.median(together / one_by_one for together, one_by_one in pairs)


def main(argv: Sequence[str]) -> None:
    """Prints JSON lines and the table."""
    with options.user_errors():
        options.no_arguments(argv)
        sizes = [options.positive_integer("sizes", size) for size in FLAGS.sizes]
        num_steps = options.positive_integer("num_steps", FLAGS.num_steps)
        repeats = options.positive_integer("repeats", FLAGS.repeats)
    rows = []
    for label, size in itertools.product(FLAGS.cells, sizes):
        results = measured(CELLS[label](size), num_steps, repeats)
        setting = {"cell": label, "H": size, "T": num_steps, "device": jax.devices()[0].device_kind}
        for name, result in results.items():
            sys.stdout.write(json.dumps(setting | {"what": name} | result) + "\n")
        usual = results[_USUAL]["median_ms"]
        ratios = {n: f"{r['median_ms']:.1f} ({r['median_ms'] / usual:.2f}×)" for n, r in results.items()}
        ratios[_TOGETHER] = f"{results[_TOGETHER]['median_ms']:.0f} ({times_one(results):.1f}× one)"
        ratios[_ONE_BY_ONE] = f"{results[_ONE_BY_ONE]['median_ms']:.0f}"
        rows.append({"cell": label, "H": size, "T": num_steps} | ratios)
    sys.stdout.write("\n" + format_table(rows) + "\n")


if __name__ == "__main__":
    flags.DEFINE_multi_enum("cells", list(CELLS), list(CELLS), "which cells")
    flags.DEFINE_list("sizes", ["32", "64", "128"], "hidden sizes H")
    flags.DEFINE_integer("num_steps", 200, "number of steps T")
    flags.DEFINE_integer("repeats", 7, "timed calls of each contestant")
    options.run(main)
