"""A progress bar for training, with the time left."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """A bar on standard error: steps done, time left, loss and gradient norm; silent where there is no terminal.

    Args:
      label: what is trained.
      steps: number of training steps.

    Example:
      >>> with TrainingProgress("LSTM", steps=2) as progress:
      ...     progress.update(0, {"loss": 0.5, "gradient_norm": 1.0})
    """

    def __init__(self, label: str, steps: int) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=steps, numbers="compiling")

    def update(self, step: int, metrics: dict[str, Any]) -> None:
        """Shows that training step ``step`` is done, and its metrics."""
        numbers = f"loss {metrics['loss']:.3f}  |gradient| {metrics['gradient_norm']:.2e}"
        self._bar.update(self._task, completed=step + 1, numbers=numbers)

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
