"""Networks as Flax NNX modules around the functional cells: embedding or features, recurrent layers, readout."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from rnnjax import cells, validation
from rnnjax.bidirectional import unroll_bidirectional
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
        self.cell = cell
        if type(cell).__module__.startswith(cells.__name__):  # another's fields may matter to each step
            start: dict[str, Any] = {"input_initializer": Glorot(), "recurrent_initializer": Orthogonal()}
            if isinstance(cell, cells.LSTMCell | cells.GRUCell):
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
      bidirectional: read the sequence backwards too, with a second cell in every layer; ``layers`` then holds, for each
        layer, the cell that reads backwards and the one that reads forwards.
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
        bidirectional: bool = False,
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
        self.skip_connections, self.bidirectional = skip_connections, bidirectional
        embedding = None
        if vocabulary_size is not None:
            tokens = validation.positive_integer("vocabulary_size", vocabulary_size)
            wanted = cell.hidden_size if embedding_size is None else embedding_size
            input_size = validation.positive_integer("embedding_size", wanted)
            embedding = nnx.Embed(tokens, input_size, param_dtype=dtype, rngs=rngs)
        self.embedding = embedding
        directions = 2 if bidirectional else 1
        sizes = [validation.positive_integer("input_size", input_size)]
        sizes += [directions * cell.hidden_size] * (num_layers - 1)
        drawn = [RecurrentLayer(cell, size, dtype=dtype, rngs=rngs) for size in sizes for _ in range(directions)]
        self.layers = nnx.List(drawn)
        self.output = nnx.Linear(directions * cell.hidden_size, output_size, dtype=dtype, param_dtype=dtype, rngs=rngs)

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
          carries: the carry before the first step of each of ``layers``; initial ones by default.
          lengths: ``[B]``, as for ``unroll``; the last step of a sequence is that before its length.
          perturbations: one ``[T, B, H]``, or one carry of such arrays, for each of ``layers``, as for ``unroll``; time
            in the order of processing where the network reads in both directions.
          reverse: as for ``unroll``, in every layer; the step processed last is then step 0.
          **options: ``resets``, ``truncation``, ``max_carry_gradient``, ``checkpoint_every``, ``compute_dtype`` and
            ``side_by_side``, passed on to ``unroll``.

        Returns:
          Outputs ``[B, O]`` or ``[T, B, O]``, and a carry for each of ``layers``.

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
        if self.bidirectional and reverse:
            raise ValueError("reverse must be False for a network that reads in both directions, got True")
        features, last = self._features(inputs), []
        shared: dict[str, Any] = {"lengths": lengths, **options}
        for level in range(self.num_levels):
            own = slice(level * self.num_directions, (level + 1) * self.num_directions)
            started = None if carries is None else jax.lax.stop_gradient(list(carries[own]))
            perturbed = None if perturbations is None else list(perturbations[own])
            if self.bidirectional:
                carry, outputs = self._both_directions(own, features, started, perturbed, shared)
            else:
                single: dict[str, Any] = {"perturbations": perturbed and perturbed[0], "reverse": reverse, **shared}
                carry, outputs = self.layers[level](features, started and started[0], **single)
                carry = [carry]
            features = self._with_skip(level, features, outputs)
            last += carry
        if self.readout == "last":
            features = self._at_end(features, lengths, reverse)
        return self.output(features), last

    @property
    def num_directions(self) -> int:
        """Directions in which a layer reads, 1 or 2."""
        return 2 if self.bidirectional else 1

    @property
    def num_levels(self) -> int:
        """Layers on top of each other."""
        return len(self.layers) // self.num_directions

    def _both_directions(
        self, own: slice, features: Array, carries: Any, perturbations: Any, options: dict[str, Any]
    ) -> tuple[list[Carry], Array]:
        backwards, forwards = self.layers[own]
        pairs = [None if pair is None else (pair[1], pair[0]) for pair in (carries, perturbations)]
        params = (forwards.params(), backwards.params())
        (after, before), outputs = unroll_bidirectional(
            forwards.cell, params, features, pairs[0], perturbations=pairs[1], **options
        )
        return [before, after], outputs

    def _at_end(self, features: Array, lengths: Array | None, reverse: bool) -> Array:
        """Returns what the layer has read when it is through, ``[B, H]`` or ``[B, 2H]``."""
        if reverse:
            return features[0]
        if not self.bidirectional:
            return _at_last_step(features, lengths)
        forwards, backwards = jnp.split(features, 2, axis=-1)
        return jnp.concatenate([_at_last_step(forwards, lengths), backwards[0]], axis=-1)

    def layer_views(self, inputs: Array) -> list[LayerView]:
        """Returns each of ``layers`` with the inputs it gets when the network runs on ``inputs``.

        Time is in the order of processing: backwards for those that read backwards.
        """
        features, views = self._features(inputs), []
        for level in range(self.num_levels):
            own = self.layers[level * self.num_directions : (level + 1) * self.num_directions]
            if self.bidirectional:
                views.append(LayerView(own[0].cell, own[0].params(), features[::-1]))
                _, outputs = self._both_directions(slice(2 * level, 2 * level + 2), features, None, None, {})
            else:
                _, outputs = own[0](features)
            views.append(LayerView(own[-1].cell, own[-1].params(), features))
            features = self._with_skip(level, features, outputs)
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
    carries = [cell.initialize_carry(inputs.shape[:2], dtype) for cell, dtype in layers]
    return jax.tree.map(jnp.zeros_like, carries)  # a cell may start from another carry


@functools.partial(jax.jit, static_argnames="graph")
def layer_views(graph: nnx.GraphDef, params: nnx.State, inputs: Array) -> list[LayerView]:
    """Returns ``RecurrentNetwork.layer_views``, compiled, for a network in parts as ``nnx.split`` gives them."""
    return nnx.merge(graph, params).layer_views(inputs)
