"""The recurrent layers that ours are timed beside, each as its own documentation has them.

A layer is a pure function of weights and time-major inputs that returns the hidden states, and its weights. PyTorch's
are programs of another kind: value and gradient in one call. A package that is not installed is left out.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
from flax import nnx

import rnnjax
from experiments.benchmarks.turns import Uncompiled

Layer = tuple[Callable[[Any, Any], Any], Any]
OURS = "rnnjax"
KINDS = ("vanilla", "gru", "lstm")
LINEN_CELLS = {
    "vanilla": flax.linen.SimpleCell,
    "gru": flax.linen.GRUCell,
    "lstm": flax.linen.OptimizedLSTMCell,
}
_OURS = {"vanilla": rnnjax.VanillaCell, "gru": rnnjax.GRUCell, "lstm": rnnjax.LSTMCell}


def ours(kind: str, inputs: Any, hidden_size: int, **options: Any) -> Layer:
    """rnnjax, with options of ``rnnjax.unroll``."""
    cell = _OURS[kind](hidden_size)
    params = cell.init(jax.random.key(0), inputs.shape[-1])

    def run(params: Any, inputs: Any) -> Any:
        return rnnjax.unroll(cell, params, inputs, **options)[1]

    return run, params


def linen(kind: str, inputs: Any, hidden_size: int) -> Layer:
    """Flax Linen; for the LSTM its faster cell."""
    layer = flax.linen.RNN(LINEN_CELLS[kind](hidden_size), time_major=True)
    return layer.apply, layer.init(jax.random.key(0), inputs)


def flax_nnx(kind: str, inputs: Any, hidden_size: int) -> Layer:
    """Flax NNX; for the LSTM its faster cell."""
    cells = {"vanilla": nnx.SimpleCell, "gru": nnx.GRUCell, "lstm": nnx.OptimizedLSTMCell}
    layer = nnx.RNN(cells[kind](inputs.shape[-1], hidden_size, rngs=nnx.Rngs(0)), time_major=True, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    return lambda params, inputs: nnx.merge(graph, params, rest)(inputs, rngs=nnx.Rngs(0)), params


def haiku(kind: str, inputs: Any, hidden_size: int) -> Layer:
    """Haiku; its vanilla network is one of ReLUs, and its GRU resets before the matmul."""
    import haiku

    cells = {"vanilla": haiku.VanillaRNN, "gru": haiku.GRU, "lstm": haiku.LSTM}

    def run(inputs: Any) -> Any:
        cell = cells[kind](hidden_size)
        return haiku.dynamic_unroll(cell, inputs, cell.initial_state(inputs.shape[1]))[0]

    layer = haiku.without_apply_rng(haiku.transform(run))
    return layer.apply, layer.init(jax.random.key(0), inputs)


def equinox(kind: str, inputs: Any, hidden_size: int) -> Layer | None:
    """Equinox, which has no vanilla cell."""
    import equinox

    cells = {"gru": equinox.nn.GRUCell, "lstm": equinox.nn.LSTMCell}
    if kind not in cells:
        return None
    params, static = equinox.partition(
        cells[kind](inputs.shape[-1], hidden_size, key=jax.random.key(0)), equinox.is_array
    )
    zeros = jnp.zeros((inputs.shape[1], hidden_size))

    def run(params: Any, inputs: Any) -> Any:
        cell = jax.vmap(equinox.combine(params, static))

        def step(carry: Any, x: Any) -> tuple[Any, Any]:
            carry = cell(x, carry)
            return carry, jax.tree.leaves(carry)[0]

        return jax.lax.scan(step, zeros if kind == "gru" else (zeros, zeros), inputs)[1]

    return run, params


def torch(kind: str, inputs: Any, hidden_size: int) -> Uncompiled:
    """PyTorch, value and gradient."""
    import torch

    layers = {"vanilla": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}
    layer = layers[kind](inputs.shape[-1], hidden_size)
    values = torch.tensor(jax.device_get(inputs))

    def run() -> float:
        layer.zero_grad(set_to_none=True)
        loss = (layer(values)[0] ** 2).mean()
        loss.backward()
        return loss.item()

    return Uncompiled(run)


def matmul_floor(kind: str, inputs: Any, hidden_size: int) -> Layer:
    """The products of matrices that value and gradient need, and nothing else; its gradient is not one of anything."""
    params = ours(kind, inputs, hidden_size)[1]
    start = jnp.zeros((inputs.shape[1], hidden_size))

    def run(params: Any, inputs: Any) -> Any:
        into = params.input_kernel.reshape(inputs.shape[-1], -1)
        across = params.recurrent_kernel.reshape(hidden_size, -1)
        projected = inputs.reshape(-1, inputs.shape[-1]) @ into
        projected = projected.reshape(*inputs.shape[:2], -1)

        def forward(state: Any, x: Any) -> tuple[Any, Any]:
            return (state @ across + x)[..., :hidden_size], state

        def backward(state: Any, x: Any) -> tuple[Any, None]:
            return x @ across.T + state, None

        _, states = jax.lax.scan(forward, start, projected)
        state, _ = jax.lax.scan(backward, start, projected, reverse=True)
        flat = projected.reshape(-1, projected.shape[-1])
        return state, states.reshape(-1, hidden_size).T @ flat, inputs.reshape(-1, inputs.shape[-1]).T @ flat

    return run, params


JAX_PEERS = {"Flax Linen": linen, "Flax NNX": flax_nnx, "Haiku": haiku, "Equinox": equinox}
_NEEDS = {"Haiku": "haiku", "Equinox": "equinox", "PyTorch": "torch"}


def is_installed(name: str) -> bool:
    """Returns whether the package of a contestant is here."""
    return name not in _NEEDS or importlib.util.find_spec(_NEEDS[name]) is not None
