"""Tables of a report, as values: HTML and Markdown write the same ones.

A number that was not measured is an en dash. A column that no cell has is left out and named.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from compose.results.metrics import METRICS, gain, over_seeds, retained_basis, task_retained
from compose.results.parts import Divergence, SpeedNumbers, TaskScore
from reports.load import KEEPS, Report, Row

DASH = "–"
THIN = "\u202f"
TIMES = "×"

Tone = Literal["good", "fair", "poor"]

SIGNS: dict[Tone, str] = {"good": "●", "fair": "◐", "poor": "○"}
"""A tone's shape: what it says must not hang on its colour."""

STEPS: dict[str, tuple[float, float]] = {
    "retained": (KEEPS, 0.80),
    "perplexity-ratio": (1.05, 1.25),
}
"""Where a metric stops being good, and where it starts being poor."""


@dataclass(frozen=True)
class Entry:
    """One place in a table: text, a smaller note, what it sorts by, its bar (0 to 1), its tone."""

    text: str = DASH
    note: str = ""
    sort: float | None = None
    bar: float | None = None
    tone: Tone | None = None

    @property
    def is_absent(self) -> bool:
        """Whether nothing was measured here."""
        return self.text == DASH


@dataclass(frozen=True)
class Column:
    """A column: what it is called, how it is read, and how an entry of it is made."""

    head: str
    unit: str
    help: str
    make: Callable[[Report, Row], Entry]


@dataclass(frozen=True)
class Table:
    """Rows of entries under columns. `absent` names the columns of which nothing was measured."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Row, tuple[Entry, ...]], ...]
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Histogram:
    """How often speculation drafted how many tokens; shares are of the most frequent length."""

    bars: tuple[tuple[int, int, float], ...] = field(default=())


def overview(report: Report) -> Table:
    """Every measured cell with the numbers that decide."""
    return _table(
        report,
        report.rows,
        [
            _metric(
                "size", "Size", "MB", "Weight files on disk.", megabytes, show_gain=True, bar=True
            ),
            _metric("decode", "Decode", "tok/s", _DECODE, number, show_gain=True, bar=True),
            _metric("prefill", "Prefill", "tok/s", _PREFILL, number, show_gain=True),
            _metric("saved", "Saved", "net, %", _SAVED, share),
            _metric("perplexity-ratio", "Perplexity", TIMES + " dense", _RATIO, ratio),
            _metric("kl", "KL", "nats", _KL, number),
            _metric("agreement", "Agree", "%", _AGREE, share),
            *(_task_score(report, task, detail=False) for task in report.tasks),
            _metric("retained", "Keeps", "%", retained_help(report), share, bar="unit"),
            Column("Accepted", "%", _ACCEPTED + " Below it: " + _MEAN.lower(), _accepted),
            Column("Lossless", "", _LOSSLESS, _lossless),
        ],
    )


def quality(report: Report) -> Table:
    """Perplexity and every task with its interval."""
    measured = tuple(row for row in report.rows if report.results.quality(row.cell) is not None)
    tasks = [(_task_score(report, t, detail=True), _task_kept(t)) for t in report.tasks]
    return _table(
        report,
        measured,
        [
            Column("Perplexity", _dataset(report), "Smaller is better.", _perplexity),
            _metric("perplexity-ratio", "Perplexity", TIMES + " dense", _RATIO, ratio),
            _metric("kl", "KL", "nats", _KL, number),
            _metric("agreement", "Agree", "%", _AGREE, share),
            Column("Rounding", "KL", _ROUNDING, _rounding),
            *(column for pair in tasks for column in pair),
            _metric("accuracy", "Tasks", "mean, %", "Unweighted mean of the scores.", share),
            _metric("retained", "Keeps", "%", retained_help(report), share),
        ],
    )


def seeds(report: Report) -> Table:
    """Means over seeds of what was made with several, and the half width of their interval."""
    rows = tuple(row for row in report.rows if row.cell.seeds)
    shown = [
        ("saved", "Saved", "net, %", _SAVED, share),
        ("perplexity-ratio", "Perplexity", TIMES + " dense", _RATIO, ratio),
        ("kl", "KL", "nats", _KL, number),
        ("agreement", "Agree", "%", _AGREE, share),
        ("accuracy", "Tasks", "mean, %", "Unweighted mean of the scores.", share),
        ("retained", "Keeps", "%", retained_help(report), share),
    ]
    count = Column("Seeds", "", "How many made the cell.", _seed_count)
    columns = [
        Column(head, unit, help, _over_seeds(name, show)) for name, head, unit, help, show in shown
    ]
    return _table(report, rows, [count, *columns])


def _seed_count(report: Report, row: Row) -> Entry:
    number = 1 + len(row.cell.seeds or ())
    return Entry(str(number), "", number)


def _over_seeds(name: str, show: Callable[[float], str]) -> Callable[[Report, Row], Entry]:
    def make(report: Report, row: Row) -> Entry:
        values = over_seeds(report.results, name, row.cell)
        if len(values) < 2:
            return Entry()
        mean = statistics.fmean(values)
        return Entry(show(mean), f"± {show(half_width(values))}", mean, tone=tone(name, mean))

    return make


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the values' mean, by Student's t."""
    from scipy.stats import t

    error = statistics.stdev(values) / math.sqrt(len(values))
    return float(t.ppf(0.975, len(values) - 1)) * error


def speed(report: Report) -> Table:
    """Speed with its spread, other batch sizes, and memory."""
    return _table(
        report,
        report.rows,
        [
            Column("Decode", "tok/s", _DECODE, _spread("decode_tokens_per_s", number)),
            Column("Prefill", "tok/s", _PREFILL, _spread("prefill_tokens_per_s", number)),
            Column("First token", "ms", "From prompt to first token.", _spread("ttft_s", millis)),
            *(c for batch in report.batches for c in _batch_columns(batch)),
            _metric("resident", "In memory", "MB", "The loaded model.", megabytes),
            _metric("peak", "Peak", "MB", "Most memory of the cell's process.", megabytes),
            _metric("saved-gross", "Saved", "gross, %", "Gates left out of the count.", share),
            _metric("saved", "Saved", "net, %", _SAVED, share),
            Column("Saved", "model, %", "Net, the LM head counted too.", _saved_model),
        ],
    )


def overlap(report: Report) -> list[tuple[str, int, int]]:
    """Scored texts and tasks: rows, and how many of them stand in a text that stages learn from."""
    baseline = report.results.find(report.results.baseline)
    found = None if baseline is None or baseline.quality is None else baseline.quality.overlap
    return [(name, each.rows, each.tainted) for name, each in (found or {}).items()]


def insight(report: Report) -> list[tuple[Row, list[tuple[str, int, float]]]]:
    """For every cell that skips: kinds of tokens, how many were seen, their share of compute."""
    return [
        (row, [(kind, use.tokens, use.compute) for kind, use in row.cell.insight.kinds.items()])
        for row in report.rows
        if row.cell.insight is not None
    ]


def speculation(report: Report) -> Table:
    """What each speculative cell did."""
    rows = tuple(row for row in report.rows if row.cell.speculation is not None)
    return _table(
        report,
        rows,
        [
            _metric("acceptance", "Accepted", "%", _ACCEPTED, share, bar="unit"),
            _metric("accepted", "Mean", "tokens/pass", _MEAN, number),
            Column("Speed-up", "over plain", "Over the same weights, decoded plainly.", _speedup),
            Column("Draft length", "most often", "Tokens drafted before a check.", _usual_draft),
            Column(
                "Drafting", "% of time", "Where decoding's time goes; the rest verifies.", _drafting
            ),
            *_positions(rows),
            Column("Lossless", "", _LOSSLESS, _diverged),
        ],
    )


def _positions(rows: tuple[Row, ...]) -> list[Column]:
    """Acceptance at the first places of a draft, where any cell recorded it."""

    def rates(row: Row) -> tuple[float, ...]:
        found = row.cell.speculation
        return (found.acceptance_by_position or ()) if found is not None else ()

    def at(place: int) -> Callable[[Report, Row], Entry]:
        def make(report: Report, row: Row) -> Entry:
            own = rates(row)
            return Entry(share(own[place]), sort=own[place]) if place < len(own) else Entry()

        return make

    longest = max((len(rates(row)) for row in rows), default=0)
    return [
        Column(f"{place + 1}.", "%", _AT_POSITION, at(place))
        for place in range(min(longest, SHOWN_POSITIONS))
    ]


def histogram(row: Row) -> Histogram:
    """The draft lengths of a speculative cell, shortest first, without gaps."""
    lengths = row.cell.speculation.draft_length_histogram if row.cell.speculation else None
    if not lengths or not any(lengths.values()):
        return Histogram()
    most = max(lengths.values())
    rounds = [(n, lengths.get(n, 0)) for n in range(min(lengths), max(lengths) + 1)]
    return Histogram(tuple((n, times, times / most) for n, times in rounds))


def environment(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text of what is known of the machine, in reading order; unknown keys last."""
    labels = {
        "processor": "Processor",
        "accelerator": "Accelerator",
        "cores": "Cores",
        "threads": "Threads",
        "memory_bytes": "Memory",
        "cpu_features": "Instructions",
        "platform": "Platform",
        "python": "Python",
        "git_commit": "Commit",
        "date": "Date",
        "versions": "Libraries",
    }
    order = [*(key for key in labels if key in values), *(k for k in values if k not in labels)]
    return [(labels.get(key, key), _plain_text(key, values[key])) for key in order]


# --- numbers as text -----------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits that count, thousands set apart: 0.034, 1.62, 23.4, 412, 12 400."""
    size = abs(value)
    if size >= 1e7:
        return f"{value:.1e}"
    if size >= 1000:
        step = 10 ** (len(str(int(size))) - 3)
        return f"{round(value / step) * step:,.0f}".replace(",", THIN)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{digits}f}"


def count(value: int) -> str:
    """A whole number, thousands set apart."""
    return f"{value:,}".replace(",", THIN)


def ratio(value: float) -> str:
    """A ratio near 1 to three places, a far one like any number."""
    return f"{value:.3f}" if value < 10 else number(value)


def percent(value: float) -> str:
    """A share as a percentage with one place."""
    return f"{100 * value:.1f}{THIN}%"


def share(value: float) -> str:
    """A share in percent with one place, without the sign."""
    return f"{100 * value:.1f}"


def megabytes(value: float) -> str:
    """Bytes in units of 10^6, without the unit."""
    return number(value / 1e6) if value < 1e8 else f"{value / 1e6:,.0f}".replace(",", THIN)


def size_text(value: float) -> str:
    """Bytes with their unit: 88 MB, 1.24 GB."""
    return f"{number(value / 1e9)}{THIN}GB" if value >= 1e9 else f"{megabytes(value)}{THIN}MB"


def millis(value: float) -> str:
    """Seconds in milliseconds, without the unit."""
    return number(value * 1000)


def times(value: float) -> str:
    """A factor: ×1.62."""
    return f"{TIMES}{value:.2f}" if value < 10 else f"{TIMES}{number(value)}"


def duration(seconds: float) -> str:
    """Seconds in words: 42 s, 12 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f}{THIN}s"
    hours, rest = divmod(minutes, 60)
    return f"{hours}{THIN}h {rest:02d}{THIN}min" if hours else f"{minutes}{THIN}min"


def divergence(found: Divergence) -> str:
    """Where speculation left plain decoding, in words."""
    parts = [
        None if found.prompt is None else f"prompt {found.prompt}",
        None if found.position is None else f"token {found.position}",
        None if found.margin is None else f"margin {found.margin:.2g}",
        None if found.margin_share is None else f"{found.margin_share:.1e} of the range",
    ]
    return ", ".join(part for part in parts if part) or "place not recorded"


# --- columns -------------------------------------------------------------------------------------

_AT_POSITION = "Accepted at this place of a draft, where all before it was."
SHOWN_POSITIONS = 4
_DECODE = "New tokens a second at batch 1, median of the repeats; beside it, over the dense model."
_PREFILL = "Prompt tokens read a second at batch 1; beside it, over the dense model."
_SAVED = (
    "Multiply-adds of the dense model's layers not computed: cut off, or skipped with gates,"
    " shortcuts and kept keys/values paid for."
)
_RATIO = "Perplexity over the dense model's; 1 is no loss."
_KL = "Mean KL divergence from the dense model, a token."
_AGREE = "Positions where the dense model puts the same token first."
_ROUNDING = "Mean KL, a token, of decoding with activations rounded to 8 bits to scoring without."
_ACCEPTED = "Drafted tokens that the whole model confirmed."
_MEAN = "Tokens gained by one pass of the whole model; plain decoding has 1."
_LOSSLESS = "Whether speculative greedy decoding gave plain decoding's tokens, every one."


def retained_help(report: Report) -> str:
    """What the share retained is a share of, in this run."""
    if retained_basis(report.results) == "tasks":
        return "Task scores over the dense model's, mean over the tasks."
    return "The dense model's perplexity over the cell's: no tasks were asked in this run."


def _table(report: Report, rows: tuple[Row, ...], columns: list[Column]) -> Table:
    made = [[column.make(report, row) for column in columns] for row in rows]
    alive = [i for i in range(len(columns)) if any(not entries[i].is_absent for entries in made)]
    lost = [columns[i] for i in range(len(columns)) if i not in alive] if rows else []
    names = dict.fromkeys(f"{c.head} ({c.unit})" if c.unit else c.head for c in lost)
    return Table(
        columns=tuple(columns[i] for i in alive),
        rows=tuple(
            (row, tuple(entries[i] for i in alive)) for row, entries in zip(rows, made, strict=True)
        ),
        absent=tuple(names),
    )


def _metric(
    name: str,
    head: str,
    unit: str,
    help: str,
    show: Callable[[float], str],
    *,
    show_gain: bool = False,
    bar: bool | Literal["unit"] = False,
) -> Column:
    """A column of one metric. A bar is drawn against the table's largest value, or against 1."""

    def make(report: Report, row: Row) -> Entry:
        value = row.get(name)
        if value is None:
            return Entry()
        over = gain(report.results, name, row.cell) if show_gain and not row.is_baseline else None
        top = max(r.values.get(name, 0.0) for r in report.rows) if bar is True else 1.0
        return Entry(
            text=show(value),
            note="" if over is None else times(over),
            sort=value,
            bar=min(1.0, value / top) if bar and top > 0 else None,
            tone=tone(name, value),
        )

    return Column(head, unit, help, make)


def tone(metric: str, value: float) -> Tone | None:
    """Good, fair or poor, for the metrics that `STEPS` judges."""
    if metric not in STEPS:
        return None
    rank = METRICS[metric].rank
    good, fair = STEPS[metric]
    return "good" if rank(value) >= rank(good) else "fair" if rank(value) >= rank(fair) else "poor"


def _task_score(report: Report, task: str, *, detail: bool) -> Column:
    """The score of a task; in detail, with its interval below it and n in the heading."""

    def make(report: Report, row: Row) -> Entry:
        score = _score(report, row, task)
        if score is None or score.value is None:
            return Entry()
        ends = score.ci95 if detail else None
        note = "" if ends is None else f"{share(ends[0])}{DASH}{share(ends[1])}"
        return Entry(share(score.value), note, score.value)

    scores = [score for row in report.rows if (score := _score(report, row, task)) is not None]
    asked = sorted({score.n for score in scores if score.n is not None})
    metric = ", ".join(dict.fromkeys(score.metric for score in scores))
    help = f"{task}, {metric} of lm-eval."
    if not detail:
        name, _, kind = task.partition("_")
        return Column(name, f"{kind}, %" if kind else "%", help, make)
    unit = f"%, n {asked[0]}" if len(asked) == 1 else "%"
    return Column(task, unit, f"{help} Below it: the 95 % interval.", make)


def _task_kept(task: str) -> Column:
    def make(report: Report, row: Row) -> Entry:
        kept = None if row.is_baseline else task_retained(report.results, row.cell, task)
        return (
            Entry() if kept is None else Entry(share(kept), "", kept, tone=tone("retained", kept))
        )

    return Column("Keeps", "%", "The score to its left over the dense model's.", make)


def _score(report: Report, row: Row, task: str) -> TaskScore | None:
    quality = report.results.quality(row.cell)
    return None if quality is None else (quality.tasks or {}).get(task)


def _dataset(report: Report) -> str:
    """The text that perplexity was measured on, when it is one text."""
    qualities = [report.results.quality(row.cell) for row in report.rows]
    names = {q.perplexity.dataset for q in qualities if q is not None and q.perplexity is not None}
    return names.pop() if len(names) == 1 else ""


def _perplexity(report: Report, row: Row) -> Entry:
    quality = report.results.quality(row.cell)
    found = None if quality is None else quality.perplexity
    if found is None or found.value is None:
        return Entry()
    note = "" if _dataset(report) else found.dataset
    return Entry(number(found.value), note, found.value)


def _rounding(report: Report, row: Row) -> Entry:
    found = report.results.quality(row.cell)
    value = None if found is None else found.kl_of_rounding
    return Entry() if value is None else Entry(number(value), sort=value)


def _drafting(report: Report, row: Row) -> Entry:
    found = row.cell.speculation
    if found is None or found.draft_s is None or not found.verify_s:
        return Entry()
    part = found.draft_s / (found.draft_s + found.verify_s)
    return Entry(share(part), sort=part)


def _accepted(report: Report, row: Row) -> Entry:
    rate, mean = row.get("acceptance"), row.get("accepted")
    if rate is None:
        return Entry()
    return Entry(share(rate), "" if mean is None else f"{mean:.2f} a pass", rate)


def _spread(name: str, show: Callable[[float], str], batch: int = 1) -> Callable[..., Entry]:
    def make(report: Report, row: Row) -> Entry:
        speed: SpeedNumbers | None = row.cell.speed
        if batch != 1:
            speed = ((row.cell.speed.by_batch or {}) if row.cell.speed else {}).get(batch)
        found = None if speed is None else getattr(speed, name)
        if found is None:
            return Entry()
        runs = found.repeats
        note = f"{show(min(runs))}{DASH}{show(max(runs))}" if len(runs) > 1 else ""
        return Entry(show(found.median), note, found.median)

    return make


def _batch_columns(batch: int) -> list[Column]:
    fields = [("Decode", "decode_tokens_per_s", _DECODE), ("Prefill", "prefill_tokens_per_s", "")]
    return [
        Column(
            f"{head} {TIMES}{batch}",
            "tok/s",
            f"{head} of a batch of {batch}, all rows together.",
            _spread(field_name, number, batch),
        )
        for head, field_name, _ in fields
    ]


def _saved_model(report: Report, row: Row) -> Entry:
    found = None if row.cell.compute is None else row.cell.compute.saved_model
    return Entry() if found is None else Entry(share(found), "", found)


def _speedup(report: Report, row: Row) -> Entry:
    found = row.cell.speculation
    if found is None or found.speedup is None:
        return Entry()
    return Entry(times(found.speedup), sort=found.speedup)


def _usual_draft(report: Report, row: Row) -> Entry:
    found = row.cell.speculation
    lengths = {} if found is None else found.draft_length_histogram or {}
    total = sum(lengths.values())
    if not total:
        return Entry()
    usual = max(lengths, key=lambda n: (lengths[n], n))
    return Entry(
        str(usual) if usual else "none",
        f"{100 * lengths[usual] / total:.0f}{THIN}% of rounds",
        float(usual),
    )


def _lossless(report: Report, row: Row) -> Entry:
    found = row.cell.speculation
    if found is None or found.lossless is None:
        return Entry()
    return (
        Entry("yes", "", 1.0, tone="good") if found.lossless else Entry("no", "", 0.0, tone="poor")
    )


def _diverged(report: Report, row: Row) -> Entry:
    """The same with the place of the first divergence."""
    entry, found = _lossless(report, row), row.cell.speculation
    if found is None or found.first_divergence is None or found.lossless:
        return entry
    return replace(entry, note=divergence(found.first_divergence))


def _plain_text(key: str, value: Any) -> str:
    if key == "memory_bytes" and isinstance(value, int | float):
        return size_text(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)
