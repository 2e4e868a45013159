"""The target of a search: bounds on metrics of a cell, and the metric to optimize within them.

Metrics are named as in `compose.analysis.metrics`. A cell that was measured on a few tokens has
wide intervals. Against a bound, an interval has one of three standings: all of it meets the bound,
all of it misses the bound, or it is open. Only a cell that misses a bound is dropped for it. The
last rung picks by `compose.analysis.pick`, which compares the worse end of each interval with the
bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from compose.analysis.metrics import METRICS
from compose.analysis.pick import pick
from compose.errors import UserError
from compose.numbers import metric_text
from compose.results.schema import CellResult, Results
from compose.search.probes import Probe

Standing = Literal["met", "open", "missed"]
"""Where a measured interval lies: within a bound, on it, or beyond it."""

AIMS: dict[str, str] = {
    "decode": "decode-ratio",
    "prefill": "prefill-ratio",
    "size": "size",
    "kl": "kl",
    "perplexity": "perplexity",
}
"""Aim -> the metric by which probes are ranked. For speeds it is the ratio to the baseline in the
same rounds, since probes are timed at different times."""

MAXIMIZED, MINIMIZED = ("decode", "prefill"), ("size", "kl", "perplexity")


@dataclass(frozen=True)
class Bound:
    """A limit of one metric."""

    metric: str
    limit: float
    option: str
    """The command's option that sets it."""
    pick: str
    """The keyword argument of `compose.analysis.pick.pick`."""

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return METRICS[self.metric].better == "higher"

    def standing(self, probe: Probe) -> Standing:
        """Where the interval of a probe lies; `open` where the number has none."""
        ends = probe.intervals.get(self.metric)
        if ends is None:
            return "open"
        low, high = ends
        unlucky, lucky = (low, high) if self.at_least else (high, low)
        if self._within(unlucky):
            return "met"
        return "open" if self._within(lucky) else "missed"

    def _within(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def shortfall(self, value: float | None) -> float:
        """How far a number is beyond the limit, as a share of it; a number that is missing counts
        as far."""
        if value is None:
            return 1e3
        missing = self.limit - value if self.at_least else value - self.limit
        return max(0.0, missing / abs(self.limit) if self.limit else missing)

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{METRICS[self.metric].title} {sign} {metric_text(self.metric, self.limit)}"


BOUNDS: dict[str, tuple[str, str]] = {
    "at_most_kl": ("kl", "max_kl"),
    "at_most_perplexity_ratio": ("perplexity-ratio", "max_perplexity_ratio"),
    "at_most_mb": ("size", "max_bytes"),
    "min_retained": ("retained", "min_retained"),
}
"""Name of a bound -> its metric, and the keyword argument of `pick`."""


@dataclass(frozen=True)
class Target:
    """Bounds, at least one, and an aim."""

    bounds: tuple[Bound, ...]
    aim: str
    """A key of `AIMS`."""

    @property
    def metric(self) -> str:
        """The metric by which probes are ranked."""
        return AIMS[self.aim]

    @property
    def needs_text(self) -> bool:
        """Whether a text has to be scored."""
        named = {self.metric, *(bound.metric for bound in self.bounds)}
        return bool(named & {"kl", "perplexity", "perplexity-ratio"})

    def bounds_of(self, metric: str) -> tuple[Bound, ...]:
        """The bounds on a metric."""
        return tuple(bound for bound in self.bounds if bound.metric == metric)

    def standing(self, probe: Probe) -> Standing:
        """The worst standing over all bounds; speculation that changes tokens misses."""
        standings = {bound.standing(probe) for bound in self.bounds}
        if probe.lossless is False or "missed" in standings:
            return "missed"
        return "open" if "open" in standings else "met"

    def why_missed(self, probe: Probe) -> str:
        """The bounds that a probe misses, in words."""
        if probe.lossless is False:
            return "its speculation changes tokens"
        missed = [bound for bound in self.bounds if bound.standing(probe) == "missed"]
        return " and ".join(f"{probe.shown(bound.metric)} misses {bound}" for bound in missed)

    def shortfall(self, probe: Probe) -> float:
        """How far the estimates miss the bounds, all together."""
        lossy = 1.0 if probe.lossless is False else 0.0
        return lossy + sum(
            bound.shortfall(probe.numbers.get(bound.metric)) for bound in self.bounds
        )

    def rank(self, probe: Probe) -> float:
        """The aim's number as one that is better when it is higher; the lowest where missing."""
        value = probe.numbers.get(self.metric)
        return float("-inf") if value is None else METRICS[self.metric].rank(value)

    def pick(self, results: Results) -> CellResult:
        """The best measured cell within the bounds. Raises as `compose.analysis.pick.pick`."""
        limits: dict[str, Any] = {bound.pick: bound.limit for bound in self.bounds}
        return pick(results, **limits, maximize=self.aim)

    def __str__(self) -> str:
        verb = "maximize" if self.aim in MAXIMIZED else "minimize"
        return f"{' and '.join(map(str, self.bounds))}; {verb} {self.aim}"

    def to_json(self) -> dict[str, Any]:
        """The target for scripts: metric -> limit, and the aim."""
        return {"bounds": {bound.metric: bound.limit for bound in self.bounds}, "aim": self.aim}


def make_target(
    *, maximize: str | None = None, minimize: str | None = None, **limits: float | None
) -> Target:
    """A target from a command's options; `limits` are named as in `BOUNDS`, megabytes as such.
    `minimize` also takes `size_mb`, the old name of `size`.

    Raises:
        UserError: no bound, no aim or two of them, or an unknown aim.
    """
    bounds = []
    for name, (metric, argument) in BOUNDS.items():
        limit = limits.pop(name, None)
        if limit is not None:
            value = limit * 1e6 if metric == "size" else limit
            bounds.append(Bound(metric, value, "--" + name.replace("_", "-"), argument))
    assert not limits, f"bounds that there are not: {list(limits)}"
    if not bounds:
        options = ", ".join("--" + name.replace("_", "-") for name in BOUNDS)
        raise UserError("a target needs a bound", fix=f"pass one or several of {options}")
    if (maximize is None) == (minimize is None):
        raise UserError(
            "a target needs one aim",
            fix=f"pass --maximize {' or '.join(MAXIMIZED)}, or --minimize {' or '.join(MINIMIZED)}",
        )
    minimize = "size" if minimize == "size_mb" else minimize
    aim = maximize or minimize or ""
    able, verb = (MINIMIZED, "minimize") if maximize is None else (MAXIMIZED, "maximize")
    if aim not in able:
        raise UserError(f"cannot {verb} {aim!r}", fix=f"known: {', '.join(able)}")
    return Target(tuple(bounds), aim)
