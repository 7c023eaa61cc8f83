"""The plain network with a connection over several time steps at once."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from rnnjax import validation
from rnnjax.activations import make_activation
from rnnjax.cells.base import AffineCell
from rnnjax.typing import Array


@dataclasses.dataclass(frozen=True)
class SkipCell(AffineCell):
    """Leaky or plain cell with a skip connection through time, from h_{t−span} to h_t::

        n_t = (1 − leak) h_{t−1} + leak · φ(x_t W + h_{t−1} U + b)
        h_t = skip · h_{t−span} + (1 − skip) n_t

    The connection carries a gradient over ``span`` steps at the price of one factor: along it ∂h_t/∂h_{t−T} falls as
    skip^(T/span). The carry is the tuple (h_t, h_{t−1}, …, h_{t−span+1}), so the state size is S = span · H.

    Attributes:
      hidden_size: number of units H.
      activation: φ, as for ``VanillaCell``.
      leak: share of the state that is replaced at each step, in (0, 1]; 1, the default here, is the plain network.
      span: how many steps the connection spans, at least 2.
      skip: weight of the connection, in [0, 1]; 0 is the cell without it.

    Raises:
      ValueError: a span below 2, a skip or a leak out of range, a size that is not a positive integer, an unknown
        activation.

    Example:
      >>> import jax, jax.numpy as jnp, rnnjax
      >>> cell = SkipCell(3, span=4, skip=0.5)
      >>> params = cell.init(jax.random.key(0), input_size=2)
      >>> carry, outputs = rnnjax.unroll(cell, params, jnp.ones((9, 2)))
      >>> len(carry), bool(jnp.all(carry[3] == outputs[5]))
      (4, True)

    Source: T. Lin et al., Learning long-term dependencies in NARX recurrent neural networks, IEEE Transactions on
    Neural Networks 7, 1996; S. Zhang et al., Architectural complexity measures of recurrent neural networks, NeurIPS
    2016.
    """

    num_gates: ClassVar[int] = 1

    activation: str | Callable[[Array], Array] = "tanh"
    leak: float = 1.0
    span: int = 8
    skip: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        make_activation(self.activation)
        validation.number_between("leak", self.leak, 0, 1, open_low=True)
        validation.integer_at_least("span", self.span, 2)
        validation.number_between("skip", self.skip, 0, 1)

    @property
    def num_carries(self) -> int:
        """The last ``span`` hidden states."""
        return self.span

    @property
    def max_slope(self) -> float:
        """Largest slope of the part that the recurrent pre-activation drives."""
        return (1 - self.skip) * self.leak * make_activation(self.activation).max_slope

    def pointwise(
        self,
        carry: tuple[Array, ...],
        input_preactivation: tuple[Array, ...],
        recurrent_preactivation: tuple[Array, ...],
    ) -> tuple[Array, ...]:
        """Returns the last hidden states, the new one first."""
        drive = make_activation(self.activation).function(input_preactivation[0] + recurrent_preactivation[0])
        new = (1 - self.leak) * carry[0] + self.leak * drive
        return (self.skip * carry[-1] + (1 - self.skip) * new, *carry[:-1])
