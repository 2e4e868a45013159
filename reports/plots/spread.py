"""The horizontal axis of a front: where a cell stands on it, its interval, and its words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compose.numbers import PAGE, TIMES
from compose.results.parts import Estimate
from reports.load import Report, Row

TITLES = {
    "decode": "Quality against decode speed",
    "size": "Quality against size on disk",
    "saved": "Quality against compute saved",
}


@dataclass(frozen=True)
class XAxis:
    """One metric across. `ratios` is cell's number -> decode speed over the baseline's, paired."""

    metric: str
    label: str
    ratios: dict[int, Estimate] | None = None

    @property
    def title(self) -> str:
        """The picture's title."""
        return TITLES[self.metric]

    @property
    def smaller_is_better(self) -> bool:
        """Whether the better end is the left one."""
        return self.metric == "size"

    def at(self, row: Row) -> float:
        """Where the row stands."""
        if self.ratios is not None:
            return self.ratios[row.number].value if row.number in self.ratios else 1.0
        value = row.values[self.metric]
        return (
            value / 1e6
            if self.metric == "size"
            else 100 * value
            if self.metric == "saved"
            else value
        )

    def ends(self, row: Row) -> tuple[float, float] | None:
        """Its 95 % interval; sizes and counts of compute have none."""
        ratio = (self.ratios or {}).get(row.number)
        return None if ratio is None else (ratio.low, ratio.high)

    def says(self, row: Row) -> str:
        """The row's number in words, with its unit."""
        value = row.values[self.metric]
        if self.metric == "size":
            return f"{PAGE.megabytes(value)} MB"
        if self.metric == "saved":
            return f"{PAGE.share(value)} % saved"
        ratio = (self.ratios or {}).get(row.number)
        return f"{PAGE.number(value)} tok/s" + (
            "" if ratio is None else f", {PAGE.ratio(ratio.value, ratio.ci95)}"
        )


def x_axis(report: Report, rows: Sequence[Row], metric: str) -> XAxis:
    """The axis of `metric`; decode speed as its paired ratio where every cell has one."""
    labels = {"size": "size on disk, MB", "saved": "compute saved, net, %"}
    if metric != "decode":
        return XAxis(metric, labels[metric])
    ratios = {row.number: ratio for row in rows if (ratio := _ratio(row)) is not None}
    if not ratios or any(not row.is_baseline and row.number not in ratios for row in rows):
        return XAxis(metric, "decode, tokens/s")
    dense = None if report.baseline is None else report.baseline.get("decode")
    of_dense = "" if dense is None else f" ({TIMES}1 is {PAGE.number(dense)} tokens/s)"
    return XAxis(metric, f"decode speed, {TIMES} dense{of_dense}", ratios)


def _ratio(row: Row) -> Estimate | None:
    return None if row.cell.speed is None else row.cell.speed.decode_ratio
