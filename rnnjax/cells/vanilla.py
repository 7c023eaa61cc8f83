"""The plain recurrent network."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from rnnjax.activations import make_activation
from rnnjax.cells.base import AffineCell
from rnnjax.typing import Array


@dataclasses.dataclass(frozen=True)
class VanillaCell(AffineCell):
    """Plain recurrent cell (Elman 1990)::

        h_t = φ(x_t W + h_{t−1} U + b)

    Its step Jacobian is J_t = diag(φ'(a_t)) Uᵀ.

    Attributes:
      hidden_size: number of units H.
      activation: φ: ``tanh``, ``relu``, ``leaky_relu``, ``elu``, ``softplus``, ``sigmoid``, ``identity``, or any
        elementwise function, whose slope is taken to be at most 1 in absolute value.

    Raises:
      ValueError: a size that is not a positive integer, an unknown activation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> cell = VanillaCell(3, activation="relu")
      >>> params = cell.init(jax.random.key(0), input_size=2)
      >>> carry, output = cell.apply(params, cell.initialize_carry(), jnp.ones(2))
      >>> output.shape
      (3,)

    Source: J. L. Elman, Finding structure in time, Cognitive Science 14, 1990.
    """

    num_gates: ClassVar[int] = 1

    activation: str | Callable[[Array], Array] = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        make_activation(self.activation)

    @property
    def max_slope(self) -> float:
        """γ = sup |φ'|; 1 for an activation that is a function of the user's own."""
        return make_activation(self.activation).max_slope

    def pointwise(
        self, carry: Array, input_preactivation: tuple[Array, ...], recurrent_preactivation: tuple[Array, ...]
    ) -> Array:
        """Returns h' = φ(u + r)."""
        return make_activation(self.activation).function(input_preactivation[0] + recurrent_preactivation[0])
