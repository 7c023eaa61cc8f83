"""What penalties and clipping by step cost, beside the plain gradient of the same network.

  python -m experiments.benchmarks.remedies

times value and gradient of one training batch (adding problem, B = 32, float32) for the plain loss; with truncation;
with the gradient clipped at every step; with Pascanu's penalty; with gradient flossing on four sequences; and for the
gradient split by lag. The contestants take turns in one process; the table holds medians in ms and their ratio to the
plain gradient. A line of JSON a measurement comes before it.
"""

import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from flax import nnx

import rnnjax
from experiments import options
from experiments.benchmarks.turns import Uncompiled, take_turns
from rnnjax.backpropagation import BackpropagationSettings, loss_and_gradient
from rnnjax.configuration import CELLS, RunConfig
from rnnjax.models import layer_views
from rnnjax.penalties import GradientFlossing, VanishingGradientPenalty
from rnnjax.serialization import format_table

FLAGS = flags.FLAGS
BATCH_SIZE = 32
PLAIN = "plain gradient"
SETTINGS = {
    PLAIN: BackpropagationSettings(),
    "truncated at 25": BackpropagationSettings(truncation=25),
    "clipped by step": BackpropagationSettings(max_carry_gradient=1.0),
    "Ω": BackpropagationSettings(penalty=VanishingGradientPenalty()),
    "flossing, k = 4": BackpropagationSettings(penalty=GradientFlossing(num_exponents=4)),
}


def contestants(cell: str, hidden_size: int, num_steps: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Returns programs by name, not compiled yet, and the arguments of each."""
    config = RunConfig(task="adding", length=num_steps, cell=cell, hidden_size=hidden_size)
    task = config.make_task()
    graph, params = nnx.split(config.make_network(task))
    batch = task.batch(0, 0, BATCH_SIZE)
    made: dict[str, tuple[Any, tuple[Any, ...]]] = {
        name: (jax.jit(functools.partial(loss_and_gradient, graph, task, settings)), (params, batch))
        for name, settings in SETTINGS.items()
    }
    layer = layer_views(graph, params, batch.inputs)[-1]

    def last_state(outputs: Any) -> Any:
        return (outputs[-1] ** 2).sum()

    # Not one program: which steps have a loss is found out between two.
    made["split by lag"] = (
        Uncompiled(lambda p, x: rnnjax.gradient_flow(layer.cell, p, x, last_state)),
        (layer.params, layer.inputs),
    )
    return made


def main(argv: Sequence[str]) -> None:
    """Prints JSON lines and the table."""
    with options.user_errors():
        options.no_arguments(argv)
        size = options.positive_integer("hidden_size", FLAGS.hidden_size)
        num_steps = options.positive_integer("num_steps", FLAGS.num_steps)
        repeats = options.positive_integer("repeats", FLAGS.repeats)
    rows = []
    for cell in FLAGS.cells:
        results = take_turns(contestants(cell, size, num_steps), repeats)
        setting = {"cell": cell, "H": size, "T": num_steps, "B": BATCH_SIZE, "device": jax.devices()[0].device_kind}
        for name, result in results.items():
            sys.stdout.write(json.dumps(setting | {"what": name} | result) + "\n")
        plain = results[PLAIN]["median_ms"]
        ratios = {n: f"{r['median_ms']:.1f} ({r['median_ms'] / plain:.2f}×)" for n, r in results.items()}
        rows.append({"cell": cell, "H": size, "T": num_steps} | ratios)
    sys.stdout.write("\n" + format_table(rows) + "\n")


if __name__ == "__main__":
    flags.DEFINE_multi_enum("cells", ["vanilla", "gru", "lstm"], list(CELLS), "which cells")
    flags.DEFINE_integer("hidden_size", 64, "number of units H")
    flags.DEFINE_integer("num_steps", 100, "number of steps T")
    flags.DEFINE_integer("repeats", 15, "timed calls of each contestant")
    options.run(main)
