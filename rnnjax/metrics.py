"""Metrics of a run, one JSON object a line, readable while the run goes on and after a crash."""

import json
import os
import time
from pathlib import Path
from typing import Any

from rnnjax import validation
from rnnjax.serialization import plain, restored, scalar
from rnnjax.workdir import WorkdirError


class MetricsWriter:
    """Appends to metrics.jsonl, each line on disk as soon as it is written; a context manager.

    Example:
      >>> import tempfile
      >>> directory = Path(tempfile.mkdtemp())
      >>> with MetricsWriter(directory) as metrics:
      ...     metrics.write(0, seconds=0.5, loss=0.25)
      >>> read_metrics(directory / "metrics.jsonl")
      [{'step': 0, 'seconds': 0.5, 'loss': 0.25}]

    Args:
      path: an existing directory without a metrics.jsonl.
      tensorboard: write the scalars for TensorBoard too, in ``path``/tensorboard.

    Raises:
      WorkdirError: there is a metrics.jsonl already, or no such directory.
      ImportError: ``tensorboard`` without tensorboardX.
    """

    def __init__(self, path: str | os.PathLike[str], *, tensorboard: bool = False) -> None:
        # The import comes first: where it fails, no empty metrics.jsonl is left behind.
        summary_writer = _summary_writer_type() if tensorboard else None
        try:
            self._file = (Path(path) / "metrics.jsonl").open("x", encoding="utf-8")
        except OSError as error:
            raise WorkdirError(f"path must be a directory without metrics.jsonl, got {path!s}: {error}") from error
        self._summary = summary_writer(str(Path(path) / "tensorboard")) if summary_writer else None
        self._start = time.monotonic()

    def write(self, step: int, **metrics: Any) -> None:
        """Writes one line: ``step``, ``seconds`` since the start unless given, then ``metrics``.

        Args:
          step: a non-negative integer.
          **metrics: numbers, strings, booleans, None, arrays of at most `MAX_ARRAY_SIZE` numbers, or lists of these.

        Raises:
          ValueError: a value of another kind or size, by its name; nothing is written then.
        """
        step = validation.non_negative_integer("step", scalar(step))
        seconds = round(time.monotonic() - self._start, 3)
        row = plain("metrics", {"step": step, "seconds": seconds, **metrics})
        if self._file.closed:
            raise WorkdirError(f"metrics must be written before close(), got step {step}")
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._summary is not None:
            for name, value in metrics.items():
                if isinstance(number := scalar(value), int | float) and not isinstance(number, bool):
                    self._summary.add_scalar(name, number, step)

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        self._file.close()
        if self._summary is not None:
            self._summary.close()
            self._summary = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl, non-finite numbers restored as floats.

    A last line without its line end, which a killed run may leave, is left out.

    Raises:
      WorkdirError: a line in between is not JSON, by its number.
    """
    rows = []
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                break
            try:
                rows.append(json.loads(line, object_hook=restored))
            except json.JSONDecodeError as error:
                raise WorkdirError(f"path must hold JSON lines, got {path!s} line {number}: {error}") from error
    return rows


def _summary_writer_type() -> Any:
    try:
        import tensorboardX
    except ImportError as error:
        raise ImportError("tensorboard=True needs tensorboardX; install rnnjax with its extra [experiments]") from error
    return tensorboardX.SummaryWriter
