"""The gated recurrent unit, with the reset gate after the matmul."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from rnnjax.activations import sigmoid, tanh
from rnnjax.cells.base import AffineCell
from rnnjax.initializers import Chrono, keep_bias
from rnnjax.typing import Array, DType, Key


@dataclasses.dataclass(frozen=True)
class GRUCell(AffineCell):
    """Gated recurrent unit (Cho et al. 2014), reset after the matmul as in cuDNN::

        ρ_t = sigmoid(u_ρ + r_ρ)
        z_t = sigmoid(u_z + r_z)
        n_t = tanh(u_n + ρ_t · r_n)
        h_t = (1 − z_t) n_t + z_t h_{t−1}

    with u = x_t W + b and r = h_{t−1} U + b_r. Gates are stored in the order ρ (reset), z (update), n (candidate).
    Weights whose ``recurrent_bias`` is None are those of b_r = 0.

    Attributes:
      hidden_size: number of units H.
      forget_bias: initial bias of z, the gate that keeps the old state; above 0 the unit starts out remembering, and
        ``initializers.Chrono`` spreads the units' memories over a range of time scales (Tallec & Ollivier 2018).

    Raises:
      ValueError: a size that is not a positive integer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> cell = GRUCell(3)
      >>> params = cell.init(jax.random.key(0), input_size=2)
      >>> carry, output = cell.apply(params, cell.initialize_carry(), jnp.zeros(2))
      >>> output.tolist()
      [0.0, 0.0, 0.0]

    Source: K. Cho et al., Learning phrase representations using RNN encoder–decoder, EMNLP 2014, equations 5–8, with
    the reset gate applied to h U rather than to h.
    """

    num_gates: ClassVar[int] = 3
    has_recurrent_bias: ClassVar[bool] = True

    forget_bias: float | Chrono = 0.0

    def initial_bias(self, key: Key, dtype: DType) -> Array:
        """Returns zeros, but for ``forget_bias`` on the update gate."""
        keep = keep_bias(self.forget_bias, key, self.hidden_size, dtype)
        return jnp.zeros((self.num_gates, self.hidden_size), dtype).at[1].set(keep)

    def pointwise(
        self, carry: Array, input_preactivation: tuple[Array, ...], recurrent_preactivation: tuple[Array, ...]
    ) -> Array:
        """Returns h' from the old h and the pre-activations of (ρ, z, n)."""
        input_reset, input_update, input_candidate = input_preactivation
        recurrent_reset, recurrent_update, recurrent_candidate = recurrent_preactivation
        reset = sigmoid(input_reset + recurrent_reset)
        update = sigmoid(input_update + recurrent_update)
        candidate = tanh(input_candidate + reset * recurrent_candidate)
        return (1 - update) * candidate + update * carry
