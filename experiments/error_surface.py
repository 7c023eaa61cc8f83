"""The cliff in the loss of one recurrent unit, and gradient descent that meets it with and without clipping.

  python -m experiments.error_surface --workdir=results/error_surface

The network of Pascanu, Mikolov & Bengio (2013, section 2.3) is one unit that runs on its own from x_0,

    x_t = w σ(x_{t−1}) + b          L(w, b) = (x_T − target)²

with the logistic sigmoid σ. For w σ'(x_0) > 1 the line b = x_0 − w σ(x_0) makes x_0 an unstable fixed point: on one
side of it x_t goes up, on the other side down, and the loss has a cliff. Measured, and written to --workdir as arrays,
tables and figures: the loss and log|∂x_T/∂x_0| over (w, b), one descent without and one with clipping by norm, and the
same two from starts all over the surface. Nothing here is random. Ctrl-C keeps the arrays that are done.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from rich.console import Console
from rich.progress import track

import rnnjax
from experiments import options
from rnnjax import plots, remedy_plots, validation
from rnnjax.activations import sigmoid
from rnnjax.typing import Array
from rnnjax.workdir import Workdir

FLAGS = flags.FLAGS
CONFIG_FLAGS = {
    "weight": "recurrent weight w that the two descents start from",
    "bias": "bias b that the two descents start from",
    "learning_rate": "learning rate of both descents",
    "max_norm": "largest norm of a gradient in the clipped descent",
}
FULL = {"num_points": 801, "num_starts": 41}
WEIGHTS = (3.6, 5.6)
BIASES = (-3.0, -1.7)
_CUT_POINTS = 2001
_LIMIT = 100.0
"""Bound on the weight and bias to start from, far outside of the surface drawn."""
_MOST_UPDATES = 10_000
"""So that the paths from all starts fit into memory."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
      weight: recurrent weight w that the two descents start from.
      bias: bias b that the two descents start from.
      learning_rate: learning rate of both descents.
      max_norm: largest norm of a gradient in the clipped descent.
      num_updates: updates of each descent.
      num_points: points of the surface along each axis.
      num_starts: starts along each axis of the grid of starts.
      num_steps: time steps T.
      initial_state: x_0.
      target: what x_T should be.
    """

    weight: float = 5.0
    bias: float = -2.5
    learning_rate: float = 0.01
    max_norm: float = 3.0
    num_updates: int = 1000
    num_points: int = 301
    num_starts: int = 21
    num_steps: int = 50
    initial_state: float = 0.5
    target: float = 0.7

    def __post_init__(self) -> None:
        for name in ("weight", "bias"):
            validation.number_between(name, getattr(self, name), -_LIMIT, _LIMIT)
        for name in ("learning_rate", "max_norm"):
            validation.positive_number(name, getattr(self, name))
        validation.integer_between("num_updates", self.num_updates, 1, _MOST_UPDATES)
        validation.positive_integer("num_steps", self.num_steps)
        for name in ("num_points", "num_starts"):
            validation.integer_at_least(name, getattr(self, name), 2)

    @property
    def cell(self) -> rnnjax.StepCell:
        """The unit, whose parameters are the point (w, b)."""
        return rnnjax.StepCell(unit, example_carry=jnp.full(1, self.initial_state))

    @property
    def inputs(self) -> Array:
        """Nothing drives the unit: zeros that only count the steps, ``[T, 1]``."""
        return jnp.zeros((self.num_steps, 1))

    @property
    def max_norms(self) -> dict[str, float | None]:
        """The bound on the gradient norm in each descent."""
        return {"unclipped": None, "clipped": self.max_norm}


def unit(point: Array, carry: Array, inputs: Array) -> tuple[Array, Array]:
    """Returns x ← w σ(x) + b, twice: as the carry and as the output."""
    del inputs
    weight, bias = point
    carry = weight * sigmoid(carry) + bias
    return carry, carry


def loss(config: Config, point: Array) -> Array:
    """Returns (x_T − target)² at ``point = (w, b)``."""
    carry, _ = rnnjax.unroll(config.cell, point, config.inputs)
    return jnp.sum((carry - config.target) ** 2)


def log_jacobian(config: Config, point: Array) -> Array:
    """Returns log|∂x_T/∂x_0| in nats at ``point = (w, b)``: T times the one finite-time exponent of one unit."""
    return config.num_steps * rnnjax.lyapunov_spectrum(config.cell, point, config.inputs).exponents[0]


@functools.partial(jax.jit, static_argnames="config")
def at_points(config: Config, points: Array) -> dict[str, Array]:
    """Returns the loss and log|∂x_T/∂x_0| at points ``[n, 2]``."""
    measured = {"losses": loss, "log_jacobians": log_jacobian}
    return {name: jax.vmap(functools.partial(measure, config))(points) for name, measure in measured.items()}


def descent(config: Config, max_norm: float | None, start: Array) -> dict[str, Array]:
    """Returns points, losses and gradient norms before clipping at the start and after every update, ``[N+1, ...]``."""
    optimizer = rnnjax.clipped(optax.sgd(config.learning_rate), max_norm=max_norm)

    def update(state: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], dict[str, Array]]:
        point, optimizer_state = state
        value, gradient = jax.value_and_grad(functools.partial(loss, config))(point)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, point)
        seen = {"points": point, "losses": value, "gradient_norms": optimizer_state.norm_before}
        return (optax.apply_updates(point, updates), optimizer_state), seen

    # The last of these updates is that of the end point, and nobody takes it.
    return jax.lax.scan(update, (start, optimizer.init(start)), length=config.num_updates + 1)[1]


@functools.partial(jax.jit, static_argnames=("config", "max_norm"))
def descents(config: Config, max_norm: float | None, starts: Array) -> dict[str, Array]:
    """Returns the descents from several starts ``[n, 2]``, ``[n, N+1, ...]``."""
    return jax.vmap(functools.partial(descent, config, max_norm))(starts)


def surface(config: Config) -> dict[str, np.ndarray]:
    """Measures loss and log|∂x_T/∂x_0| on a grid, ``[biases, weights]``."""
    weights, biases = (np.linspace(*ends, config.num_points) for ends in (WEIGHTS, BIASES))
    measured = at_points(config, _grid(weights, biases))
    shaped = {name: np.asarray(values).reshape(len(biases), len(weights)) for name, values in measured.items()}
    return {"weights": weights, "biases": biases} | shaped


def cut(config: Config, weight: float) -> dict[str, np.ndarray]:
    """Measures both along the bias at one weight."""
    biases = np.linspace(*BIASES, _CUT_POINTS)
    measured = at_points(config, _grid(np.array([weight]), biases))
    return {"weight": np.asarray(weight), "biases": biases} | measured


def single_descent(config: Config, name: str) -> dict[str, Array]:
    """Measures the descent from the start that the configuration names, with log|∂x_T/∂x_0| along it."""
    history = descents(config, config.max_norms[name], jnp.array([[config.weight, config.bias]]))
    path = {name: values[0] for name, values in history.items()}
    return path | {"log_jacobians": at_points(config, path["points"])["log_jacobians"]}


def many_descents(config: Config) -> dict[str, Any]:
    """Measures what becomes of both descents from a grid of starts over the surface."""
    starts = _grid(*(np.linspace(*ends, config.num_starts) for ends in (WEIGHTS, BIASES)))
    results: dict[str, Any] = {"starts": starts}
    for name, max_norm in config.max_norms.items():
        history = descents(config, max_norm, starts)
        results[f"{name}_largest_jumps"] = _jumps(np.asarray(history["points"])).max(axis=1)
        results[f"{name}_highest_losses"] = history["losses"].max(axis=1)
        results |= {"start_losses": history["losses"][:, 0], f"{name}_end_losses": history["losses"][:, -1]}
    return results


def _grid(weights: np.ndarray, biases: np.ndarray) -> Array:
    """Returns all points (w, b), the weight running fastest, ``[n, 2]``."""
    return jnp.asarray(np.stack(np.meshgrid(weights, biases), axis=-1).reshape(-1, 2))


def _jumps(points: np.ndarray) -> np.ndarray:
    """Returns how far each update moved in the plane of (w, b)."""
    return np.linalg.norm(np.diff(points, axis=-2), axis=-1)


def descent_row(name: str, path: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the line of one descent, its updates counted from 1."""
    points, losses, norms = path["points"], path["losses"], path["gradient_norms"]
    steepest = int(norms.argmax())
    row = {"descent": name, "start": _pair(points[0]), "end": _pair(points[-1])}
    row |= {"loss at start": losses[0], "highest": losses.max(), "best": losses.min(), "at end": losses[-1]}
    row |= {"above start": int((~(losses <= losses[0])).sum())}
    row |= {"largest gradient": norms[steepest], "update": steepest + 1, "at": _pair(points[steepest])}
    row |= {"log|∂x_T/∂x_0|": path["log_jacobians"][steepest], "largest jump": _jumps(points).max()}
    return row | {"diverged": "no" if losses[-1] <= losses[0] else "yes"}


def _pair(point: np.ndarray) -> str:
    return "({:.4g}, {:.4g})".format(*point).replace("-", "−")


def surface_row(plane: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the line of the surface: where ∂x_T/∂x_0 is largest and smallest, and on which share of it above 1."""
    logs = plane["log_jacobians"]
    row, column = np.unravel_index(logs.argmax(), logs.shape)
    steepest = np.array([plane["weights"][column], plane["biases"][row]])
    line = {"points": logs.size, "largest log|∂x_T/∂x_0|": logs.max(), "at": _pair(steepest)}
    return line | {"smallest": logs.min(), "median": np.median(logs), "share > 0": (logs > 0).mean()}


def starts_row(name: str, results: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the line of all starts: medians, and the value that nine in ten starts stay below."""
    jumps, highest, last = (results[f"{name}_{key}"] for key in ("largest_jumps", "highest_losses", "end_losses"))
    first = results["start_losses"]
    row: dict[str, Any] = {"descent": name, "starts": len(first), "thrown": (~(jumps <= 1)).mean()}
    for label, values in (("largest jump", jumps), ("highest / first loss", highest / first), ("last loss", last)):
        row |= {label: np.median(values), f"{label}, 90 %": np.quantile(values, 0.9)}
    return row | {"solved": (last < 0.01).mean(), "diverged": (~(last <= first)).mean()}


CAPTION = """\
Points are (w, b); log|∂x_T/∂x_0| in nats. above start: updates at which the loss is above that at the start.
largest gradient: its norm before clipping, at which update (counted from 1) and point, with log|∂x_T/∂x_0| there.
jump: distance in (w, b) of one update. diverged: the loss at the end is not a number, or above that at the start.
starts: a grid over the surface; medians, and what 90 % of them stay below. Shares of the starts: thrown, a jump > 1;
solved, last loss < 0.01.
"""


def write_report(config: Config, workdir: Workdir) -> None:
    """Prints and writes the tables and draws the figures from the saved arrays."""
    paths = {name: workdir.load_arrays(name) for name in config.max_norms}
    plane, starts = workdir.load_arrays("surface"), workdir.load_arrays("starts")
    tables = {
        "table_surface": [surface_row(plane)],
        "table_descents": [descent_row(name, path) for name, path in paths.items()],
        "table_starts": [starts_row(name, starts) for name in paths],
    }
    for name, rows in tables.items():
        sys.stdout.write(f"\n{workdir.write_table(name, rows)}\n")
    figures = {
        "error_surface": remedy_plots.error_surface(paths, plane, workdir.load_arrays("cut")),
        "error_surface_descents": remedy_plots.descent_over_updates(paths),
    }
    for name, figure in figures.items():
        plots.save_figure(figure, workdir.path / f"{name}.png")
    sys.stdout.write(f"\n{CAPTION}Results are in {workdir.path}\n")


def run(config: Config, workdir: Workdir) -> int:
    """Measures everything and writes all results below ``workdir``; returns the exit status."""
    measure: dict[str, Callable[[], dict[str, Any]]] = {
        "surface": lambda: surface(config),
        **{name: functools.partial(single_descent, config, name) for name in config.max_norms},
        "cut": lambda: cut(config, _weight_at_cliff(workdir)),
        "starts": lambda: many_descents(config),
    }
    try:
        # Near the cliff the loss amplifies rounding as it does everything else; a descent that overflows is a result.
        with jax.enable_x64(True), np.errstate(over="ignore", invalid="ignore"):
            for name, part in track(measure.items(), "measuring", console=Console(stderr=True)):
                workdir.save_arrays(name, **part())
            write_report(config, workdir)
    except KeyboardInterrupt:
        saved = ", ".join(name for name in measure if (workdir.path / f"{name}.npz").exists())
        sys.stderr.write(f"interrupted; parts that are done: {saved or 'none'}\n")
        return options.INTERRUPTED
    return 0


def _weight_at_cliff(workdir: Workdir) -> float:
    """Returns w where the unclipped descent met its largest gradient."""
    path = workdir.load_arrays("unclipped")
    return float(path["points"][path["gradient_norms"].argmax(), 0])


def main(argv: Sequence[str]) -> int:
    """Reads the flags and runs."""
    with options.user_errors():
        options.no_arguments(argv)
        finer = FULL if FLAGS.full else {}
        config = Config(**{name: FLAGS[name].value for name in (*CONFIG_FLAGS, "num_updates")}, **finer)
        workdir = options.open_workdir(config)
    return run(config, workdir)


if __name__ == "__main__":
    for name, text in CONFIG_FLAGS.items():
        flags.DEFINE_float(name, getattr(Config, name), text)
    flags.DEFINE_integer("num_updates", Config.num_updates, "updates of each descent")
    flags.DEFINE_boolean("full", False, f"a surface of {FULL['num_points']}² points and {FULL['num_starts']}² starts")
    options.define_workdir_flag("results/error_surface")
    flags.adopt_module_key_flags(options)
    options.run(main)
