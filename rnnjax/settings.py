"""What equal cells, or tasks, must agree in: one compiled program serves all of them."""

import dataclasses
import functools
from typing import Any


def check_settings(owner: Any) -> None:
    """Raises an error that names a setting which equality leaves out, or which cannot be hashed.

    A class with an equality of its own is trusted, and so are the values of a ``functools.cached_property``.

    Args:
      owner: an instance of a frozen dataclass, such as a cell or a task.

    Raises:
      TypeError: an attribute that is not a compared field of the dataclass that defines equality.
      ValueError: a value that cannot be hashed, such as an array or a list.

    Example:
      >>> import dataclasses, rnnjax
      >>> check_settings(rnnjax.VanillaCell(3))
      >>> check_settings(rnnjax.VanillaCell(3, recurrent_initializer=[1]))
      Traceback (most recent call last):
      ...
      ValueError: VanillaCell.recurrent_initializer must be hashable, such as a number or a tuple, got list
    """
    kind = type(owner)
    definer = next(base for base in kind.__mro__ if "__eq__" in vars(base))
    if "__dataclass_fields__" not in vars(definer):
        return
    compared = {field.name for field in dataclasses.fields(definer) if field.compare}
    members = [item for base in kind.__mro__ for item in vars(base).items()]
    cached = {name for name, member in members if isinstance(member, functools.cached_property)}
    for name in {**vars(owner), **{field.name: None for field in dataclasses.fields(owner)}}.keys() - cached:
        if name not in compared:
            raise TypeError(
                f"{kind.__name__}.{name} must be a field that is compared, of a @dataclasses.dataclass(frozen=True): "
                f"one compiled program serves all {kind.__name__}s that are equal"
            )
        _check_hashable(f"{kind.__name__}.{name}", getattr(owner, name))


def _check_hashable(name: str, value: Any) -> None:
    try:
        hash(value)
    except TypeError:
        got = type(value).__name__
        raise ValueError(f"{name} must be hashable, such as a number or a tuple, got {got}") from None
