"""Columns of speculation: what the timed rounds did, and, apart from it, the lossless check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from compose.analysis.families import lossless_to
from compose.numbers import PAGE, THIN, unless_one
from compose.results.parts import Divergence
from compose.table import Entry
from reports.load import Report, Row
from reports.tables.columns import Column, Make

POSITION_HELP = (
    "Share of drafted tokens at this position that were accepted, if all earlier tokens of the"
    " draft were accepted."
)
SHOWN_POSITIONS = 6
ACCEPTED_HELP = "Share of drafted tokens that the whole model accepted in the timed rounds."
MEAN_HELP = "Mean number of new tokens for each pass of the whole model, which is 1 without drafts."
PLAIN_HELP = "Share of the timed decoding steps that had no draft."
LOSSLESS_HELP = (
    "Whether greedy decoding with drafts gives the same tokens as the named weights without drafts."
)
FELL_BACK = "fell back to plain decoding"
DRAFTED_BY_HELP = (
    "Shares of the drafted tokens that came from look-up in the text and from the draft model."
)


@dataclass(frozen=True)
class Histogram:
    """How often so many tokens were drafted; shares are of the most frequent length."""

    bars: tuple[tuple[int, int, float], ...] = field(default=())


def histogram(lengths: Mapping[int, int] | None) -> Histogram:
    """Draft lengths, shortest first, without gaps."""
    if not lengths or not any(lengths.values()):
        return Histogram()
    most = max(lengths.values())
    rounds = [(n, lengths.get(n, 0)) for n in range(min(lengths), max(lengths) + 1)]
    return Histogram(tuple((n, times, times / most) for n, times in rounds))


def timed_histogram(row: Row) -> Histogram:
    """The draft lengths of a cell's timed rounds."""
    return histogram(row.cell.speculation.draft_length_histogram if row.cell.speculation else None)


def drafted_by_entry(report: Report, row: Row) -> Entry:
    """Who proposed the drafted tokens of the timed rounds: `look-up 69 %, learned 31 %`.

    Look-up is named by what it proposed, and the draft model by the rest.
    """
    record = row.cell.speculation
    copied = None if record is None else record.looked_up_share
    if copied is None:
        return Entry()
    shares = sorted([(copied, "look-up"), (1 - copied, _draft_model(row))], reverse=True)
    words = ", ".join(f"{name} {_near(part)}{THIN}%" for part, name in shares if part)
    return Entry(words, sort=copied)


def _draft_model(row: Row) -> str:
    """The weights that drafted beside look-up: those chosen by timing, or those of the settings."""
    record = row.cell.speculation
    if record is not None and record.draft_weights not in (None, "model"):
        return str(record.draft_weights)
    steps = [step for step in row.cell.steps or () if step.use == "speculate"]
    given = (steps[-1].model_extra or {}) if steps else {"draft_weights": "auto"}
    name = str(given.get("draft_weights"))
    if record is not None and record.draft_weights == "model":
        return f"the draft model {given.get('draft_model', '')}".strip()
    return {"own": "the model itself", "auto": "a draft model", "None": "a draft model"}.get(
        name, name
    )


def _near(part: float) -> str:
    """A share in percent: whole, but with a place where that would be 0 or 100."""
    return PAGE.whole(100 * part) if 0.005 <= part < 0.995 or part == 1 else PAGE.share(part)


def accepted_entry(report: Report, row: Row) -> Entry:
    """Acceptance rate of the timed rounds, or that hardly anything was drafted."""
    rate, mean = row.get("acceptance"), row.get("accepted")
    by = drafted_by_entry(report, row)
    source = [] if by.is_absent else [by.text]
    if row.cell.speculation is not None and row.cell.speculation.fell_back:
        notes = [] if rate is None else [f"{PAGE.percent(rate)} of the few drafts", *source]
        return Entry(FELL_BACK, ", ".join(notes), rate or 0.0)
    if rate is None:
        return Entry()
    ends = report.interval(row, "acceptance")
    notes = [PAGE.span(*ends, PAGE.share)] if ends else []
    notes += [] if mean is None else [f"{PAGE.near_one(mean)} a pass"]
    notes += source
    return Entry(PAGE.share(rate), ", ".join(notes), rate)


def plain_steps_entry(report: Report, row: Row) -> Entry:
    """Share of the timed steps that were plain; more than half is a fall-back."""
    record = row.cell.speculation
    if record is None or record.plain_steps is None:
        return Entry()
    note = FELL_BACK if record.fell_back else ""
    return Entry(
        PAGE.share(record.plain_steps), note, record.plain_steps, tone="poor" if note else None
    )


def drafting_entry(report: Report, row: Row) -> Entry:
    """Share of the decoding time that went into drafts."""
    record = row.cell.speculation
    if record is None or record.draft_s is None or not record.verify_s:
        return Entry()
    part = record.draft_s / (record.draft_s + record.verify_s)
    return Entry(PAGE.share(part), sort=part)


def speedup_entry(report: Report, row: Row) -> Entry:
    """Decode speed over that of the plain cell; "no difference" where the interval includes 1."""
    record = row.cell.speculation
    if record is None or record.speedup is None:
        return Entry()
    ends = record.speedup_ci95
    if ends is None:
        return Entry(PAGE.times(record.speedup), sort=record.speedup)
    text = unless_one(PAGE.times(record.speedup), ends)
    return Entry(text, PAGE.span(*ends, PAGE.near_one), record.speedup)


def usual_draft_entry(report: Report, row: Row) -> Entry:
    """The most frequent timed draft length, with its share of the rounds."""
    lengths = row.cell.speculation.draft_length_histogram if row.cell.speculation else None
    total = sum((lengths or {}).values())
    if not lengths or not total:
        return Entry()
    usual = max(lengths, key=lambda n: (lengths[n], n))
    return Entry(
        str(usual) if usual else "none",
        f"{PAGE.whole(100 * lengths[usual] / total)}{THIN}% of rounds",
        float(usual),
    )


def timed_rates(row: Row) -> tuple[float, ...]:
    """Acceptance by position of the timed rounds."""
    record = row.cell.speculation
    return () if record is None else record.acceptance_by_position or ()


def forced_rates(row: Row) -> tuple[float, ...]:
    """The same of the lossless check, under its forced draft length."""
    check = row.cell.lossless_check
    return () if check is None else check.acceptance_by_position or ()


def position_columns(
    rows: tuple[Row, ...], rates: Callable[[Row], tuple[float, ...]] = timed_rates
) -> list[Column]:
    """Acceptance at the first places of a draft, where any cell recorded it."""

    def at(place: int) -> Make:
        def make(report: Report, row: Row) -> Entry:
            curve = rates(row)
            if place >= len(curve):
                return Entry()
            return Entry(PAGE.share(curve[place]), sort=curve[place])

        return make

    longest = max((len(rates(row)) for row in rows), default=0)
    return [
        Column(f"{place + 1}.", "%", POSITION_HELP, at(place))
        for place in range(min(longest, SHOWN_POSITIONS))
    ]


def lossless_entry(report: Report, row: Row) -> Entry:
    """Whether drafts change no token, and of which weights."""
    check = row.cell.lossless_check
    if check is None or check.lossless is None:
        return Entry()
    note = f"to {lossless_to(report.results, row.cell)}"
    if check.lossless:
        return Entry("yes", note, 1.0, tone="good")
    return Entry("no", note, 0.0, tone="poor")


def diverged_entry(report: Report, row: Row) -> Entry:
    """The same with the place of the first divergence."""
    entry, check = lossless_entry(report, row), row.cell.lossless_check
    if check is None or check.first_divergence is None or check.lossless:
        return entry
    return replace(entry, note=f"{entry.note}: {divergence(check.first_divergence)}")


def divergence(place: Divergence) -> str:
    """Where speculation left plain decoding, in words."""
    parts = [
        None if place.prompt is None else f"prompt {place.prompt}",
        None if place.position is None else f"token {place.position}",
        None if place.margin is None else f"margin {place.margin:.2g}",
        None if place.margin_share is None else f"{place.margin_share:.1e} of the range",
    ]
    return ", ".join(part for part in parts if part) or "place not recorded"


def check_count_entry(name: str) -> Make:
    """How many prompts, tokens or divergences the check has."""

    def make(report: Report, row: Row) -> Entry:
        value = None if row.cell.lossless_check is None else getattr(row.cell.lossless_check, name)
        value = len(value) if isinstance(value, tuple) else value
        return Entry() if value is None else Entry(PAGE.whole(value), sort=value)

    return make


def lengths_entry(name: str) -> Make:
    """A histogram of draft lengths in words: `0: 23, 3: 328`."""

    def make(report: Report, row: Row) -> Entry:
        lengths = (
            None if row.cell.lossless_check is None else getattr(row.cell.lossless_check, name)
        )
        if not lengths:
            return Entry()
        words = ", ".join(f"{n}:{THIN}{PAGE.whole(lengths[n])}" for n in sorted(lengths))
        return Entry(words, sort=words)

    return make
