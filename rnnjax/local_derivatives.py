"""Derivatives of one unit: the factors that backpropagation through time and the step Jacobians are made of."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np

from rnnjax.typing import Array


@flax.struct.dataclass
class LocalDerivatives:
    """Derivatives of the new carry of each unit, leaving out what is zero.

    New carries are taken in ``order``; each may depend on those before it, so that the derivative by an earlier
    quantity is the sum over all paths. An index i or k is that of a new carry, j of an old one, g of a gate.

    Attributes:
      by_gate: arrays ``[..., G, H]``, the derivative of new carry ``receivers[n][g]`` by r_g in the n-th.
      by_input: (i, g) → ``[..., H]``, the derivative by u_g, for gates whose u and r are not just added up.
      by_carry: (i, j) → ``[..., H]``.
      by_result: (i, k) → ``[..., H]``, the derivative of new carry i by new carry k.
      receivers: the new carry that each gate acts on, −1 for none.
      summed: whether u_g and r_g are only ever added up, for each gate.
      copies: (i, j), where new carry i is old carry j.
      order: new carries in an order in which they can be computed.
    """

    by_gate: tuple[Array, ...]
    by_input: dict[tuple[int, int], Array]
    by_carry: dict[tuple[int, int], Array]
    by_result: dict[tuple[int, int], Array]
    receivers: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False)
    summed: tuple[bool, ...] = flax.struct.field(pytree_node=False)
    copies: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)
    order: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def times(self, carry: list[Array], recurrent: Array, inputs: dict[int, Array]) -> list[Array]:
        """Returns the tangents of the new carry: derivatives times tangents, unit by unit.

        Args:
          carry: tangents of the old carry, each ``[..., H]``.
          recurrent: tangents of r ``[..., G, H]``, those of u included for gates that are ``summed``.
          inputs: tangents of u_g ``[..., H]`` of the other gates, by g; those left out are zero.

        Returns:
          Tangents of the new carry, each ``[..., H]``.
        """
        products = [derivative * recurrent for derivative in self.by_gate]
        new: dict[int, Array] = {}
        for i in self.order:
            terms = [_total(p, [r == i for r in row]) for p, row in zip(products, self.receivers, strict=True)]
            terms += [carry[j] for k, j in self.copies if k == i]
            terms += [derivative * carry[j] for (k, j), derivative in self.by_carry.items() if k == i]
            terms += [derivative * new[k] for (n, k), derivative in self.by_result.items() if n == i]
            terms += [d * inputs[g] for (k, g), d in self.by_input.items() if k == i and g in inputs]
            there = [term for term in terms if term is not None]
            new[i] = functools.reduce(jnp.add, there) if there else jnp.zeros_like(carry[i])
        return [new[i] for i in range(len(new))]

    def transpose_times(
        self, cotangents: list[Array], flat_by_gate: Sequence[Array]
    ) -> tuple[list[Array | None], Array, dict[int, Array]]:
        """Returns the cotangents of what ``times`` takes: derivatives, transposed, times cotangents, unit by unit.

        Args:
          cotangents: those of the new carry, each ``[..., H]``.
          flat_by_gate: ``by_gate`` as ``[..., G·H]``.

        Returns:
          Cotangents of the old carry, each ``[..., H]`` or None for zero; of r ``[..., G·H]``; and of u_g, by g, for
          gates that are not ``summed``.
        """
        total = list(cotangents)
        for i in reversed(self.order):
            for (n, k), slope in self.by_result.items():
                if n == i:
                    total[k] = total[k] + slope * total[i]
        old: list[Array | None] = [None] * len(total)
        for i, j in self.copies:
            old[j] = _plus(old[j], total[i])
        for (i, j), derivative in self.by_carry.items():
            old[j] = _plus(old[j], derivative * total[i])
        # Without an axis of gates: XLA does not vectorise a broadcast across it, nor multiply in place.
        received = [[jnp.zeros_like(total[0]) if i < 0 else total[i] for i in row] for row in self.receivers]
        products = [d * jnp.concatenate(ct, axis=-1) for d, ct in zip(flat_by_gate, received, strict=True)]
        recurrent = functools.reduce(jnp.add, products)
        inputs: dict[int, Array] = {}
        for (i, g), derivative in self.by_input.items():
            inputs[g] = _plus(inputs.get(g), derivative * total[i])
        return old, recurrent, inputs

    def by_old_carry(self) -> Array:
        """Returns P = ∂s'/∂s of each unit, ``[..., C, C, H]``, along all paths."""
        return self._dense(self._paths(self.by_carry, self.copies), len(self.order))

    def by_recurrent(self) -> Array:
        """Returns D = ∂s'/∂r of each unit, ``[..., C, G, H]``, along all paths."""
        direct: dict[tuple[int, int], Array] = {}
        for array, row in zip(self.by_gate, self.receivers, strict=True):
            direct |= {(i, gate): array[..., gate, :] for gate, i in enumerate(row) if i >= 0}
        return self._dense(self._paths(direct, ()), len(self.summed))

    def _paths(self, direct: dict[tuple[int, int], Array], same: tuple[tuple[int, int], ...]) -> Any:
        """Adds to the direct derivatives what arrives by way of other new carries."""
        total = dict(direct)
        ones = jnp.ones_like(self.by_gate[0][..., 0, :])
        total |= dict.fromkeys(same, ones)
        for i in self.order:
            for (receiver, k), slope in self.by_result.items():
                if receiver != i:
                    continue
                for (source, index), derivative in list(total.items()):
                    if source == k:
                        total[i, index] = total.get((i, index), 0) + slope * derivative
        return total

    def _dense(self, entries: dict[tuple[int, int], Array], size: int) -> Array:
        zeros = jnp.zeros_like(self.by_gate[0][..., 0, :])
        rows = [[entries.get((i, index), zeros) for index in range(size)] for i in range(len(self.order))]
        return jnp.stack([jnp.stack(row, axis=-2) for row in rows], axis=-3)


def _plus(first: Array | None, second: Array) -> Array:
    return second if first is None else first + second


def _total(products: Array, chosen: list[bool]) -> Array | None:
    """Returns the sum over the chosen gates ``[..., H]``."""
    if not any(chosen):
        return None
    if all(chosen):
        return products.sum(axis=-2)
    return only_gates(products, chosen).sum(axis=-2)


def only_gates(array: Array, chosen: Sequence[bool]) -> Array:
    """Returns ``[..., G, H]`` with zeros for the gates that are not chosen."""
    mask = np.array(chosen).reshape((1,) * (array.ndim - 2) + (-1, 1))
    return jnp.where(mask, array, jnp.zeros_like(array))
