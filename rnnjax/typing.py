"""Names for the arrays and pytrees that the whole library passes around.

Letters used in shapes everywhere: T time, B batch (any leading batch axes are written ``...``), D input features,
H hidden units, G gates, S state size of one sequence (H; 2H for the LSTM), k number of exponents or singular values.
"""

from collections.abc import Callable
from typing import Any

import jax

Array = jax.Array
ArrayLike = jax.typing.ArrayLike
Key = jax.Array
"""A key of ``jax.random.key``."""
DType = Any
"""Anything ``jnp.dtype`` accepts."""
Carry = Any
"""A pytree whose leaves are ``[..., H]``; its first leaf is the hidden state h."""
Params = Any
"""A pytree of arrays."""
Initializer = Callable[[Key, tuple[int, ...], DType], Array]
"""``initializer(key, shape, dtype)``, the convention of ``jax.nn.initializers``."""
StepFunction = Callable[[Params, Carry, Any], tuple[Carry, Any]]
"""``step(params, carry, inputs) -> (carry, output)``."""
