"""What a run's time went into."""

import dataclasses
import statistics


@dataclasses.dataclass
class Timing:
    """Seconds that training and monitoring took.

    Attributes:
      plain: duration of each step without a measurement.
      monitored: duration of each step with one, the measurement included.
    """

    plain: list[float] = dataclasses.field(default_factory=list)
    monitored: list[float] = dataclasses.field(default_factory=list)

    def monitor_overhead(self) -> float:
        """Returns the time that monitoring added, compilation left out, as a share of the training time without it.

        Steps without a measurement set what a step costs. The first of each kind is left out: it is compilation, see
        ``compile_seconds``. NaN where there are too few steps to tell.
        """
        if len(self.plain) < 2 or len(self.monitored) < 2:
            return float("nan")
        step = statistics.median(self.plain[1:])
        added = statistics.median(self.monitored[1:]) - step
        return len(self.monitored) * added / (step * (len(self.plain) + len(self.monitored)))

    def compile_seconds(self) -> float:
        """Returns how much longer the first step of each kind took than later ones, both kinds together."""
        return sum(times[0] - statistics.median(times[1:]) for times in (self.plain, self.monitored) if len(times) > 1)
