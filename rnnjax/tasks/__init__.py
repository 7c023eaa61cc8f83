"""Problems whose answer depends on inputs long past."""

import dataclasses
from typing import Any

from rnnjax import validation
from rnnjax.tasks.adding import AddingTask
from rnnjax.tasks.base import EVALUATION_SIZE, Batch, Task
from rnnjax.tasks.copy_memory import CopyTask
from rnnjax.tasks.digits import DigitsTask
from rnnjax.tasks.language_recall import LanguageRecallTask
from rnnjax.tasks.temporal_order import TemporalOrderTask

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (AddingTask, CopyTask, TemporalOrderTask, LanguageRecallTask, DigitsTask)
}
"""Every task by its name."""


def make_task(name: str, **settings: Any) -> Task:
    """Makes the task called ``name``.

    Args:
      name: A key of ``TASKS``.
      **settings: Fields of that task's class; those not given keep their defaults.

    Returns:
      The task.

    Raises:
      ValueError: The task or a setting is unknown, or a setting has a value that the task does not allow.

    Example:
      >>> make_task("copy", delay=200).sequence_length
      220
    """
    task_class = TASKS[validation.one_of("task", name, list(TASKS))]
    allowed = [field.name for field in dataclasses.fields(task_class)]
    for setting in settings:
        if not allowed:
            raise ValueError(f"task {name!r} takes no settings, got {setting!r}")
        validation.one_of(f"setting of task {name!r}", setting, allowed)
    return task_class(**settings)


__all__ = [
    "EVALUATION_SIZE",
    "TASKS",
    "AddingTask",
    "Batch",
    "CopyTask",
    "DigitsTask",
    "LanguageRecallTask",
    "Task",
    "TemporalOrderTask",
    "make_task",
]
