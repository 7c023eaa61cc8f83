"""Contestants that take turns in one process, so that what slows the machine down slows all of them down."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


class Uncompiled:
    """A function without arguments to lower, such as another framework's, as ``take_turns`` takes it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def lower(self, *_: Any) -> "Uncompiled":
        return self

    def compile(self) -> "Uncompiled":
        return self

    def memory_analysis(self) -> None:
        return None

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def take_turns(
    programs: Mapping[str, tuple[Any, tuple[Any, ...]]],
    repeats: int,
    warm_up: float = 0.02,
    *,
    first_calls: int = 1,
    prepare: Callable[[], Any] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Returns first call, median time and memory of every program.

    Args:
      programs: by name, what ``jax.jit`` returns, and its arguments.
      repeats: timed calls of each.
      warm_up: seconds of calls that open each turn and are not timed: threads of the contestant before may still spin,
        and its own may have gone to sleep.
      first_calls: how often each is compiled, all in turn before any is timed.
      prepare: done before each first call, once nothing that is compiled is left.

    Returns:
      By name: ``first_call_s``, compilation included, the median; ``temporary_bytes`` beyond arguments and results, or
      None where the device does not say; ``median_ms``; ``times_ms``, one a turn.
    """
    results: dict[str, dict[str, Any]] = {name: {} for name in programs}
    times: dict[str, list[float]] = {name: [] for name in programs}
    compiled = {}
    first: dict[str, list[float]] = {name: [] for name in programs}
    for name, (program, arguments) in first_calls * tuple(programs.items()):
        jax.clear_caches()
        prepare()
        gc.collect()  # what others have left behind is not this one's to clean up
        start = time.perf_counter()
        compiled[name] = program.lower(*arguments).compile()
        jax.block_until_ready(compiled[name](*arguments))
        first[name].append(time.perf_counter() - start)
    for name, result in results.items():
        result["first_call_s"] = statistics.median(first[name])
        result["temporary_bytes"] = getattr(compiled[name].memory_analysis(), "temp_size_in_bytes", None)
    for _ in range(repeats):
        for name, (_, arguments) in programs.items():
            end = time.perf_counter() + warm_up
            while time.perf_counter() < end:
                jax.block_until_ready(compiled[name](*arguments))
            start = time.perf_counter()
            jax.block_until_ready(compiled[name](*arguments))
            times[name].append(time.perf_counter() - start)
    for name, result in results.items():
        result["median_ms"] = 1e3 * statistics.median(times[name])
        result["times_ms"] = [round(1e3 * value, 4) for value in times[name]]
    return results
