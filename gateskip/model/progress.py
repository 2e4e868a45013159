"""How a long computation reports its progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A callback that reports progress. It accepts any `numbers` and may ignore them."""

    def __call__(
        self, done: int, total: int, phase: str, /, *, detail: str = "", **numbers: float
    ) -> None:
        """`done` of `total` parts of the phase are finished; parts may be bytes.

        `phase` has the same words throughout, `detail` names the current part. `numbers` are
        measurements: a fine-tune reports `loss`, `tokens_per_s` and the other columns of its curve.
        """
