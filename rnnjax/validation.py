"""Checks of what users pass in: one error that names the argument, its value and what is allowed.

Checks of values (finite, in range) look at concrete arrays only. Under ``jax.jit`` an argument has no value yet, so
there they pass in silence; checks of shape, dtype and names hold everywhere.
"""

import difflib
import math
import numbers
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def positive_integer(name: str, value: Any) -> int:
    """Returns ``value`` as an int, or raises ValueError unless it is a whole number of at least 1."""
    return _integer(name, value, 1, math.inf, "a positive integer")


def non_negative_integer(name: str, value: Any) -> int:
    """Returns ``value`` as an int, or raises ValueError unless it is a whole number of at least 0."""
    return _integer(name, value, 0, math.inf, "a non-negative integer")


def integer_at_least(name: str, value: Any, minimum: int) -> int:
    """Returns ``value`` as an int, or raises ValueError unless it is a whole number of at least ``minimum``."""
    return _integer(name, value, minimum, math.inf, f"an integer of at least {minimum}")


def integer_between(name: str, value: Any, low: int, high: int) -> int:
    """Returns ``value`` as an int, or raises ValueError unless it is a whole number in [low, high]."""
    return _integer(name, value, low, high, f"a whole number in [{low}, {high}]")


def _integer(name: str, value: Any, low: int, high: float, allowed: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return int(value)


def positive_number(name: str, value: Any) -> float:
    """Returns ``value`` as a float, or raises ValueError unless it is finite and above 0."""
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return float(value)


def number_between(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> float:
    """Returns ``value`` as a float, or raises ValueError unless it lies in [low, high] (or (low, high])."""
    if not _is_number(value) or not (low < value if open_low else low <= value) or not value <= high:
        raise ValueError(f"{name} must be a number in {'(' if open_low else '['}{low:g}, {high:g}], got {value!r}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def one_of(name: str, value: Any, allowed: Collection[str]) -> str:
    """Returns ``value``, or raises ValueError that lists ``allowed`` and the nearest spelling."""
    if isinstance(value, str) and value in allowed:
        return value
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(sorted(allowed))}, got {value!r}{hint}")


def is_concrete(value: Any) -> bool:
    """Whether ``value`` has numbers to look at, that is, is not traced by a JAX transformation."""
    return not isinstance(value, jax.core.Tracer)


class NonFiniteError(ValueError):
    """A value that must be finite is a NaN or an infinity."""


def finite(name: str, tree: Any) -> None:
    """Raises ValueError that names the first non-finite leaf and index of ``tree``, where it has values."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not _all_finite(leaf):
            values = np.asarray(leaf)
            bad = np.argwhere(~np.isfinite(values))
            index = tuple(int(i) for i in bad[0])
            where = f"{name}{jax.tree_util.keystr(path)}{list(index)}"
            raise NonFiniteError(f"{name} must be finite, got {where} = {values[index]} ({len(bad)} such values)")


def _all_finite(leaf: Any) -> bool:
    """Whether a leaf holds finite numbers only, or nothing that can be looked at."""
    # NumPy does not count bfloat16 among its floating-point types, and has no form for a random key.
    if not is_concrete(leaf) or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return True
    if not isinstance(leaf, jax.Array):
        return bool(np.isfinite(leaf).all())
    with jax.ensure_compile_time_eval():  # A constant of a traced function is looked at, not traced.
        return bool(jnp.isfinite(leaf).all())  # On the device: one bit comes back, not the array.


def floating_dtype(name: str, dtype: Any) -> None:
    """Raises ValueError unless ``dtype`` is a floating-point type."""
    if not _names_dtype(dtype) or not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(f"{name} must be a floating-point dtype such as float32, got {dtype!r}")
    if jnp.dtype(dtype) == np.float64 and not float64_enabled():
        raise ValueError(
            f"{name} can be float64 only when JAX has it switched on: "
            'with jax.enable_x64(True): ..., or jax.config.update("jax_enable_x64", True)'
        )


def _names_dtype(value: Any) -> bool:
    try:
        jnp.dtype(value)
    except TypeError:
        return False
    return True


def float64_enabled() -> bool:
    """Returns whether JAX makes float64 arrays, here and now."""
    return jnp.result_type(float) == np.float64


def shape(name: str, array: Any, expected: tuple[int | None, ...]) -> None:
    """Raises ValueError unless ``array.shape`` equals ``expected``, where None stands for any size."""
    actual = jnp.shape(array)
    if len(actual) != len(expected) or any(e not in (None, a) for a, e in zip(actual, expected, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} must have shape ({wanted}), got {actual}")


class _Word(str):
    """A text that stands in a printed tree without quotes."""

    __repr__ = str.__str__


def in_words(tree: Any) -> str:
    """Returns a pytree as text, with dtypes and shapes in place of its arrays: ``{'h': float32[3]}``."""

    def word(leaf: Any) -> _Word:
        if not hasattr(leaf, "dtype"):
            return _Word(type(leaf).__name__)
        return _Word(f"{leaf.dtype}{list(leaf.shape)}")

    text = repr(jax.tree.map(word, tree))
    return f"one array {text}" if hasattr(tree, "dtype") else text


def same_shapes(name: str, tree: Any, expected: Any, allowed: str | None = None) -> None:
    """Raises ValueError unless ``tree`` has the structure and the leaf shapes of ``expected``, ``allowed`` in words."""
    if str(jax.tree.structure(tree)) != str(jax.tree.structure(expected)):
        raise ValueError(f"{name} must be {allowed or 'like ' + in_words(expected)}, got {in_words(tree)}")
    for (path, leaf), wanted in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True):
        shape(name + jax.tree_util.keystr(path), leaf, wanted.shape)


def time_major(name: str, array: Any, features: int | None) -> None:
    """Raises ValueError unless ``array`` is a float array ``[T, ..., D]`` with T ≥ 1 (and D = ``features``)."""
    _is_array(name, array)
    actual = jnp.shape(array)
    last = "D" if features is None else str(features)
    if len(actual) < 2 or (features is not None and actual[-1] != features):
        raise ValueError(f"{name} must be time-major with shape [T, ..., {last}], got shape {actual}")
    if actual[0] == 0:
        raise ValueError(f"{name} must have at least one time step, got shape {actual}")
    if features is not None:
        _is_floating(name, array)


def one_step(name: str, array: Any, features: int) -> None:
    """Raises ValueError unless ``array`` is a float array ``[..., D]`` with D = ``features``."""
    _is_array(name, array)
    if jnp.shape(array)[-1:] != (features,):
        raise ValueError(f"{name} must have shape [..., D] with D = {features}, got shape {jnp.shape(array)}")
    _is_floating(name, array)


def same_dtype(name: str, array: Any, like_name: str, like: Any) -> None:
    """Raises ValueError unless ``array`` is floating point, in the dtype of ``like``."""
    _is_floating(name, array)
    if jnp.result_type(array) != jnp.result_type(like):
        raise ValueError(
            f"{name} must have the dtype of {like_name}, {jnp.result_type(like)}, got {jnp.result_type(array)}"
        )


def _is_array(name: str, value: Any) -> None:
    if not hasattr(value, "dtype"):
        raise ValueError(f"{name} must be an array, got {type(value).__name__}")


def _is_floating(name: str, array: Any) -> None:
    if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
        raise ValueError(f"{name} must be floating point, got dtype {jnp.result_type(array)}")


def tokens(name: str, value: Any, vocabulary_size: int) -> None:
    """Raises ValueError unless ``value`` holds whole numbers in [0, vocabulary_size), ``[T, B]`` with T ≥ 1."""
    if jnp.ndim(value) != 2 or jnp.shape(value)[0] == 0 or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        kind = f"shape {jnp.shape(value)} and dtype {jnp.result_type(value)}"
        raise ValueError(f"{name} must be whole-number tokens [T, B] with T ≥ 1, got {kind}")
    if is_concrete(value):
        bad = np.asarray(value)[(np.asarray(value) < 0) | (np.asarray(value) >= vocabulary_size)]
        if bad.size:
            raise ValueError(f"{name} must be tokens in [0, {vocabulary_size}), got {bad.flat[0]}")


def lengths(name: str, value: Any, batch_shape: tuple[int, ...], num_steps: int) -> None:
    """Raises ValueError unless ``value`` holds whole numbers in [0, T], one for each sequence."""
    shape(name, value, batch_shape)
    if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise ValueError(f"{name} must be whole numbers, got dtype {jnp.result_type(value)}")
    if is_concrete(value):
        bad = np.asarray(value)[(np.asarray(value) < 0) | (np.asarray(value) > num_steps)]
        if bad.size:
            raise ValueError(f"{name} must lie in [0, {num_steps}], the number of time steps; got {bad.flat[0]}")


def finite_steps(name: str, tree: Any) -> None:
    """Raises ValueError that names the first time step (axis 0) at which a concrete ``tree`` is not finite."""
    steps = [
        int(np.argwhere(~np.isfinite(np.asarray(leaf)))[0][0])
        for leaf in jax.tree.leaves(tree)
        if not _all_finite(leaf)
    ]
    if steps:
        raise NonFiniteError(f"{name} must be finite, got a NaN or an overflow at time step {min(steps)}")


def named_arrays(where: str, given: Mapping[str, Any], axes: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Returns the arrays that ``axes`` names as floats, none of them empty; ``where`` is what errors call ``given``.

    The axes of an array are letters: the same letter is the same size throughout, and the digit 2 is that size.
    """
    missing = [name for name in axes if name not in given]
    if missing:
        raise ValueError(f"{where} must hold {', '.join(axes)}; missing: {', '.join(missing)}")
    sizes: dict[str, int] = {"2": 2}
    checked = {}
    for name, letters in axes.items():
        checked[name] = np.asarray(given[name], float)
        shape(f"{where}[{name!r}]", checked[name], tuple(sizes.get(letter) for letter in letters))
        sizes.update(zip(letters, checked[name].shape, strict=True))
        if checked[name].size == 0:
            raise ValueError(f"{where}[{name!r}] must not be empty, got shape {checked[name].shape}")
    return checked
