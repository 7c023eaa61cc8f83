"""The command line: flags from the fields of ``RunConfig``, and errors a user can act on."""

import contextlib
import dataclasses
import importlib.util
import inspect
import os
import re
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from rnnjax.configuration import CHOICES, RunConfig
from rnnjax.workdir import Workdir

INTERRUPTED = 130  # the exit status that shells give to what Ctrl-C ended: 128 + SIGINT

_DEFINERS = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}


def define_config_flags(*names: str, **defaults: Any) -> None:
    """Defines a flag for each field of ``RunConfig`` named, with the field's description as its help.

    Args:
      *names: fields of ``RunConfig``; all of them by default.
      **defaults: defaults that differ from the field's own.
    """
    descriptions, kinds = _descriptions(), typing.get_type_hints(RunConfig)
    for field in dataclasses.fields(RunConfig):
        if names and field.name not in names:
            continue
        default, text = defaults.get(field.name, field.default), descriptions[field.name]
        if field.name in CHOICES:
            flags.DEFINE_enum(field.name, default, CHOICES[field.name], text)
        else:
            kind, *_ = typing.get_args(kinds[field.name]) or (kinds[field.name],)  # int of int | None
            _DEFINERS[kind](field.name, default, text)


def define_workdir_flag(default: str) -> None:
    """Defines where results go."""
    flags.DEFINE_string("workdir", default, "directory for the results; must not exist yet, or be empty")


def define_workdir_flags(default: str) -> None:
    """Defines where results go, and whether TensorBoard gets them too."""
    define_workdir_flag(default)
    flags.DEFINE_boolean("tensorboard", False, "write the metrics for TensorBoard too")


def config_from_flags(**settings: Any) -> RunConfig:
    """Returns the configuration that the command line asks for, with ``settings`` on top."""
    names = [field.name for field in dataclasses.fields(RunConfig) if field.name in flags.FLAGS]
    given = {name: flags.FLAGS[name].value for name in names}
    return RunConfig(**{**given, **settings})


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns a ValueError about what the user asked for into one line and exit status 2."""
    try:
        yield
    except (ValueError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def check_packages(task: str, *, tensorboard: bool) -> None:
    """Raises ImportError if a package that this run will need at its end is not installed."""
    needed = ["matplotlib", *(["sklearn"] if task == "digits" else []), *(["tensorboardX"] if tensorboard else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} must be installed: pip install 'rnnjax[experiments]'")


def open_workdir(config: Any, **more: Any) -> Workdir:
    """Returns the new directory for the results, with the configuration in it; checks that figures can be drawn."""
    check_packages("", tensorboard=False)
    workdir = Workdir.create(flags.FLAGS.workdir)
    workdir.write_config(config, **more)
    return workdir


def define_integer_flags(config: type, descriptions: dict[str, str], full: dict[str, int]) -> None:
    """Defines flags for fields of a dataclass, their defaults those of the fields, and ``--full`` for larger ones."""
    for name, text in descriptions.items():
        flags.DEFINE_integer(name, getattr(config, name), text)
    define_full_flag(full)


def define_full_flag(full: dict[str, Any]) -> None:
    """Defines ``--full`` for larger settings; `larger_settings` reads it."""
    sizes = ", ".join(f"{name} {value}" for name, value in full.items())
    flags.DEFINE_boolean("full", False, f"a longer run: {sizes}, each unless given by its own flag")


def larger_settings(full: dict[str, Any]) -> dict[str, Any]:
    """Returns what ``--full`` sets, but for what the command line gives itself; nothing without it."""
    return {name: value for name, value in full.items() if flags.FLAGS.full and not flags.FLAGS[name].present}


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs ``main`` as absl does and exits with the status it returns; Ctrl-C, whenever it comes, is one line.

    An interrupted process ends without taking Python apart: XLA may still be compiling on a thread of its own, with
    objects that JAX frees when Python ends, and then ends in a segmentation fault.
    """

    def interruptible(argv: Sequence[str]) -> int | None:
        logging.set_verbosity(logging.WARNING)  # not what JAX logs of accelerators that are not there
        try:
            status = main(argv)
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            status = INTERRUPTED
        if status == INTERRUPTED:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()
            os._exit(INTERRUPTED)
        return status

    sys.unraisablehook = _interrupt_again
    app.run(interruptible)


def _interrupt_again(unraisable: Any) -> None:
    """Repeats a Ctrl-C that came where Python lets no exception through, such as in JAX's callback of its collector."""
    if unraisable.exc_type is KeyboardInterrupt:
        # Not at once: it would be raised in here, and lost again.
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


def measure_and_report(measure: Callable[[], None], report: Callable[[], None], workdir: Workdir) -> int:
    """Measures, then reports what is done, after Ctrl-C too; returns the exit status."""
    status = 0
    try:
        measure()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the report is of what is done\n")
        status = INTERRUPTED
    if any(workdir.path.glob("*.npz")):
        report()
    return status


def check_new_figure(name: str, path: str) -> None:
    """Raises ValueError unless ``path`` is that of a PNG file that can be made; ImportError without Matplotlib."""
    check_packages("", tensorboard=False)
    if not path.endswith(".png") or Path(path).exists() or not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{name} must be a new file ending in .png in a directory that is there, got {path!r}")
    try:
        Path(path).touch(exist_ok=False)
        Path(path).unlink()
    except OSError as error:
        raise ValueError(f"{name} must be a file that can be written, got {path!r} ({error.strerror})") from None


def _descriptions() -> dict[str, str]:
    """Returns what the docstring of ``RunConfig`` says of each field."""
    text = inspect.getdoc(RunConfig).split("Attributes:\n")[1]
    return {name: " ".join(words.split()) for name, words in re.findall(r"^  (\w+): (.+(?:\n    .+)*)", text, re.M)}


def no_arguments(argv: Sequence[str]) -> None:
    """Raises ValueError if the command line has words that are not flags, which absl would pass over."""
    if len(argv) > 1:
        raise ValueError(f"settings are given as --name=value, got {' '.join(argv[1:])!r}")


def positive_integer(name: str, value: int | str) -> int:
    """Returns the value of flag ``name`` as an integer of at least 1, or raises ValueError."""
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError(f"--{name} must be a positive integer, got {value!r}")
    return number
