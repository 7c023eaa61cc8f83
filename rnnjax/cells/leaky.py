"""The leaky network: a plain network with a skip connection through time."""

import dataclasses
from typing import ClassVar

from rnnjax import validation
from rnnjax.activations import make_activation
from rnnjax.cells.vanilla import VanillaCell
from rnnjax.typing import Array


@dataclasses.dataclass(frozen=True)
class LeakyCell(VanillaCell):
    """Leaky cell, the rate network dh/dt = (−h + φ(xW + hU + b))/τ in Euler steps of leak = Δt/τ::

        h_t = (1 − leak) h_{t−1} + leak · φ(x_t W + h_{t−1} U + b)

    The part that is carried on unchanged keeps ∂h_t/∂h_{t−1} near (1 − leak) I.

    Attributes:
      hidden_size: number of units H.
      activation: φ, as for ``VanillaCell``.
      leak: share of the state that is replaced at each step, in (0, 1]; 1 is the vanilla cell.

    Raises:
      ValueError: a leak outside (0, 1], a size that is not a positive integer, an unknown activation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> cell = LeakyCell(3, leak=0.1)
      >>> params = cell.init(jax.random.key(0), input_size=2)
      >>> carry, output = cell.apply(params, cell.initialize_carry(), jnp.zeros(2))
      >>> output.tolist()
      [0.0, 0.0, 0.0]

    Source: H. Jaeger et al., Optimization and applications of echo state networks with leaky-integrator neurons,
    Neural Networks 20, 2007.
    """

    num_gates: ClassVar[int] = 1

    leak: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.number_between("leak", self.leak, 0, 1, open_low=True)

    @property
    def max_slope(self) -> float:
        """Largest slope of the part that the recurrent pre-activation drives, leak · sup |φ'|."""
        return self.leak * make_activation(self.activation).max_slope

    def pointwise(
        self, carry: Array, input_preactivation: tuple[Array, ...], recurrent_preactivation: tuple[Array, ...]
    ) -> Array:
        """Returns h' = (1 − leak) h + leak · φ(u + r)."""
        drive = super().pointwise(carry, input_preactivation, recurrent_preactivation)
        return (1 - self.leak) * carry + self.leak * drive
