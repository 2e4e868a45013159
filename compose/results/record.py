"""What every part of a result is: a frozen record whose absent fields are not written."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class Record(BaseModel):
    """A frozen part of a result. What is None is left out when it is written."""

    model_config = ConfigDict(
        frozen=True, extra="allow", allow_inf_nan=False, use_attribute_docstrings=True
    )

    always: ClassVar[frozenset[str]] = frozenset()
    """Fields that are written even when they are None, because scripts look them up."""

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        kept = {k: v for k, v in written.items() if v is not None or k in self.always}
        return kept | {k: None for k in self.always if k not in kept}


class Estimate(Record):
    """A number with its 95 % interval; see `compose.results.intervals`."""

    value: float
    """The point estimate."""

    low: float
    """Lower end of the 95 % interval."""

    high: float
    """Upper end of the 95 % interval."""

    n: int
    """Pairs (or values) it rests on."""

    rounds_ci95: tuple[float, float] | None = None
    """For a speed ratio whose interval also holds the spread between equal runs: the 95 % interval
    of the rounds of this run alone. Two versions that share a run's rounds are compared by it."""

    different: bool | None = None
    """For a ratio: whether the interval leaves 1 out. None where nothing is compared."""

    @property
    def ci95(self) -> tuple[float, float]:
        """Both ends of the interval."""
        return self.low, self.high
