"""The directory of one run: what ran, on what, and its results.

config.json and environment.json say what ran; arrays are .npz files, tables aligned text beside CSV; `MetricsWriter`
adds metrics.jsonl.
"""

import csv
import dataclasses
import datetime
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rnnjax.serialization import format_table, scalar, storable, table_columns, write_atomically, write_json, write_npz

_PACKAGES = ("rnnjax", "jax", "jaxlib", "flax", "optax", "numpy")


class WorkdirError(ValueError):
    """A directory or file that results cannot be written to or read from."""


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Results of one run under ``path``. `create` starts a run; ``Workdir(path)`` opens an existing one to read.

    Example:
      >>> import tempfile
      >>> workdir = Workdir.create(Path(tempfile.mkdtemp()) / "run")
      >>> workdir.write_config({"hidden_size": 64})
      >>> workdir.save_arrays("losses", loss=np.array([0.5, 0.25]))
      >>> workdir.load_arrays("losses")["loss"].tolist()
      [0.5, 0.25]
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).expanduser())

    @classmethod
    def create(cls, path: str | os.PathLike[str], *, overwrite: bool = False) -> "Workdir":
        """Makes the directory, parents too, and writes environment.json; call it before any work is done.

        Args:
          path: a directory that does not exist yet or is empty; ``~`` is the home directory.
          overwrite: delete the results of an earlier run in ``path``. Only a directory that holds an environment.json
            counts as one, so that a mistyped path loses nothing.

        Raises:
          WorkdirError: ``path`` holds files already, is a file, or cannot be written to.
        """
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise WorkdirError(f"workdir must be the path of a directory, got {path!r}")
        workdir = cls(Path(path))
        try:
            _make_empty_directory(workdir.path, overwrite)
            write_json(workdir.path / "environment.json", _environment())
        except OSError as error:
            raise WorkdirError(f"workdir must be a directory that can be written to, got {path!s}: {error}") from error
        return workdir

    def write_config(self, config: Any, **extra: Any) -> None:
        """Writes config.json: the fields of ``config``, a dataclass or a mapping, and whatever else is given."""
        if isinstance(config, Mapping):
            fields = dict(config)
        elif dataclasses.is_dataclass(config) and not isinstance(config, type):
            fields = dataclasses.asdict(config)
        else:
            raise ValueError(f"config must be a dataclass instance or a mapping, got {config!r}")
        write_json(self.path / "config.json", {**fields, **extra})

    def save_arrays(self, name: str, /, **arrays: Any) -> None:
        """Writes ``arrays`` to ``name``.npz in one piece: a reader sees the earlier file or this one, never half.

        Types that NumPy lacks, such as bfloat16, are stored as float32, which holds their values exactly.
        """
        converted = {key: storable(key, value) for key, value in arrays.items()}
        write_atomically(self._file(name, ".npz"), lambda file: write_npz(file, converted))

    def load_arrays(self, name: str) -> dict[str, np.ndarray]:
        """Returns the arrays that `save_arrays` wrote under ``name``."""
        path = self._file(name, ".npz")
        if not path.is_file():
            saved = ", ".join(sorted(file.stem for file in self.path.glob("*.npz"))) or "none"
            raise WorkdirError(f"name must be that of saved arrays ({saved}), got {name!r}")
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)

    def write_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> str:
        """Writes ``rows`` to ``name``.txt, aligned and rounded, and ``name``.csv, in full; returns the text."""
        text = format_table(rows)
        with self._file(name, ".csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, table_columns(rows), restval="")
            writer.writeheader()
            writer.writerows({key: scalar(value) for key, value in row.items()} for row in rows)
        self._file(name, ".txt").write_text(text + "\n", encoding="utf-8")
        return text

    def _file(self, name: str, suffix: str) -> Path:
        if not isinstance(name, str) or not name or Path(name).name != name or name.startswith("."):
            raise WorkdirError(f"name must be a file name without directory or leading dot, got {name!r}")
        return self.path / (name + suffix)


def _make_empty_directory(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise WorkdirError(f"workdir must be a directory, got the file {path}")
    path.mkdir(parents=True, exist_ok=True)
    entries = sorted(path.iterdir())
    if not entries:
        return
    if not overwrite:
        raise WorkdirError(f"workdir must be empty or not exist yet, got {path}, which holds {entries[0].name}")
    if not (path / "environment.json").is_file():
        raise WorkdirError(f"workdir must hold an earlier run to be overwritten, got {path} without environment.json")
    for entry in entries:
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _environment() -> dict[str, Any]:
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "operating_system": platform.platform(),
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "cpu_count": os.cpu_count(),
        "git_commit": _git_commit(),
        "command_line": shlex.join(sys.orig_argv),
        "start_time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Returns the commit checked out in the current directory, ``+dirty`` where tracked files differ from it."""
    try:
        commit = _git("rev-parse", "--verify", "HEAD")
        return commit + ("+dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
