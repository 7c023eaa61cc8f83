"""What every recurrent cell offers, and the affine cell from which everything else follows."""

import abc
import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from rnnjax import validation
from rnnjax.initializers import Glorot, Orthogonal, per_gate
from rnnjax.settings import check_settings
from rnnjax.typing import Array, Carry, DType, Initializer, Key, Params


@flax.struct.dataclass
class CellParams:
    """Weights of an affine cell.

    Attributes:
      input_kernel: W, ``[D, G, H]``.
      recurrent_kernel: U, ``[H, G, H]``.
      bias: b, ``[G, H]``, added to the input pre-activation.
      recurrent_bias: b_r, ``[G, H]``, added to the recurrent pre-activation, in cells where the two biases differ in
        effect (the GRU); None in all others, and allowed everywhere: it stands for zeros.
    """

    input_kernel: Array
    recurrent_kernel: Array
    bias: Array
    recurrent_bias: Array | None = None


class Cell(abc.ABC):
    """One step of a recurrence, ``(carry, inputs) -> (carry, output)``, written for time to be added by ``unroll``.

    A step has two parts, so that work that does not depend on the carry is done for all steps at once before the scan:
    ``prepare_inputs`` takes any number of leading axes, ``step`` is the sequential rest.
    """

    @abc.abstractmethod
    def initialize_carry(self, batch_shape: tuple[int, ...] = (), dtype: DType = jnp.float32) -> Carry:
        """Returns the carry before the first step, leaves ``[*batch_shape, ...]``."""

    @property
    def state_size(self) -> int:
        """S, how many numbers the carry of one sequence holds."""
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(self.initialize_carry)))

    @abc.abstractmethod
    def check(self, params: Params, inputs: Any, carry: Carry | None = None) -> None:
        """Raises ValueError if shapes or dtypes of ``params``, time-major ``inputs`` and ``carry`` do not fit."""

    @abc.abstractmethod
    def check_step(self, params: Params, carry: Carry, inputs: Any) -> None:
        """Raises ValueError if what ``apply`` is given, without a time axis, does not fit."""

    @abc.abstractmethod
    def batch_shape(self, inputs: Any) -> tuple[int, ...]:
        """Returns the batch axes of time-major ``inputs`` ``[T, ..., D]``."""

    @abc.abstractmethod
    def carry_dtype(self, params: Params) -> DType:
        """Returns the dtype of the carry that goes with ``params``."""

    @abc.abstractmethod
    def prepare_inputs(self, params: Params, inputs: Any) -> Any:
        """Does the part of a step that needs no carry, for any leading axes."""

    @abc.abstractmethod
    def step(self, params: Params, carry: Carry, prepared: Any) -> tuple[Carry, Any]:
        """Does the sequential part of one step."""

    def apply(self, params: Params, carry: Carry, inputs: Any) -> tuple[Carry, Any]:
        """Advances the carry by one step, in ``lax.scan``'s order.

        Args:
          params: the cell's weights.
          carry: leaves ``[..., H]``.
          inputs: ``[..., D]``, without a time axis.

        Returns:
          The next carry and the output (the hidden state ``[..., H]`` for affine cells).

        Raises:
          ValueError: weights, carry or inputs whose shapes do not fit the cell or each other.
        """
        self.check_step(params, carry, inputs)
        return self.step(params, carry, self.prepare_inputs(params, inputs))


@dataclasses.dataclass(frozen=True)
class AffineCell(Cell):
    """A cell that is an affine map of (h, x) followed by a pointwise function of each unit.

    With the input pre-activation u_t = x_t W + b ``[..., G, H]`` and the recurrent one r_t = h_{t−1} U + b_r::

        s_t = pointwise(s_{t−1}, u_t, r_t)

    where unit j of the new carry depends on unit j of its arguments only. The carry's first leaf is the hidden state h:
    it is the output, and what U multiplies. A subclass sets ``num_gates``, and ``num_carries`` unless it is 1, and
    writes ``pointwise``; Jacobians, fast training and monitoring follow. The other parts of a step are not for it to
    replace (a TypeError says so): what follows would not know. Its settings are fields of a frozen dataclass, which can
    be hashed and are compared: equal cells share one compiled program. Arrays belong in the weights.

    Attributes:
      hidden_size: number of units H.
      input_initializer: initialiser of each gate's ``[D, H]`` input matrix.
      recurrent_initializer: initialiser of each gate's ``[H, H]`` recurrent matrix.
    """

    num_gates: ClassVar[int]
    """G, how many pre-activations a unit has."""
    has_recurrent_bias: ClassVar[bool] = False

    hidden_size: int
    _: dataclasses.KW_ONLY
    input_initializer: Initializer = Glorot()
    recurrent_initializer: Initializer = Orthogonal()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("apply", "hidden", "prepare_inputs", "recurrent_preactivation", "step"):
            if name in vars(cls):
                raise TypeError(
                    f"{cls.__name__} must not define {name}: all that follows from pointwise would not know of it; "
                    "a StepCell may be any function"
                )
        jax.tree_util.register_static(cls)

    def __post_init__(self) -> None:
        validation.positive_integer("hidden_size", self.hidden_size)

    @abc.abstractmethod
    def pointwise(
        self, carry: Carry, input_preactivation: tuple[Array, ...], recurrent_preactivation: tuple[Array, ...]
    ) -> Carry:
        """Returns the next carry from the carry and the G input and recurrent pre-activations, each ``[..., H]``."""

    @property
    def num_carries(self) -> int:
        """How many numbers a unit carries from step to step: 1, or 2 for the LSTM."""
        return 1

    @property
    def max_slope(self) -> float:
        """Scale of h's response to its recurrent pre-activation, |∂h'/∂r|, against which ``monitor`` judges saturation.

        A scale, not always a bound: a unit of an LSTM can respond by more than 1 in the memory it carries.
        """
        return 1.0

    def initial_bias(self, key: Key, dtype: DType) -> Array:
        """Returns b at initialisation, ``[G, H]``: zero, but for gates that start open."""
        return jnp.zeros((self.num_gates, self.hidden_size), dtype)

    def init(self, key: Key, input_size: int, dtype: DType = jnp.float32) -> CellParams:
        """Draws initial weights, each gate on its own.

        Args:
          key: random key.
          input_size: number of input features D.
          dtype: float32, float64 or bfloat16.

        Returns:
          The weights.

        Raises:
          ValueError: ``input_size`` is not a positive integer, ``dtype`` is not floating, or is float64 while JAX has
            it switched off.

        Example:
          >>> import jax, rnnjax
          >>> params = rnnjax.GRUCell(4).init(jax.random.key(0), input_size=2)
          >>> params.input_kernel.shape, params.recurrent_kernel.shape, params.bias.shape
          ((2, 3, 4), (4, 3, 4), (3, 4))
        """
        check_settings(self)
        validation.positive_integer("input_size", input_size)
        validation.floating_dtype("dtype", dtype)
        input_key, recurrent_key = jax.random.split(key)
        bias_key = jax.random.fold_in(key, 2)
        gates, hidden = self.num_gates, self.hidden_size
        return CellParams(
            input_kernel=per_gate(self.input_initializer, input_key, input_size, gates, hidden, dtype),
            recurrent_kernel=per_gate(self.recurrent_initializer, recurrent_key, hidden, gates, hidden, dtype),
            bias=self.initial_bias(bias_key, dtype),
            recurrent_bias=jnp.zeros((gates, hidden), dtype) if self.has_recurrent_bias else None,
        )

    def initialize_carry(self, batch_shape: tuple[int, ...] = (), dtype: DType = jnp.float32) -> Carry:
        """Returns a carry of zeros, one array or a tuple of arrays ``[*batch_shape, H]``."""
        zeros = jnp.zeros((*batch_shape, self.hidden_size), dtype)
        return zeros if self.num_carries == 1 else (zeros,) * self.num_carries

    @property
    def carry_form(self) -> str:
        """What a carry is made of, in words for messages."""
        return "one array [..., H]" if self.num_carries == 1 else f"a tuple of {self.num_carries} arrays [..., H]"

    def hidden(self, carry: Carry) -> Array:
        """Returns the hidden state h ``[..., H]``, the carry's first leaf."""
        return jax.tree.leaves(carry)[0]

    def batch_shape(self, inputs: Array) -> tuple[int, ...]:
        """Returns the batch axes of time-major ``inputs`` ``[T, ..., D]``."""
        return inputs.shape[1:-1]

    def carry_dtype(self, params: CellParams) -> DType:
        """Returns the dtype of the weights, in which the carry is kept too."""
        return params.recurrent_kernel.dtype

    def prepare_inputs(self, params: CellParams, inputs: Array) -> Array:
        """Returns the input pre-activation u = x W + b, ``[..., G, H]``, in one matmul for all leading axes."""
        return _affine(inputs, params.input_kernel, params.bias, params.bias.dtype)

    def recurrent_preactivation(self, params: CellParams, hidden: Array) -> Array:
        """Returns r = h U + b_r, ``[..., G, H]``."""
        return _affine(hidden, params.recurrent_kernel, params.recurrent_bias, params.bias.dtype)

    def step(self, params: CellParams, carry: Carry, prepared: Array) -> tuple[Carry, Array]:
        """Returns the next carry and its hidden state, from the input pre-activation ``[..., G, H]``."""
        recurrent = self.recurrent_preactivation(params, self.hidden(carry))
        carry = self.pointwise(carry, split_gates(prepared), split_gates(recurrent))
        return carry, self.hidden(carry)

    def check(self, params: CellParams, inputs: Array, carry: Carry | None = None) -> None:
        """Raises ValueError if the weights, time-major inputs ``[T, ..., D]`` or carry do not fit this cell."""
        self._check_params(params)
        validation.time_major("inputs", inputs, params.input_kernel.shape[0])
        if carry is not None:
            self._check_carry(params, carry, self.batch_shape(inputs))

    def check_step(self, params: CellParams, carry: Carry, inputs: Array) -> None:
        """Raises ValueError if the weights, inputs ``[..., D]`` of one step or carry do not fit this cell."""
        self._check_params(params)
        validation.one_step("inputs", inputs, params.input_kernel.shape[0])
        self._check_carry(params, carry, inputs.shape[:-1])

    def _check_params(self, params: CellParams) -> None:
        check_settings(self)
        gates, hidden = self.num_gates, self.hidden_size
        if not isinstance(params, CellParams):
            raise ValueError(
                f"params must be CellParams as {type(self).__name__}.init makes them, got {type(params).__name__}"
            )
        shapes = {"recurrent_kernel": (hidden, gates, hidden), "input_kernel": (None, gates, hidden)}
        for name in ("recurrent_kernel", "input_kernel", "bias", "recurrent_bias"):
            value = getattr(params, name)
            if name != "recurrent_bias" or value is not None:
                validation.shape(f"params.{name}", value, shapes.get(name, (gates, hidden)))
                validation.same_dtype(f"params.{name}", value, "params.recurrent_kernel", params.recurrent_kernel)

    def _check_carry(self, params: CellParams, carry: Carry, batch_shape: tuple[int, ...]) -> None:
        expected = jax.eval_shape(lambda: self.initialize_carry(batch_shape, self.carry_dtype(params)))
        validation.same_shapes("carry", carry, expected, self.carry_form)


def input_product(params: CellParams, inputs: Array) -> Array:
    """Returns x W, the input pre-activation but for its bias, ``[..., G, H]``."""
    return _affine(inputs, params.input_kernel, None, params.bias.dtype)


def with_bias(preactivation: Array, bias: Array) -> Array:
    """Returns ``[..., G, H]`` plus ``[G, H]``."""
    flat = jax.lax.collapse(preactivation, -2)
    return (flat + jnp.broadcast_to(bias.reshape(-1), flat.shape)).reshape(preactivation.shape)


def _affine(x: Array, kernel: Array, bias: Array | None, dtype: DType) -> Array:
    """Returns x times ``[n, G, H]`` plus ``[G, H]``: factors in the dtype of the kernel, their product in another."""
    matrix = kernel.reshape(kernel.shape[0], -1)
    product = jnp.tensordot(x.astype(kernel.dtype), matrix, 1, preferred_element_type=dtype)
    product = product.reshape(*x.shape[:-1], *kernel.shape[1:])
    return product if bias is None else with_bias(product, bias)


def split_gates(preactivation: Array) -> tuple[Array, ...]:
    """Splits ``[..., G, H]`` into G arrays ``[..., H]``."""
    return tuple(preactivation[..., gate, :] for gate in range(preactivation.shape[-2]))
