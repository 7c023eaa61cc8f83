"""Networks as Flax NNX modules around the functional cells: embedding or features, recurrent layers, readout."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from rnnjax import validation
from rnnjax.cells import AffineCell, CellParams
from rnnjax.initializers import Glorot, Orthogonal
from rnnjax.monitor import LayerView
from rnnjax.typing import Array, Carry, DType
from rnnjax.unroll import unroll


class RecurrentLayer(nnx.Module):
    """A cell with its weights, unrolled over time.

    Args:
      cell: an affine cell.
      input_size: number of input features D.
      dtype: dtype of the weights.
      rngs: where the initial weights come from.

    Raises:
      ValueError: a cell that is not affine, an ``input_size`` that is not a positive integer, a dtype that is not
        floating.

    Example:
      >>> import jax.numpy as jnp, rnnjax
      >>> from flax import nnx
      >>> layer = RecurrentLayer(rnnjax.GRUCell(8), input_size=2, rngs=nnx.Rngs(0))
      >>> carry, outputs = layer(jnp.ones((64, 3, 2)))
      >>> carry.shape, outputs.shape
      ((3, 8), (64, 3, 8))
    """

    def __init__(self, cell: AffineCell, input_size: int, *, dtype: DType = jnp.float32, rngs: nnx.Rngs) -> None:
        _check_affine(cell)
        params = cell.init(rngs.params(), input_size, dtype)
        # Once weights are drawn the initialisers matter no more: without them, networks that differ in nothing else
        # share their compiled code.
        start: dict[str, Any] = {"input_initializer": Glorot(), "recurrent_initializer": Orthogonal()}
        if any(field.name == "forget_bias" for field in dataclasses.fields(cell)):
            start["forget_bias"] = 0.0
        self.cell = dataclasses.replace(cell, **start)
        self.input_kernel = nnx.Param(params.input_kernel)
        self.recurrent_kernel = nnx.Param(params.recurrent_kernel)
        self.bias = nnx.Param(params.bias)
        self.recurrent_bias = None if params.recurrent_bias is None else nnx.Param(params.recurrent_bias)

    def params(self) -> CellParams:
        """Returns the weights as the functional API takes them."""
        recurrent_bias = None if self.recurrent_bias is None else self.recurrent_bias[...]
        return CellParams(self.input_kernel[...], self.recurrent_kernel[...], self.bias[...], recurrent_bias)

    def __call__(self, inputs: Array, carry: Carry | None = None, **options: Any) -> tuple[Carry, Array]:
        """Runs ``unroll`` with this layer's weights; takes its keyword arguments."""
        return unroll(self.cell, self.params(), inputs, carry, **options)


class RecurrentNetwork(nnx.Module):
    """Embedding or features, recurrent layers, readout.

    Args:
      cell: the cell of every layer.
      output_size: number of outputs O.
      num_layers: number of recurrent layers L.
      input_size: number of input features D, for inputs ``[T, B, D]``.
      vocabulary_size: number of tokens, for inputs ``[T, B]``; give this or ``input_size``.
      embedding_size: features of a token's embedding, with ``vocabulary_size`` only; the hidden size by default.
      readout: outputs from the step processed ``last``, ``[B, O]``, or from ``every`` step, ``[T, B, O]``.
      skip_connections: add each layer's input to its output, from the second layer on.
      dtype: dtype of the weights.
      rngs: where the initial weights come from.

    Raises:
      ValueError: a cell that is not affine, sizes that are not positive, neither or both of ``input_size`` and
        ``vocabulary_size``, an ``embedding_size`` without the latter, an unknown readout.

    Example:
      >>> import jax.numpy as jnp, rnnjax
      >>> from flax import nnx
      >>> network = RecurrentNetwork(rnnjax.GRUCell(8), 10, input_size=1, rngs=nnx.Rngs(0))
      >>> network(jnp.ones((64, 3, 1))).shape
      (3, 10)
    """

    def __init__(
        self,
        cell: AffineCell,
        output_size: int,
        *,
        num_layers: int = 1,
        input_size: int | None = None,
        vocabulary_size: int | None = None,
        embedding_size: int | None = None,
        readout: Literal["last", "every"] = "last",
        skip_connections: bool = False,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        _check_affine(cell)
        if (input_size is None) == (vocabulary_size is None):
            raise ValueError(
                f"one of input_size and vocabulary_size must be given, got {input_size} and {vocabulary_size}"
            )
        if embedding_size is not None and vocabulary_size is None:
            raise ValueError(f"embedding_size must be left out unless vocabulary_size is given, got {embedding_size!r}")
        validation.positive_integer("num_layers", num_layers)
        validation.positive_integer("output_size", output_size)
        self.readout = validation.one_of("readout", readout, ("last", "every"))
        self.skip_connections = skip_connections
        embedding = None
        if vocabulary_size is not None:
            tokens = validation.positive_integer("vocabulary_size", vocabulary_size)
            wanted = cell.hidden_size if embedding_size is None else embedding_size
            input_size = validation.positive_integer("embedding_size", wanted)
            embedding = nnx.Embed(tokens, input_size, param_dtype=dtype, rngs=rngs)
        self.embedding = embedding
        sizes = [validation.positive_integer("input_size", input_size)] + [cell.hidden_size] * (num_layers - 1)
        self.layers = nnx.List([RecurrentLayer(cell, size, dtype=dtype, rngs=rngs) for size in sizes])
        self.output = nnx.Linear(cell.hidden_size, output_size, dtype=dtype, param_dtype=dtype, rngs=rngs)

    def __call__(self, inputs: Array, **options: Any) -> Array:
        """Returns the outputs for a batch of sequences.

        Args:
          inputs: features ``[T, B, D]`` or tokens ``[T, B]``.
          **options: those of ``unroll``, without ``carries``.

        Returns:
          ``[B, O]`` or ``[T, B, O]``.

        Raises:
          ValueError: inputs or options that ``unroll`` would refuse, another number of perturbations than layers.
        """
        return self.unroll(inputs, **options)[0]

    def unroll(
        self,
        inputs: Array,
        carries: Sequence[Carry] | None = None,
        *,
        lengths: Array | None = None,
        perturbations: Sequence[Any] | None = None,
        reverse: bool = False,
        **options: Any,
    ) -> tuple[Array, list[Carry]]:
        """Returns the outputs for a batch of sequences, and the carries they end with.

        Handed on to the next window of the same sequences, the carries continue them; no gradient passes from one call
        to the next, so that this is truncated backpropagation through time over windows of a stream.

        Args:
          inputs: features ``[T, B, D]`` or tokens ``[T, B]``.
          carries: the carry before the first step of each layer; initial ones by default.
          lengths: ``[B]``, as for ``unroll``; the last step of a sequence is that before its length.
          perturbations: one ``[T, B, H]``, or one carry of such arrays, for each layer, as for ``unroll``.
          reverse: as for ``unroll``, in every layer; the step processed last is then step 0.
          **options: ``resets``, ``truncation`` and ``max_carry_gradient``, passed on to ``unroll``.

        Returns:
          Outputs ``[B, O]`` or ``[T, B, O]``, and a carry for each layer.

        Raises:
          ValueError: inputs or options that ``rnnjax.unroll`` would refuse, another number of carries or perturbations
            than layers.
        """
        if carries is not None and len(carries) != len(self.layers):
            raise ValueError(f"carries must be one for each of the {len(self.layers)} layers, got {len(carries)}")
        if perturbations is not None and len(perturbations) != len(self.layers):
            raise ValueError(
                f"perturbations must be one array for each of the {len(self.layers)} layers, got {len(perturbations)}"
            )
        features, last = self._features(inputs), []
        for index, layer in enumerate(self.layers):
            perturbation = None if perturbations is None else perturbations[index]
            carry = None if carries is None else jax.lax.stop_gradient(carries[index])
            options_of_layer = {"lengths": lengths, "perturbations": perturbation, "reverse": reverse, **options}
            carry, outputs = layer(features, carry, **options_of_layer)
            features = self._with_skip(index, features, outputs)
            last.append(carry)
        if self.readout == "last":
            features = features[0] if reverse else _at_last_step(features, lengths)
        return self.output(features), last

    def layer_views(self, inputs: Array) -> list[LayerView]:
        """Returns each layer with the inputs it gets when the network runs on ``inputs``."""
        features, views = self._features(inputs), []
        for index, layer in enumerate(self.layers):
            views.append(LayerView(layer.cell, layer.params(), features))
            _, outputs = layer(features)
            features = self._with_skip(index, features, outputs)
        return views

    def _features(self, inputs: Array) -> Array:
        if self.embedding is None:
            return inputs
        validation.tokens("inputs", inputs, self.embedding.num_embeddings)
        return self.embedding(inputs)

    def _with_skip(self, index: int, inputs: Array, outputs: Array) -> Array:
        return inputs + outputs if self.skip_connections and index > 0 else outputs


def _check_affine(cell: AffineCell) -> None:
    if not isinstance(cell, AffineCell):
        raise ValueError(f"cell must be an affine cell, such as a GRUCell, got {type(cell).__name__}")


def _at_last_step(features: Array, lengths: Array | None) -> Array:
    """Returns ``features[length − 1]`` of each sequence, ``[B, H]``; zeros where the length is 0."""
    if lengths is None:
        return features[-1]
    last = jnp.maximum(jnp.asarray(lengths) - 1, 0)
    chosen = jnp.take_along_axis(features, last[None, :, None], axis=0)[0]
    return jnp.where((jnp.asarray(lengths) > 0)[:, None], chosen, jnp.zeros_like(chosen))


def zero_perturbations(network: RecurrentNetwork, inputs: Array) -> list[Array]:
    """Returns the zeros to differentiate by for the hidden gradients, one ``[T, B, H]`` a layer."""
    return [jax.tree.leaves(carry)[0] for carry in zero_carry_perturbations(network, inputs)]


def zero_carry_perturbations(network: RecurrentNetwork, inputs: Array) -> list[Carry]:
    """Returns the zeros to differentiate by for ∂L/∂s_t, a carry with leaves ``[T, B, H]`` for each layer."""
    layers = [(layer.cell, layer.recurrent_kernel[...].dtype) for layer in network.layers]
    return [cell.initialize_carry(inputs.shape[:2], dtype) for cell, dtype in layers]


@functools.partial(jax.jit, static_argnames="graph")
def layer_views(graph: nnx.GraphDef, params: nnx.State, inputs: Array) -> list[LayerView]:
    """Returns ``RecurrentNetwork.layer_views``, compiled, for a network in parts as ``nnx.split`` gives them."""
    return nnx.merge(graph, params).layer_views(inputs)
