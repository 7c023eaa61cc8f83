"""Lyapunov exponents of random recurrent networks beside theory, and why singular values are something else.

  python -m experiments.lyapunov_spectra --workdir=results/lyapunov_spectra

measures, and writes to --workdir as arrays, tables and figures: the exponents of random tanh networks, plain and leaky,
over the gain, beside mean-field theory; the largest exponent of LSTM and GRU over forget bias and gain, with and
without input; and all singular values of growing products of shears and of Gaussian matrices, beside their exponents.
Ctrl-C keeps the parts that are done.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import rnnjax
from experiments import options
from rnnjax import plots, spectral_plots, validation
from rnnjax.cells import AffineCell
from rnnjax.frames import frame_growth
from rnnjax.initializers import Gaussian
from rnnjax.mean_field import RandomNetwork
from rnnjax.operators import DenseJacobians
from rnnjax.typing import Array, Carry
from rnnjax.workdir import Workdir

FLAGS = flags.FLAGS
Arrays = dict[str, Any]
Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""``track(items, description)`` goes through the items and shows how far it is."""
CONFIG_FLAGS = {
    "num_units": "units N of the networks of which all exponents are measured; 2N for the largest, N/4 in gated ones",
    "num_networks": "networks drawn at each point",
    "num_steps": "time steps averaged over, after half as many that do not count",
    "seed": "seed of all random numbers",
}
_NUM_FEATURES = 8
_GAUSSIAN_SIZE = 6
_LEAK = 0.5


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
      num_units: units N of the tanh networks of which all exponents are measured. Where it is the largest alone, tanh
        networks have twice as many, to come closer to the theory, and LSTM and GRU a quarter.
      num_networks: networks drawn at each point.
      num_steps: time steps averaged over, after half as many that do not count.
      seed: seed of all random numbers.
      gains: where the largest exponent of tanh networks is measured.
      spectrum_gains: where all their exponents are.
      gated_gains: gains of LSTM and GRU, of every gate's recurrent matrix.
      forget_biases: biases of the gate that keeps the old state.
      product_lengths: numbers of matrices multiplied.
    """

    num_units: int = 256
    num_networks: int = 4
    num_steps: int = 500
    seed: int = 0
    gains: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.35, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 4.5, 5)
    spectrum_gains: tuple[float, ...] = (0.5, 1.5, 3.0, 5.0)
    gated_gains: tuple[float, ...] = tuple(2.0 ** (power / 2) for power in range(-6, 7))
    forget_biases: tuple[float, ...] = tuple(half / 2 for half in range(-8, 9))
    product_lengths: tuple[int, ...] = tuple(2**power for power in range(13))

    def __post_init__(self) -> None:
        for name in ("num_units", "num_networks", "num_steps"):
            validation.integer_at_least(name, getattr(self, name), 2)
        validation.non_negative_integer("seed", self.seed)

    def inputs(self, drive: float) -> Array:
        """Returns white noise of standard deviation ``drive``, ``[T, D]``."""
        shape = (self.num_steps // 2 + self.num_steps, _NUM_FEATURES)
        return drive * jax.random.normal(jax.random.key(self.seed), shape)


def draw_networks(
    config: Config, kind: Callable[..., AffineCell], num_units: int, **settings: Any
) -> tuple[AffineCell, Any, Carry]:
    """Returns a cell, its weights W_ij ~ N(0, 1/N) in each gate, and random states, with networks along axis 0."""
    cell = kind(num_units, input_initializer=Gaussian(), recurrent_initializer=Gaussian(), **settings)
    key, state_key = jax.random.split(jax.random.key(config.seed))
    params = jax.vmap(lambda key: cell.init(key, _NUM_FEATURES))(jax.random.split(key, config.num_networks))
    shapes = jax.eval_shape(lambda: cell.initialize_carry((config.num_networks,)))
    return cell, params, jax.tree.map(lambda leaf: jax.random.normal(state_key, leaf.shape), shapes)


@functools.partial(jax.jit, static_argnames=("cell", "num_exponents"))
def exponents(cell: AffineCell, params: Any, carries: Carry, gain: float, inputs: Array, num_exponents: int) -> Array:
    """Returns the leading exponents ``[n, k]`` of n networks whose recurrent weights are multiplied by ``gain``."""
    settings = {"num_exponents": num_exponents, "num_transient": len(inputs) // 3}

    def single(network: tuple[Any, Carry]) -> Array:
        return rnnjax.lyapunov_spectrum(cell, network[0], inputs, network[1], **settings).exponents

    scaled = params.replace(recurrent_kernel=gain * params.recurrent_kernel)
    return jax.lax.map(single, (scaled, carries))


def tanh_networks(config: Config, track: Track, leak: float) -> Arrays:
    """Measures h ← (1 − leak) h + leak · tanh(h W) with W_ij ~ N(0, g²/N), and asks mean-field theory."""
    large = draw_networks(config, rnnjax.LeakyCell, 2 * config.num_units, leak=leak)
    small = draw_networks(config, rnnjax.LeakyCell, config.num_units, leak=leak)
    largest, spectra = [], []
    for gain in track(config.gains, f"tanh, leak {leak:g}: largest exponent"):
        measured = exponents(*large, gain, config.inputs(0.0), 1)[:, 0]
        theory = RandomNetwork(gain, leak=leak)
        largest.append({"largest_exponents": measured, "theory_largest_exponents": theory.largest_exponent})
    for gain in track(config.spectrum_gains, f"tanh, leak {leak:g}: all exponents"):
        row = {"exponents": exponents(*small, gain, config.inputs(0.0), config.num_units)}
        theory = RandomNetwork(gain, leak=leak)
        row |= {"theory_exponents": theory.lyapunov_exponents(config.num_units)}
        spectra.append(row | {"theory_positive_shares": theory.share_above(0.0)})
    return {"gains": config.gains, "spectrum_gains": config.spectrum_gains} | _stacked(largest) | _stacked(spectra)


def gated_networks(config: Config, track: Track, kind: Callable[..., AffineCell]) -> Arrays:
    """Measures the largest exponent over forget bias and gain, without input and driven by white noise."""
    count = len(config.forget_biases)
    cell, *drawn = draw_networks(config, kind, -(-config.num_units // 4))
    params, carries = jax.tree.map(lambda leaf: jnp.tile(leaf, (count,) + (1,) * (leaf.ndim - 1)), drawn)
    biases = jnp.repeat(jnp.array(config.forget_biases), config.num_networks)
    params = params.replace(bias=params.bias.at[:, 1].set(biases[:, None]))
    drives = {"autonomous_exponents": config.inputs(0.0), "driven_exponents": config.inputs(1.0)}
    rows = []
    for gain in track(config.gated_gains, f"{kind.__name__.removesuffix('Cell')}: largest exponent"):
        measured = {name: exponents(cell, params, carries, gain, inputs, 1) for name, inputs in drives.items()}
        rows.append({name: values.reshape(count, config.num_networks) for name, values in measured.items()})
    axes = {"gated_gains": config.gated_gains, "forget_biases": config.forget_biases}
    return axes | _stacked(rows) | {"critical_gains": critical_gains(kind, np.array(config.forget_biases))}


def critical_gains(kind: Callable[..., AffineCell], biases: np.ndarray) -> np.ndarray:
    """Returns the gain above which h = 0 is unstable without input, for each forget bias b.

    There the memory of an LSTM has the Jacobian f + W/4 with f = sigmoid(b), and a GRU z + (1 − z) W/2 with
    z = sigmoid(b). The eigenvalues of W fill a disk whose radius is the gain (Girko 1985).
    """
    return 4 / (1 + np.exp(biases)) if kind is rnnjax.LSTMCell else np.full(biases.shape, 2.0)


def shears(config: Config, track: Track) -> Arrays:
    """Measures powers of [[1, 1], [0, 1]]: σ = (√(T²+4) ± T)/2, while both exponents are 0."""
    matrices = jnp.broadcast_to(jnp.array([[1.0, 1.0], [0.0, 1.0]]), (max(config.product_lengths), 2, 2))
    exact = np.arcsinh(np.array(config.product_lengths) / 2)  # ln((√(T²+4) + T)/2)
    theory = {"product_exponents": np.zeros(2), "exact_log_singular_values": np.stack([exact, -exact], axis=1)}
    return products(config, track, "shears", matrices) | theory


def gaussians(config: Config, track: Track) -> Arrays:
    """Measures products of Gaussian matrices with entries of variance 1/S.

    Their exponents are λ_i = ½ [ln(2/S) + ψ((S−i+1)/2)] (Newman 1986), with the digamma function ψ.
    """
    size = _GAUSSIAN_SIZE
    matrices = jax.random.normal(jax.random.key(config.seed), (max(config.product_lengths), size, size)) / size**0.5
    exact = (jnp.log(2 / size) + jax.scipy.special.digamma((size - jnp.arange(size)) / 2)) / 2
    return products(config, track, "Gaussian matrices", matrices) | {"product_exponents": exact}


def products(config: Config, track: Track, name: str, matrices: Array) -> Arrays:
    """Measures all log σ_i of A_T … A_1, and the QR sums Σ_t log|R_ii|, at several lengths T."""
    size = matrices.shape[-1]
    _, growth = frame_growth(DenseJacobians(matrices), jnp.eye(size))
    sums = np.cumsum(np.asarray(growth, np.float64), axis=0)
    rows = []
    for length in track(config.product_lengths, f"singular values of {name}"):
        # Ended by identities, products of all lengths share one compiled program.
        within = (jnp.arange(len(matrices)) < length)[:, None, None]
        product = rnnjax.factor_product(jnp.where(within, matrices, jnp.eye(size)[None]))
        rows.append({"log_singular_values": rnnjax.log_singular_values(product), "qr_sums": sums[length - 1]})
    return {"product_lengths": config.product_lengths} | _stacked(rows)


def _stacked(rows: Sequence[Mapping[str, Any]]) -> Arrays:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


PARTS: dict[str, Callable[[Config, Track], Arrays]] = {
    "shears": shears,
    "gaussians": gaussians,
    "vanilla": functools.partial(tanh_networks, leak=1.0),
    "leaky": functools.partial(tanh_networks, leak=_LEAK),
    "lstm": functools.partial(gated_networks, kind=rnnjax.LSTMCell),
    "gru": functools.partial(gated_networks, kind=rnnjax.GRUCell),
}
LABELS = dict(zip(PARTS, ("shears", "Gaussian matrices", "tanh", f"leaky, leak {_LEAK:g}", "LSTM", "GRU"), strict=True))
CAPTION = """\
Exponents are in nats per step. λ₁: the largest; of random networks, those of 2N units, ± standard deviation over them.
positive: share of exponents > 0, N units.
theory: mean-field theory, for N → ∞. mean |Δλ_i|: distance of the mean spectrum to theory, averaged over i.
bias: largest exponent at that bias of the gate that keeps the state (forget gate of the LSTM, update gate of the GRU).
QR sum: Σ_t log|R_11|, nats. log σ₁ − QR sum: nats.
"""
FIGURES: dict[str, tuple[Callable[[Any], Any], Sequence[str]]] = {
    "lyapunov_singular_values": (spectral_plots.singular_values_against_exponents, ("shears", "gaussians")),
    "lyapunov_largest_exponent": (spectral_plots.largest_exponent_against_gain, ("vanilla", "leaky")),
    "lyapunov_spectrum": (spectral_plots.spectrum_against_theory, ("vanilla", "leaky")),
    "lyapunov_gates": (spectral_plots.largest_exponent_of_gates, ("lstm", "gru")),
}


def tanh_rows(label: str, arrays: Arrays) -> list[Arrays]:
    """Returns lines of measured beside theoretical exponents, ± the standard deviation over networks."""
    rows = []
    for index, gain in enumerate(arrays["spectrum_gains"]):
        measured, at_gain = arrays["exponents"][index], np.flatnonzero(arrays["gains"] == gain)
        largest, positive = arrays["largest_exponents"][at_gain], (measured > 0).mean(axis=1)
        row = {"network": label, "gain": gain, "λ₁": largest.mean(), "± λ₁": largest.std(ddof=1)}
        row |= {"λ₁ theory": arrays["theory_largest_exponents"][at_gain].mean()}
        row |= {"positive": positive.mean(), "± positive": positive.std(ddof=1)}
        row |= {"positive theory": arrays["theory_positive_shares"][index]}
        deviations = measured.mean(axis=0) - arrays["theory_exponents"][index]
        rows.append(row | {"mean |Δλ_i|": np.abs(deviations).mean()})
    return rows


def gate_rows(label: str, arrays: Arrays) -> list[Arrays]:
    """Returns lines of the largest exponent by forget bias, at a few gains, without and with input."""
    rows = []
    for drive, name in (("none", "autonomous_exponents"), ("white noise", "driven_exponents")):
        for gain, means in list(zip(arrays["gated_gains"], arrays[name].mean(axis=-1), strict=True))[::4]:
            by_bias = dict(zip((f"bias {bias:+g}" for bias in arrays["forget_biases"]), means, strict=True))
            rows.append({"cell": label, "input": drive, "gain": gain, **dict(list(by_bias.items())[::4])})
    return rows


def product_rows(label: str, arrays: Arrays) -> list[Arrays]:
    """Returns lines of the largest singular value beside QR sum and exponent, at a few lengths."""
    rows = []
    names = ("product_lengths", "log_singular_values", "qr_sums")
    for length, values, sums in list(zip(*(arrays[name] for name in names), strict=True))[::4]:
        row = {"products of": label, "T": length, "log σ₁ / T": values[0] / length, "QR sum / T": sums[0] / length}
        rows.append(row | {"λ₁": arrays["product_exponents"][0], "log σ₁ − QR sum": values[0] - sums[0]})
    return rows


TABLES: dict[str, tuple[Callable[[str, Arrays], list[Arrays]], Sequence[str]]] = {
    "table_products": (product_rows, ("shears", "gaussians")),
    "table_tanh": (tanh_rows, ("vanilla", "leaky")),
    "table_gates": (gate_rows, ("lstm", "gru")),
}


def write_report(workdir: Workdir, finished: Sequence[str]) -> None:
    """Prints and writes the tables and draws the figures for which all arrays are there."""
    arrays = {name: workdir.load_arrays(name) for name in finished}
    for name, (rows, parts) in TABLES.items():
        lines = [row for part in parts if part in arrays for row in rows(LABELS[part], arrays[part])]
        if lines:
            sys.stdout.write(f"\n{workdir.write_table(name, lines)}\n")
    for name, (draw, parts) in FIGURES.items():
        runs = {LABELS[part]: arrays[part] for part in parts if part in arrays}
        if runs:
            plots.save_figure(draw(runs), workdir.path / f"{name}.png")
    sys.stdout.write(f"\n{CAPTION}Results are in {workdir.path}\n")


def run(config: Config, workdir: Workdir) -> int:
    """Measures every part and writes all results below ``workdir``; returns the exit status."""
    finished: list[str] = []
    try:
        for name, measure in PARTS.items():
            workdir.save_arrays(name, **_with_progress(measure, config))
            finished.append(name)
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted; parts that are done: {', '.join(finished) or 'none'}\n")
    if finished:
        write_report(workdir, finished)
    return 0 if len(finished) == len(PARTS) else options.INTERRUPTED


def _with_progress(measure: Callable[[Config, Track], Arrays], config: Config) -> Arrays:
    """Measures, with a bar on standard error: a line for each thing measured, and the time left."""
    columns = (TextColumn("{task.description:<40}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        return measure(config, lambda items, text: bar.track(items, description=text))


def main(argv: Sequence[str]) -> int:
    """Reads the flags and runs."""
    with options.user_errors():
        options.no_arguments(argv)
        config = Config(**{name: FLAGS[name].value for name in CONFIG_FLAGS})
        workdir = options.open_workdir(config)
    return run(config, workdir)


if __name__ == "__main__":
    for name, text in CONFIG_FLAGS.items():
        flags.DEFINE_integer(name, getattr(Config, name), text)
    options.define_workdir_flag("results/lyapunov_spectra")
    flags.adopt_module_key_flags(options)
    options.run(main)
