"""How exact all log singular values of long products are, beside the usual ways.

  python -m experiments.benchmarks.accuracy

compares every log σ of chains of Jacobians with references of as many digits as they need (needs the extra "test", for
mpmath; thousands of digits for the Hénon map) and prints the largest error in nats: of the graded factors in float64,
for float32 Jacobians (factorised in float64, the default) and in float32 throughout, with the largest error estimate of
each behind it; of the sum of log|R_ii| of a QR at every step; and how many singular values survive plain multiplication
followed by an SVD. The last two work in float64. Jacobians of an LSTM come as matrices and as the factors that
``jacobian_operator`` returns. It takes about two minutes on two cores.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import rnnjax
from experiments import options
from rnnjax.jacobians import jacobian_operator
from rnnjax.serialization import format_table
from rnnjax.structured import StructuredJacobians
from rnnjax.testing import chain_of_factors, exact_log_singular_values

FLAGS = flags.FLAGS
_SURVIVES = 0.01
"""Nats within which a singular value counts as right."""


def gaussian(generator: np.random.Generator, size: int, num_steps: int) -> np.ndarray:
    """Independent Gaussian matrices of variance 1/N."""
    return generator.normal(size=(num_steps, size, size)) / np.sqrt(size)


def near_identity(generator: np.random.Generator, size: int, num_steps: int) -> np.ndarray:
    """Steps that forget slowly, as an LSTM's memory does."""
    return 0.99 * np.eye(size) + 0.05 * gaussian(generator, size, num_steps)


def prescribed_condition(generator: np.random.Generator, size: int, num_steps: int) -> np.ndarray:
    """Random rotations around a spectrum of condition number 900."""
    spectrum = np.geomspace(30, 1 / 30, size)
    rotations = np.linalg.qr(generator.normal(size=(2, num_steps, size, size)))[0]
    return rotations[0] * spectrum @ rotations[1]


def saturated_network(generator: np.random.Generator, size: int, num_steps: int) -> np.ndarray:
    """Jacobians of an autonomous tanh network of gain 3, whose units saturate."""
    weights, state, steps = 3 * generator.normal(size=(size, size)) / np.sqrt(size), generator.normal(size=size), []
    for _ in range(num_steps):
        decay = np.exp(-2 * np.abs(weights @ state))
        steps.append((4 * decay / (1 + decay) ** 2)[:, None] * weights)
        state = np.tanh(weights @ state)
    return np.array(steps)


def lstm(generator: np.random.Generator, size: int, num_steps: int) -> np.ndarray:
    """Full-state Jacobians of a driven LSTM."""
    cell = rnnjax.LSTMCell(size // 2)
    params = cell.init(jax.random.key(0), 3)
    path = rnnjax.trajectory(cell, params, jnp.asarray(generator.normal(size=(num_steps, 3)), jnp.float32))
    return np.asarray(rnnjax.step_jacobians(cell, params, path), np.float64)


def saturated_lstm(generator: np.random.Generator, size: int, num_steps: int) -> np.ndarray:
    """Full-state Jacobians of an LSTM with large weights: step condition numbers from 1e5 to 1e9."""
    with jax.enable_x64(True):
        return np.asarray(saturated_lstm_factors(generator, size, num_steps).dense())


def saturated_lstm_factors(generator: np.random.Generator, size: int, num_steps: int) -> StructuredJacobians:
    """The same, as factors."""
    with jax.enable_x64(True):
        cell = rnnjax.LSTMCell(size // 2)
        shapes = jax.eval_shape(lambda: cell.init(jax.random.key(0), 3))
        params = jax.tree.map(lambda leaf: jnp.asarray(3 * generator.normal(size=leaf.shape)), shapes)
        path = rnnjax.trajectory(cell, params, jnp.asarray(generator.normal(size=(num_steps, 3))))
        return jacobian_operator(cell, params, path)


def henon(generator: np.random.Generator, size: int, num_steps: int) -> np.ndarray:
    """Jacobians of the Hénon map with a = 1.4, b = 0.3, along its attractor."""
    x, y, steps = 0.1, 0.1, []
    for _ in range(num_steps + 100):
        steps.append([[-2.8 * x, 1], [0.3, 0]])
        x, y = 1 - 1.4 * x * x + y, 0.3 * x
    return np.array(steps[100:])


def orthogonal(generator: np.random.Generator, size: int, num_steps: int) -> np.ndarray:
    """Random rotations and reflections: every log σ is 0, but for the rounding of the entries."""
    return np.linalg.qr(generator.normal(size=(num_steps, size, size)))[0]


CASES: dict[str, tuple[Callable[..., Any], int, int]] = {
    "Gaussian": (gaussian, 12, 400),
    "near identity": (near_identity, 6, 300),
    "condition 900": (prescribed_condition, 6, 1000),
    "tanh network, gain 3": (saturated_network, 12, 400),
    "LSTM, full state": (lstm, 12, 200),
    "LSTM, saturated gates": (saturated_lstm, 12, 300),
    "LSTM, saturated gates, factors": (saturated_lstm_factors, 6, 200),
    "Hénon map": (henon, 2, 10_000),
    "orthogonal": (orthogonal, 4, 100_000),
}


def qr_sums(steps: np.ndarray) -> np.ndarray:
    """Returns Σ_t log|R_ii|, the textbook way to Lyapunov exponents."""
    frame, sums = np.eye(steps.shape[-1]), np.zeros(steps.shape[-1])
    for step in steps:
        frame, triangle = np.linalg.qr(step @ frame)
        sums += np.log(np.abs(np.diagonal(triangle)))
    return -np.sort(-sums)


def product_then_svd(steps: np.ndarray) -> np.ndarray:
    """Returns the log singular values of the product as floats hold it."""
    product, scale = np.eye(steps.shape[-1]), 0.0
    for step in steps:
        product = step @ product
        norm = np.linalg.norm(product)
        product, scale = product / norm, scale + np.log(norm)
    with np.errstate(divide="ignore"):
        return scale + np.log(np.linalg.svd(product, compute_uv=False))


def measured(name: str, steps: Any) -> dict[str, Any]:
    """Returns one line of the table."""
    if isinstance(steps, StructuredJacobians):
        with jax.enable_x64(True):
            dense = np.asarray(steps.dense())
        rounded = steps.astype(np.float32)
        exact, exact_rounded = _exact_of_factors(steps), _exact_of_factors(rounded)
    else:
        dense, rounded = steps, steps.astype(np.float32)
        if name == "orthogonal":
            exact = exact_rounded = np.zeros(steps.shape[-1])
        else:
            exact, exact_rounded = (exact_log_singular_values(x.astype(np.float64)) for x in (steps, rounded))

    def error(matrices: Any, reference: np.ndarray, dtype: str) -> str:
        matrices = matrices if isinstance(matrices, StructuredJacobians) else jnp.asarray(matrices)
        spectrum = rnnjax.singular_spectrum(rnnjax.factor_product(matrices, dtype=dtype))
        largest = np.abs(np.asarray(spectrum.log_singular_values, np.float64) - reference).max()
        return f"{largest:.0e} (≤ {float(spectrum.error_estimate.max()):.0e})"

    with jax.enable_x64(True):
        float64_error = error(steps, exact, "float64")
    survivors = int((np.abs(product_then_svd(dense) - exact) < _SURVIVES).sum())
    return {
        "chain": name,
        "S": len(exact),
        "T": len(dense),
        "log σ": f"{exact[0]:.0f} … {exact[-1]:.0f}",
        "float64": float64_error,
        "float32 Jacobians": error(rounded, exact_rounded, "float64"),
        "all float32": error(rounded, exact_rounded, "float32"),
        "sum of log|R|": f"{np.abs(qr_sums(dense) - exact).max():.1f}",
        "multiply, then SVD": f"{survivors} of {len(exact)} right",
    }


def _exact_of_factors(jacobians: StructuredJacobians) -> np.ndarray:
    factors = (jacobians.carry_derivatives, jacobians.recurrent_derivatives, jacobians.recurrent_kernel)
    return exact_log_singular_values(chain_of_factors(*factors))[: jacobians.shape[-1]]


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    with options.user_errors():
        options.no_arguments(argv)
    generator = np.random.default_rng(FLAGS.seed)
    rows = [measured(name, make(generator, size, num_steps)) for name, (make, size, num_steps) in CASES.items()]
    sys.stdout.write(format_table(rows) + "\n")


if __name__ == "__main__":
    flags.DEFINE_integer("seed", 0, "seed of the chains")
    options.run(main)
