"""The counts of a server as Prometheus reads them; of all replicas, whichever is asked."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from gateskip.serving.requests import Snapshot

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper ends, in seconds, of the histogram of times to the first token."""

COUNTERS: Mapping[str, str] = {
    "prompt_tokens": "Tokens of prompts",
    "reused_tokens": "Tokens of prompts whose keys and values came from an earlier request",
    "new_tokens": "Tokens of answers",
    "drafted": "Drafted tokens",
    "accepted": "Drafted tokens that were accepted",
    "looked_up": "Drafted tokens that look-up in the text proposed",
}
GAUGES: Mapping[str, str] = {
    "queued": "Answers that wait for a row",
    "rows": "Answers that are decoded now",
    "skipped": "Share of the branches' multiply-adds that requests with a budget skipped",
    "cache_bytes": "Memory of the KV cache",
    "cached_tokens": "Tokens in the KV cache",
}
NAMES = {
    "queued": "queued_requests",
    "rows": "running_requests",
    "new_tokens": "generated_tokens",
    "drafted": "drafted_tokens",
    "accepted": "accepted_tokens",
    "looked_up": "looked_up_tokens",
    "skipped": "skipped_share",
}
Counts = dict[str, Any]


class Metrics:
    """The counts of one process; `folder` has those of all replicas, one file each."""

    def __init__(self, replica: int | str = 0, folder: Path | None = None) -> None:
        self._replica, self._folder = str(replica), folder
        self._statuses: Counter[str] = Counter()
        self._first = [0] * (len(BUCKETS) + 1)
        self._first_sum = 0.0

    @property
    def shared(self) -> bool:
        """Whether there are other replicas."""
        return self._folder is not None

    def count_status(self, status: int) -> None:
        """Count a response."""
        self._statuses[str(status)] += 1

    def counts(self, snapshot: Snapshot) -> Counts:
        """The state now. Each snapshot may be given once: it has the times since the last one."""
        for seconds in snapshot.first_token_s:
            self._first[bisect_left(BUCKETS, seconds)] += 1
            self._first_sum += seconds
        values = {name: getattr(snapshot, name) for name in (*COUNTERS, *GAUGES)}
        return values | {
            "requests": dict(snapshot.requests),
            "statuses": dict(self._statuses),
            "first": self._first,
            "first_sum": self._first_sum,
        }

    def share(self, snapshot: Snapshot) -> None:
        """Write the counts where the other replicas read them."""
        if self._folder is not None:
            new = self._folder / f"{self._replica}.new"
            new.write_text(json.dumps(self.counts(snapshot)), "utf-8")
            new.replace(new.with_suffix(".json"))

    def text(self, snapshot: Snapshot) -> tuple[bytes, str]:
        """The counts, and their content type."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector({**self.others(), self._replica: self.counts(snapshot)}))
        return generate_latest(registry), CONTENT_TYPE_LATEST

    def others(self) -> dict[str, Counts]:
        """What replicas have shared, by replica."""
        files = sorted(self._folder.glob("*.json")) if self._folder is not None else ()
        return {file.stem: json.loads(file.read_text("utf-8")) for file in files}


class _Collector:
    """The metrics of some replicas."""

    def __init__(self, replicas: Mapping[str, Counts]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        """Each metric, with the replica as its label."""
        for name, text in COUNTERS.items():
            family = CounterMetricFamily(_name(name), text, labels=["replica"])
            yield self._filled(family, name)
        for name, text in GAUGES.items():
            yield self._filled(GaugeMetricFamily(_name(name), text, labels=["replica"]), name)
        yield self._by("requests", "reason", "Answers that ended, by the reason")
        yield self._by("statuses", "status", "HTTP responses by status; 499: the client left")
        yield self._first_tokens()

    def _filled(self, family: CounterMetricFamily | GaugeMetricFamily, name: str) -> Metric:
        for replica, counts in self._replicas.items():
            if counts[name] is not None:
                family.add_metric([replica], counts[name])
        return family

    def _by(self, name: str, label: str, text: str) -> Metric:
        shown = "http_responses" if name == "statuses" else name
        family = CounterMetricFamily(_name(shown), text, labels=["replica", label])
        for replica, counts in self._replicas.items():
            for value, count in counts[name].items():
                family.add_metric([replica, value], count)
        return family

    def _first_tokens(self) -> Metric:
        text = "Seconds from a request to its first token"
        family = HistogramMetricFamily(_name("first_token_seconds"), text, labels=["replica"])
        for replica, counts in self._replicas.items():
            total, buckets = 0, []
            for end, count in zip((*map(str, BUCKETS), "+Inf"), counts["first"], strict=True):
                total += count
                buckets.append((end, total))
            family.add_metric([replica], buckets, counts["first_sum"])
        return family


def _name(name: str) -> str:
    return f"gateskip_{NAMES.get(name, name)}"
