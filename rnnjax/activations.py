"""Activation functions φ whose derivatives stay true where the unit saturates.

``1 − tanh(a)²`` is exactly 0 in float32 once |a| exceeds about 9, and a zero derivative makes log σ of a Jacobian
product −∞ where the true value is finite. The derivatives here are computed from a, not from φ(a).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rnnjax import validation
from rnnjax.typing import Array


@jax.custom_jvp
def tanh(a: Array) -> Array:
    """Hyperbolic tangent with the derivative sech²(a) = 4e^(−2|a|) / (1 + e^(−2|a|))².

    Args:
      a: pre-activation, any shape, floating.

    Returns:
      tanh(a), same shape and dtype.

    Example:
      >>> import jax
      >>> slope = jax.grad(tanh)(20.0)
      >>> print(f"{slope:.3e}")  # 1 − tanh(20)² is 0 in float32
      1.699e-17
    """
    return jnp.tanh(a)


@tanh.defjvp
def _tanh_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (a,), (tangent,) = primals, tangents
    decay = jnp.exp(-2 * jnp.abs(a))
    return tanh(a), tangent * (4 * decay / (1 + decay) ** 2)


@jax.custom_jvp
def sigmoid(a: Array) -> Array:
    """Logistic sigmoid 1 / (1 + e^(−a)) with the derivative e^(−|a|) / (1 + e^(−|a|))².

    Args:
      a: pre-activation, any shape, floating.

    Returns:
      sigmoid(a), same shape and dtype.

    Example:
      >>> import jax
      >>> print(f"{jax.grad(sigmoid)(30.0):.3e}")
      9.358e-14
    """
    return jax.nn.sigmoid(a)


@sigmoid.defjvp
def _sigmoid_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (a,), (tangent,) = primals, tangents
    decay = jnp.exp(-jnp.abs(a))
    return sigmoid(a), tangent * (decay / (1 + decay) ** 2)


@jax.custom_jvp
def elu(a: Array) -> Array:
    """Exponential linear unit, a where a > 0 and e^a − 1 elsewhere, with the derivative min(1, e^a).

    Args:
      a: pre-activation, any shape, floating.

    Returns:
      elu(a), same shape and dtype.

    Example:
      >>> import jax
      >>> print(f"{jax.grad(elu)(-20.0):.3e}")  # expm1(−20) + 1 is 0 in float32
      2.061e-09
    """
    return jax.nn.elu(a)


@elu.defjvp
def _elu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (a,), (tangent,) = primals, tangents
    return elu(a), tangent * jnp.exp(jnp.where(a > 0, jnp.zeros_like(a), a))


def identity(a: Array) -> Array:
    """The linear unit φ(a) = a."""
    return a


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation function and the largest slope it reaches.

    Attributes:
      function: φ, elementwise.
      max_slope: γ = sup |φ'|, the constant of the bound ‖J‖ ≤ γ‖W‖ (Pascanu et al. 2013, section 2.2).
    """

    function: Callable[[Array], Array]
    max_slope: float = 1.0


ACTIVATIONS = {
    "tanh": Activation(tanh),
    "relu": Activation(jax.nn.relu),
    "leaky_relu": Activation(jax.nn.leaky_relu),
    "elu": Activation(elu),
    "softplus": Activation(jax.nn.softplus),
    "sigmoid": Activation(sigmoid, max_slope=0.25),
    "identity": Activation(identity),
}


def make_activation(activation: str | Callable[[Array], Array]) -> Activation:
    """Looks up an activation by name, or takes any elementwise function.

    Args:
      activation: a key of ``ACTIVATIONS``, or a function whose slope is at most 1 in absolute value.

    Returns:
      The function and its largest slope.

    Raises:
      ValueError: an unknown name.

    Example:
      >>> make_activation("sigmoid").max_slope
      0.25
    """
    if callable(activation):
        return Activation(activation)
    return ACTIVATIONS[validation.one_of("activation", activation, ACTIVATIONS)]
