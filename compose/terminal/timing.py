"""How long a phase will take, and values smoothed over its reports."""

from __future__ import annotations

from collections import deque

WINDOW = 50
"""Reports whose rate gives the time left: parts of a phase differ, so old ones count no more."""

LEAST_S = 1.0
"""Seconds of reports before a time left is given."""

DECAY = 0.9
"""Weight of the past in a smoothed value, a report."""


class TimeLeft:
    """Seconds left of a phase, from the rate of its last reports.

    >>> left = TimeLeft()
    >>> left.update(10, 100, now=0.0), left.update(20, 100, now=5.0)
    (None, 40.0)
    """

    def __init__(self) -> None:
        self._reports: deque[tuple[float, int]] = deque(maxlen=WINDOW)

    def update(self, done: int, total: int, now: float) -> float | None:
        """Seconds left when `done` of `total` are finished at time `now`; None while unknown.

        What was finished before the first report, in an earlier run, does not count as fast.
        """
        self._reports.append((now, done))
        then, before = self._reports[0]
        if done <= before or now - then < LEAST_S:
            return None
        return max(0.0, (total - done) * (now - then) / (done - before))


class Smoothed:
    """An exponential average without the bias of its start.

    >>> mean = Smoothed()
    >>> mean.update(4.0), round(mean.update(2.0), 3)
    (4.0, 2.947)
    """

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def update(self, value: float) -> float:
        """The average with one more value."""
        self._sum = DECAY * self._sum + (1 - DECAY) * value
        self._weight = DECAY * self._weight + (1 - DECAY)
        return self._sum / self._weight
