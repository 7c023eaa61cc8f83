"""Initial weights, drawn for each gate on its own.

An orthogonal draw of the fused ``[H, G·H]`` kernel makes no gate orthogonal (its gates have RMS singular value 1/√G),
so ``per_gate`` gives every gate a draw of its own. Initialisers are frozen dataclasses: equal settings compare equal,
and a cell that holds them can be a static argument of ``jax.jit``.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rnnjax import validation
from rnnjax.typing import Array, DType, Initializer, Key


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """An initialiser multiplied by ``gain``."""

    gain: float = 1.0

    def __post_init__(self) -> None:
        validation.positive_number("gain", self.gain)

    def __call__(self, key: Key, shape: tuple[int, ...], dtype: DType = jnp.float32) -> Array:
        """Draws a ``[fan_in, fan_out]`` matrix."""
        wide = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32  # QR has no bfloat16
        return (self.gain * self._draw(key, shape, wide)).astype(dtype)

    def _draw(self, key: Key, shape: tuple[int, ...], dtype: DType) -> Array:
        raise TypeError("use one of the subclasses")


class Orthogonal(_Scaled):
    """Haar-distributed orthogonal matrix times the gain: every singular value is the gain.

    Args:
      gain: positive factor on the drawn matrix.

    Raises:
      ValueError: a gain that is not a positive finite number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> weights = Orthogonal(0.5)(jax.random.key(0), (4, 4))
      >>> print(jnp.linalg.svd(weights, compute_uv=False).round(3))
      [0.5 0.5 0.5 0.5]

    Source: A. M. Saxe et al., Exact solutions to the nonlinear dynamics of learning in deep linear neural networks,
    ICLR 2014.
    """

    def _draw(self, key: Key, shape: tuple[int, ...], dtype: DType) -> Array:
        return jax.nn.initializers.orthogonal()(key, shape, dtype)


class Identity(_Scaled):
    """Identity matrix times the gain, for recurrent ReLU networks; the key is not used.

    Args:
      gain: positive factor on the drawn matrix.

    Raises:
      ValueError: a gain that is not a positive finite number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> print(Identity(2.0)(jax.random.key(0), (2, 2)))
      [[2. 0.]
       [0. 2.]]

    Source: Q. V. Le et al., A simple way to initialize recurrent networks of rectified linear units, 2015.
    """

    def _draw(self, key: Key, shape: tuple[int, ...], dtype: DType) -> Array:
        return jnp.eye(shape[0], shape[1], dtype=dtype)


class Glorot(_Scaled):
    """Uniform with mean 0 and variance gain² · 2/(fan_in + fan_out).

    Args:
      gain: positive factor on the drawn matrix.

    Raises:
      ValueError: a gain that is not a positive finite number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> weights = Glorot()(jax.random.key(0), (300, 100))
      >>> print(f"{weights.var():.4f}")  # 2/400
      0.0050

    Source: X. Glorot & Y. Bengio, Understanding the difficulty of training deep feedforward neural networks,
    AISTATS 2010, equation 16.
    """

    def _draw(self, key: Key, shape: tuple[int, ...], dtype: DType) -> Array:
        return jax.nn.initializers.glorot_uniform()(key, shape, dtype)


class He(_Scaled):
    """Gaussian with mean 0 and variance gain² · 2/fan_in, for ReLU layers.

    Args:
      gain: positive factor on the drawn matrix.

    Raises:
      ValueError: a gain that is not a positive finite number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> weights = He()(jax.random.key(0), (400, 400))
      >>> print(f"{weights.var():.4f}")  # 2/400
      0.0050

    Source: K. He et al., Delving deep into rectifiers, ICCV 2015, equation 10.
    """

    def _draw(self, key: Key, shape: tuple[int, ...], dtype: DType) -> Array:
        return jnp.sqrt(2 / shape[0]).astype(dtype) * jax.random.normal(key, shape, dtype)


class Gaussian(_Scaled):
    """Gaussian with mean 0 and variance gain²/fan_in, the ensemble of mean-field theory.

    Args:
      gain: positive factor on the drawn matrix.

    Raises:
      ValueError: a gain that is not a positive finite number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> weights = Gaussian(2.0)(jax.random.key(0), (400, 400))
      >>> print(f"{weights.var():.3f}")  # 4/400
      0.010

    Source: H. Sompolinsky, A. Crisanti & H. J. Sommers, Chaos in random neural networks, Physical Review Letters 61,
    1988.
    """

    def _draw(self, key: Key, shape: tuple[int, ...], dtype: DType) -> Array:
        return jnp.sqrt(1 / shape[0]).astype(dtype) * jax.random.normal(key, shape, dtype)


@dataclasses.dataclass(frozen=True)
class Chrono:
    """Initial bias of the gate that keeps the state, for memories of 2 to ``longest`` steps, one for each unit:

        b = ln u,    u ~ Uniform(1, longest − 1)

    A gate that stands at sigmoid(b) forgets within about 1 + e^b = 1 + u steps. The input gate of an LSTM starts at −b.

    Args:
      longest: the longest memory to start with, in steps, above 2.

    Raises:
      ValueError: a ``longest`` that is not a finite number above 2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> bias = Chrono(100)(jax.random.key(0), (1000,))
      >>> bool(bias.min() >= 0), bool(bias.max() <= jnp.log(99)), f"{jnp.exp(bias).mean():.0f}"
      (True, True, '50')

    Source: C. Tallec & Y. Ollivier, Can recurrent neural networks warp time?, ICLR 2018, equation 16.
    """

    longest: float

    def __post_init__(self) -> None:
        if not validation.positive_number("longest", self.longest) > 2:
            raise ValueError(f"longest must be a number above 2, got {self.longest!r}")

    def __call__(self, key: Key, shape: tuple[int, ...], dtype: DType = jnp.float32) -> Array:
        """Draws biases of that shape."""
        wide = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32
        return jnp.log(jax.random.uniform(key, shape, wide, 1.0, self.longest - 1)).astype(dtype)


def keep_bias(bias: float | Chrono, key: Key, hidden_size: int, dtype: DType) -> Array:
    """Returns the initial bias ``[H]`` of a gate that keeps the state: one number for all units, or drawn for each.

    Args:
      bias: the number, or ``Chrono``.
      key: random key.
      hidden_size: H.
      dtype: floating dtype of the result.

    Returns:
      ``[H]``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> print(keep_bias(1.0, jax.random.key(0), 3, jnp.float32))
      [1. 1. 1.]
    """
    return bias(key, (hidden_size,), dtype) if isinstance(bias, Chrono) else jnp.full((hidden_size,), bias, dtype)


INITIALIZERS: dict[str, Callable[[float], Initializer]] = {
    "orthogonal": Orthogonal,
    "identity": Identity,
    "glorot": Glorot,
    "he": He,
    "gaussian": Gaussian,
}


def make_initializer(name: str, gain: float = 1.0) -> Initializer:
    """Looks up an initialiser by name.

    Args:
      name: a key of ``INITIALIZERS``.
      gain: positive factor on the drawn matrix.

    Returns:
      ``initializer(key, shape, dtype)`` for one ``[fan_in, fan_out]`` matrix.

    Raises:
      ValueError: an unknown name or a gain that is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> weights = make_initializer("orthogonal", gain=0.5)(jax.random.key(0), (4, 4), jnp.float32)
      >>> bool(jnp.allclose(weights @ weights.T, 0.25 * jnp.eye(4), atol=1e-6))
      True
    """
    return INITIALIZERS[validation.one_of("initializer", name, INITIALIZERS)](gain)


def per_gate(initializer: Initializer, key: Key, fan_in: int, num_gates: int, hidden_size: int, dtype: DType) -> Array:
    """Draws one ``[fan_in, H]`` matrix per gate, each from its own key.

    Args:
      initializer: ``initializer(key, shape, dtype)`` for one matrix.
      key: random key.
      fan_in: rows of each matrix: D for an input kernel, H for a recurrent kernel.
      num_gates: G.
      hidden_size: H.
      dtype: floating dtype of the result.

    Returns:
      ``[fan_in, G, H]``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> kernel = per_gate(Orthogonal(), jax.random.key(0), 4, 3, 4, jnp.float32)
      >>> kernel.shape
      (4, 3, 4)
      >>> bool(jnp.allclose(kernel[:, 1] @ kernel[:, 1].T, jnp.eye(4), atol=1e-6))
      True
    """
    keys = jax.random.split(key, num_gates)
    return jnp.stack([initializer(k, (fan_in, hidden_size), dtype) for k in keys], axis=1)
