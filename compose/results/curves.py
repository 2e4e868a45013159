"""The published way to tell how well skipping holds: accuracy against compute saved."""

from __future__ import annotations

from typing import Literal

from compose.results.record import Record


class SkippingPoint(Record):
    """One cell of a curve."""

    cell: str
    """Its name."""

    saved: float
    """Share of compute saved, 0 to 1, as the definition counts it."""

    accuracy: float
    """Mean task score."""


class SkippingFigures(Record):
    """A curve and its figures by one definition."""

    points: tuple[SkippingPoint, ...]
    """In order of `saved`; the first is the one that skips least."""

    reference: float
    """The accuracy of which shares are taken: of the first point, or of the dense model."""

    saved_at_90: float | None = None
    """The most saved by a point that keeps 90 % of `reference`; absent where none does."""

    accuracy_at: dict[int, float]
    """Percent of compute saved (0, 5, ... 60) -> accuracy, linear between points; percentages
    outside the measured ones are left out."""


class SkippingCurve(Record):
    """Cells that skip with the same weights, by the published definition and by ours."""

    weights: str
    """The chain without its last stage, joined by `+`."""

    kind: Literal["generative", "likelihood", "all"]
    """The tasks whose mean is the accuracy; `all` where the run does not tell them apart."""

    tasks: tuple[str, ...]
    """Their names."""

    published: SkippingFigures | None = None
    """arXiv 2510.13876: saved is the mean skipped share of branches (gates cost nothing), and
    accuracy is kept against the curve's own first point."""

    ours: SkippingFigures | None = None
    """Saved is net (`Compute.saved_net`), and accuracy is kept against the dense model."""
