"""The gradient of a network's loss: through time, with what is done to it on its way and what is added to the loss."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rnnjax import validation
from rnnjax.models import zero_carry_perturbations
from rnnjax.penalties import Penalty
from rnnjax.tasks import Batch, Task
from rnnjax.typing import Array
from rnnjax.unroll import trajectory


@dataclasses.dataclass(frozen=True)
class BackpropagationSettings:
    """How the gradient of the loss is taken.

    Attributes:
      truncation: window of truncated backpropagation through time, in steps; None for full length.
      max_carry_gradient: largest norm of the gradient that one step hands back to the one before it, as for ``unroll``,
        in units of the gradient of the mean loss of a batch; None for no bound.
      checkpoint_every: keep every n-th state alone, as for ``unroll``; None for all.
      compute_dtype: dtype of the factors of matrix products, as for ``unroll``; None for that of the weights.
      side_by_side: in two loops on two cores where that is faster, as for ``unroll``: training repeats its step often
        enough for the longer compilation.
      penalty: what is added to the loss, summed over the layers; None for nothing.

    Raises:
      ValueError: a setting out of range.
    """

    truncation: int | None = None
    max_carry_gradient: float | None = None
    checkpoint_every: int | None = None
    compute_dtype: str | None = None
    side_by_side: bool = True
    penalty: Penalty | None = None

    def __post_init__(self) -> None:
        if self.truncation is not None:
            validation.positive_integer("truncation", self.truncation)
        if self.max_carry_gradient is not None:
            validation.positive_number("max_carry_gradient", self.max_carry_gradient)
        if self.checkpoint_every is not None:
            validation.positive_integer("checkpoint_every", self.checkpoint_every)
        if self.compute_dtype is not None:
            validation.floating_dtype("compute_dtype", self.compute_dtype)

    def options(self) -> dict[str, Any]:
        """Returns what ``unroll`` is to be given."""
        names = ("truncation", "max_carry_gradient", "checkpoint_every", "compute_dtype", "side_by_side")
        return {name: getattr(self, name) for name in names}


def loss_and_gradient(
    graph: nnx.GraphDef,
    task: Task,
    settings: BackpropagationSettings,
    params: nnx.State,
    batch: Batch,
    perturbations: list[Any] | None = None,
) -> tuple[dict[str, Array], nnx.State, list[Any]]:
    """Returns what a training step needs to know of a batch.

    Args:
      graph: structure of the network, from ``nnx.split``.
      task: gives loss and accuracy.
      settings: how the gradient is taken.
      params: the network's weights.
      batch: the batch.
      perturbations: zeros to differentiate by for the hidden gradients, as the network takes them; None for none.

    Returns:
      ``loss`` and ``accuracy`` (and ``penalty``, its weight included, where there is one) as scalars; the gradient of
      loss and penalty together; the gradient of the loss by the perturbations.
    """
    penalty = settings.penalty
    if penalty is not None and penalty.needs_hidden_gradients:
        perturbations = zero_carry_perturbations(nnx.merge(graph, params), batch.inputs)

    def loss_fn(params: nnx.State, perturbations: list[Any] | None) -> tuple[Array, Array]:
        outputs = nnx.merge(graph, params)(batch.inputs, perturbations=perturbations, **settings.options())
        return task.loss(outputs, batch), task.accuracy(outputs, batch)

    value_and_grad = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    (loss, accuracy), (gradient, hidden) = value_and_grad(params, perturbations)
    scores = {"loss": loss, "accuracy": accuracy}
    if penalty is not None:
        of_params = functools.partial(_penalty, graph, penalty, batch.inputs, hidden)
        scores["penalty"], own = jax.value_and_grad(of_params)(params)
        gradient = jax.tree.map(jnp.add, gradient, own)
    return scores, gradient, hidden


def _penalty(
    graph: nnx.GraphDef, penalty: Penalty, inputs: Array, hidden: list[Any] | None, params: nnx.State
) -> Array:
    views = nnx.merge(graph, params).layer_views(inputs)
    by_layer = hidden if hidden is not None else [None] * len(views)
    return sum(
        (
            penalty(view.cell, view.params, view.inputs, hidden_gradients=own)
            for view, own in zip(views, by_layer, strict=True)
        ),
        jnp.zeros((), jnp.float32),
    )


def locate_non_finite(
    graph: nnx.GraphDef, task: Task, settings: BackpropagationSettings, params: nnx.State, batch: Batch
) -> dict[str, Any]:
    """Says where the first non-finite value of a training step arose: in which pass, layer and time step.

    Forward, the first is at the earliest time step, in the lowest layer; backward at the latest, in the highest.

    Args:
      graph: structure of the network, from ``nnx.split``.
      task: gives the loss.
      settings: how the gradient is taken.
      params: the network's weights at that step.
      batch: its batch.

    Returns:
      ``non_finite_pass``: "weights", "inputs", "forward" (a state), "loss" (all states finite), "backward" (a hidden
      gradient), "weight gradient" (all of those finite) or "none"; and, for forward and backward, ``non_finite_layer``
      and ``non_finite_step``, both counted from 0.
    """
    found = jax.device_get(_finiteness(graph, task, settings, params, batch))
    for name in ("weights", "inputs"):
        if not found[name]:
            return {"non_finite_pass": name}
    if not found["forward"].all():
        layer, step = min(np.argwhere(~found["forward"]).tolist(), key=lambda place: (place[1], place[0]))
        return {"non_finite_pass": "forward", "non_finite_layer": layer, "non_finite_step": step}
    if not found["loss"]:
        return {"non_finite_pass": "loss"}
    if not found["backward"].all():
        layer, step = max(np.argwhere(~found["backward"]).tolist(), key=lambda place: (place[1], place[0]))
        return {"non_finite_pass": "backward", "non_finite_layer": layer, "non_finite_step": step}
    return {"non_finite_pass": "none" if found["weight gradient"] else "weight gradient"}


@functools.partial(jax.jit, static_argnames=("graph", "task", "settings"))
def _finiteness(
    graph: nnx.GraphDef, task: Task, settings: BackpropagationSettings, params: nnx.State, batch: Batch
) -> dict[str, Array]:
    network = nnx.merge(graph, params)
    zeros = zero_carry_perturbations(network, batch.inputs)
    scores, gradient, hidden = loss_and_gradient(graph, task, settings, params, batch, zeros)
    states = [trajectory(view.cell, view.params, view.inputs).carries for view in network.layer_views(batch.inputs)]
    return {
        "weights": _finite(params),
        "inputs": _finite(batch.inputs),
        "forward": jnp.stack([_finite_steps(jax.tree.map(lambda leaf: leaf[1:], carries)) for carries in states]),
        "loss": jnp.isfinite(scores["loss"]),
        "backward": jnp.stack([_finite_steps(layer) for layer in hidden]),
        "weight gradient": _finite(gradient),
    }


def _finite(tree: Any) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _finite_steps(tree: Any) -> Array:
    """Returns whether every leaf ``[T, ...]`` is finite at each step, bool ``[T]``."""
    leaves = [jnp.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all(axis=0)
