"""What every part of a result is: a frozen record whose absent fields are not written."""

from __future__ import annotations

import math
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
        present = {k: v for k, v in written.items() if v is not None or k in self.always}
        return present | {k: None for k in self.always if k not in present}


class Estimate(Record):
    """A number with its 95 % interval; see `compose.analysis.intervals`."""

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


def only_finite(data: dict[str, Any], place: str = "") -> dict[str, Any]:
    """`data` without numbers that JSON cannot hold (a ruined perplexity); its `notes` name them.

    `place` is what the names begin with.
    """
    dropped: list[str] = []
    clean: dict[str, Any] = _finite(data, place, dropped)
    if dropped:
        lost = [f"{name} was not a finite number" for name in dropped]
        clean["notes"] = [*(clean.get("notes") or ()), *lost]
    return clean


def _finite(value: Any, place: str, dropped: list[str]) -> Any:
    """`value` without keys whose number, or list of numbers, is not finite; `dropped` names them.

    A list goes as a whole: an interval or a round of repeats with a hole would mislead.
    """
    if isinstance(value, list | tuple):
        return [_finite(item, f"{place}[{i}]", dropped) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    finite: dict[Any, Any] = {}
    for key, item in value.items():
        inner = f"{place}.{key}" if place else str(key)
        numbers = item if isinstance(item, list | tuple) else [item]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            dropped.append(inner)
        else:
            finite[key] = _finite(item, inner, dropped)
    return finite
