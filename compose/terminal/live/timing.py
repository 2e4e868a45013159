"""How long a phase will take, and values smoothed over its reports."""

from __future__ import annotations

from collections import deque

WINDOW = 50
"""Finished parts whose rate gives the time left: parts differ, so old ones count no more."""

LEAST_S = 1.0
"""Seconds between the first and the last of them before a time left is given."""

DECAY = 0.9
"""Weight of the past in a smoothed value, a report."""


class TimeLeft:
    """Seconds left of a phase, from the rate at which its last parts were finished.

    >>> left = TimeLeft()
    >>> left.update(10, 100, now=0.0), left.update(20, 100, now=5.0), left.update(20, 100, now=6.0)
    (None, 40.0, 39.0)
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=WINDOW)

    def update(self, done: int, total: int, now: float) -> float | None:
        """Seconds left when `done` of `total` are finished at time `now`; None while unknown.

        What was finished before the first report, in an earlier run, does not count as fast.
        """
        if not self._steps or done > self._steps[-1][1]:
            self._steps.append((now, done))
        (then, before), (last, _) = self._steps[0], self._steps[-1]
        if done <= before or last - then < LEAST_S:
            return None
        rate = (done - before) / (last - then)
        return max(0.0, (total - done) / rate - (now - last))


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
