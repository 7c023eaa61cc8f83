"""Numbers as files: strict JSON, .npz arrays, and aligned tables.

Strict JSON has no NaN and no infinity: a non-finite number is the object ``{"float": "nan"}``, ``{"float": "inf"}`` or
``{"float": "-inf"}``, which `restored` turns back.
"""

import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_ARRAY_SIZE = 4096
"""Numbers that an array inside JSON may have; larger ones belong in `Workdir.save_arrays`."""


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns ``rows`` as aligned text, one column a key; numbers to the right with four digits, the rest to the left.

    Example:
      >>> print(format_table([{"cell": "LSTM", "exponent": -0.0123456}, {"cell": "GRU", "exponent": 12.0}]))
      cell  exponent
      ----  --------
      LSTM  -0.01235
      GRU         12
    """
    columns = {key: [scalar(row.get(key)) for row in rows] for key in table_columns(rows)}
    aligned = []
    for key, values in columns.items():
        cells = [key, "", *(_format_cell(value) for value in values)]
        width = max(map(len, cells))
        cells[1] = "-" * width
        numeric = all(value is None or isinstance(value, int | float) for value in values)
        aligned.append([cell.rjust(width) if numeric else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))


def table_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns every key of ``rows``, in order of appearance."""
    if not rows or not all(isinstance(row, Mapping) and row for row in rows):
        raise ValueError(f"rows must be a non-empty list of non-empty dicts, got {rows!r}")
    return list(dict.fromkeys(key for row in rows for key in row))


def _format_cell(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"


def scalar(value: Any) -> Any:
    """Returns a NumPy or JAX scalar as the Python number; anything else as it is."""
    is_scalar = isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0
    return np.asarray(value).item() if is_scalar else value


def plain(name: str, value: Any) -> Any:
    """Returns ``value`` as what strict JSON can hold; ``name`` is for the error."""
    if isinstance(value, Mapping):
        return {str(key): plain(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(name, item) for item in value]
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        if value.size > MAX_ARRAY_SIZE:
            raise ValueError(f"{name} must have at most {MAX_ARRAY_SIZE} numbers, got {value.shape}; use save_arrays")
        return plain(name, storable(name, value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(float(value))}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ValueError(f"{name} must be numbers, strings, booleans, None, lists or small arrays of them, got {value!r}")


def storable(name: str, value: Any) -> np.ndarray:
    """Returns ``value`` as an array of a type that NumPy can store without pickle."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers, got {value!r}") from error
    if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.kind != "f":
        array = array.astype(np.float32)
    if array.dtype.kind not in "biufcU":
        raise ValueError(f"{name} must be an array of numbers, got dtype {array.dtype}")
    return array


def restored(item: dict[str, Any]) -> Any:
    """Object hook of ``json.loads`` that restores non-finite numbers."""
    return float(item["float"]) if item.keys() == {"float"} and isinstance(item["float"], str) else item


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes ``content`` as indented JSON, in one piece."""
    text = json.dumps(plain(path.stem, content), indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_npz(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes ``arrays`` as a compressed .npz archive."""
    # np.savez would take arrays named "file" or "allow_pickle" for its own arguments.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Lets ``write`` fill a temporary file that then takes the place of ``path``."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
