"""Cells and tasks whose settings equality does not see, which would share one compiled program, are refused by name."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnjax
from rnnjax.settings import check_settings
from rnnjax.tasks.adding import AddingTask

PARAMS = rnnjax.VanillaCell(4).init(jax.random.key(0), 3)
INPUTS = jnp.ones((5, 3))


@dataclasses.dataclass(frozen=True)
class Scaled(rnnjax.AffineCell):
    """A cell of a user's own, whose scale may be anything."""

    num_gates: ClassVar[int] = 1
    scale: Any = 1.0

    def pointwise(self, carry, input_preactivation, recurrent_preactivation):
        return self.scale * jnp.tanh(input_preactivation[0] + recurrent_preactivation[0])


@dataclasses.dataclass(frozen=True)
class NotCompared(Scaled):
    scale: float = dataclasses.field(default=1.0, compare=False)


@dataclasses.dataclass(frozen=True, eq=False)
class WithoutEquality(Scaled):
    offset: float = 0.0


class Undecorated(Scaled):
    def __init__(self, hidden_size, offset):
        super().__init__(hidden_size)
        object.__setattr__(self, "offset", offset)


class Bare(rnnjax.VanillaCell):
    def pointwise(self, carry, input_preactivation, recurrent_preactivation):
        return 2 * super().pointwise(carry, input_preactivation, recurrent_preactivation)


@dataclasses.dataclass(frozen=True)
class Cached(rnnjax.AffineCell):
    num_gates: ClassVar[int] = 1
    power: int = 1

    @functools.cached_property
    def scale(self):
        return np.float32(2.0) ** np.arange(self.power, self.power + 1, dtype=np.float32)

    def pointwise(self, carry, input_preactivation, recurrent_preactivation):
        return jnp.tanh(input_preactivation[0] + recurrent_preactivation[0]) * float(self.scale[0])


class OwnEquality(Undecorated):
    def __eq__(self, other):
        return type(other) is OwnEquality and vars(self) == vars(other)

    def __hash__(self):
        return hash(self.offset)


@dataclasses.dataclass(frozen=True)
class NotComparedTask(AddingTask):
    extra: float = dataclasses.field(default=1.0, compare=False)


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        (NotCompared(4), "NotCompared.scale"),
        (WithoutEquality(4), "WithoutEquality.offset"),
        (Undecorated(4, 1.0), "Undecorated.offset"),
    ],
)
def test_settings_that_equality_does_not_see(cell, name):
    kind = type(cell).__name__
    message = f"^{name} must be a field that is compared, .* serves all {kind}s that are equal$"
    for use in (lambda: rnnjax.unroll(cell, PARAMS, INPUTS), lambda: cell.init(jax.random.key(0), 3)):
        with pytest.raises(TypeError, match=message):
            use()


@pytest.mark.parametrize(
    ("scale", "kind"), [(jnp.ones(4), "ArrayImpl"), (np.ones(4), "ndarray"), ([1.0], "list"), (({},), "tuple")]
)
def test_settings_that_cannot_be_hashed(scale, kind):
    with pytest.raises(ValueError, match=f"^Scaled.scale must be hashable, .* got {kind}$"):
        rnnjax.unroll(Scaled(4, scale=scale), PARAMS, INPUTS)


@pytest.mark.parametrize(
    "cells",
    [(Scaled(4, scale=1.0), Scaled(4, scale=2.0)), (rnnjax.VanillaCell(4), Bare(4)), (Cached(4), Cached(4, power=2))],
    ids=["fields", "undecorated", "cached"],
)
def test_cells_that_differ_do_so_once_compiled(cells):
    first, second = (rnnjax.unroll(cell, PARAMS, INPUTS[:1])[1] for cell in cells)
    np.testing.assert_allclose(second, 2 * first, rtol=1e-6)


def test_equality_of_its_own_is_trusted():
    check_settings(OwnEquality(4, 1.0))


def test_tasks_too():
    message = "^NotComparedTask.extra must be a field that is compared"
    for draw in (lambda task: task.batch(0, 0, 2), lambda task: task.evaluation_batch(0)):
        with pytest.raises(TypeError, match=message):
            draw(NotComparedTask(sequence_length=5))


def test_an_activation_of_another_type_is_unknown():
    with pytest.raises(ValueError, match=r"^activation must be one of .*, got \['tanh'\]; did you mean 'tanh'\?$"):
        rnnjax.VanillaCell(4, activation=["tanh"])
