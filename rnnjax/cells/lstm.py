"""The long short-term memory."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from rnnjax.activations import sigmoid, tanh
from rnnjax.cells.base import AffineCell
from rnnjax.initializers import Chrono, keep_bias
from rnnjax.typing import Array, DType, Key


@dataclasses.dataclass(frozen=True)
class LSTMCell(AffineCell):
    """Long short-term memory with a forget gate (Gers et al. 2000)::

        i_t = sigmoid(a_i)    f_t = sigmoid(a_f)    g_t = tanh(a_g)    o_t = sigmoid(a_o)
        c_t = f_t c_{t−1} + i_t g_t
        h_t = o_t tanh(c_t)

    with a = x_t W + h_{t−1} U + b. Gates are stored in the order i, f, g, o; the carry is the tuple (h, c).

    Attributes:
      hidden_size: number of units H.
      forget_bias: initial bias of f; 1 lets gradients pass from the start (Jozefowicz et al. 2015), and
        ``initializers.Chrono`` spreads the units' memories over a range of time scales (Tallec & Ollivier 2018).

    Raises:
      ValueError: a size that is not a positive integer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> cell = LSTMCell(3)
      >>> params = cell.init(jax.random.key(0), input_size=2)
      >>> (hidden, memory), output = cell.apply(params, cell.initialize_carry(), jnp.zeros(2))
      >>> memory.tolist()
      [0.0, 0.0, 0.0]

    Source: S. Hochreiter & J. Schmidhuber, Long short-term memory, Neural Computation 9, 1997; F. A. Gers et al.,
    Learning to forget, Neural Computation 12, 2000.
    """

    num_gates: ClassVar[int] = 4

    forget_bias: float | Chrono = 1.0

    @property
    def num_carries(self) -> int:
        """Two: h and c."""
        return 2

    @property
    def carry_form(self) -> str:
        """What a carry is made of, in words for messages."""
        return "a tuple (h, c) of arrays [..., H]"

    def initial_bias(self, key: Key, dtype: DType) -> Array:
        """Returns zeros, but for ``forget_bias`` on the forget gate; the input gate of ``Chrono`` gets its negative."""
        forget = keep_bias(self.forget_bias, key, self.hidden_size, dtype)
        bias = jnp.zeros((self.num_gates, self.hidden_size), dtype).at[1].set(forget)
        return bias.at[0].set(-forget) if isinstance(self.forget_bias, Chrono) else bias

    def pointwise(
        self,
        carry: tuple[Array, Array],
        input_preactivation: tuple[Array, ...],
        recurrent_preactivation: tuple[Array, ...],
    ) -> tuple[Array, Array]:
        """Returns (h', c') from c and the pre-activations of (i, f, g, o)."""
        _, memory = carry
        input_gate, forget_gate, candidate, output_gate = (
            u + r for u, r in zip(input_preactivation, recurrent_preactivation, strict=True)
        )
        memory = sigmoid(forget_gate) * memory + sigmoid(input_gate) * tanh(candidate)
        return sigmoid(output_gate) * tanh(memory), memory
