"""How a long computation reports how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as the work goes on. Whoever is called takes any `numbers`, and may drop them."""

    def __call__(
        self, done: int, total: int, phase: str, /, *, detail: str = "", **numbers: float
    ) -> None:
        """`done` of `total` parts of the phase are finished; parts may be bytes.

        `phase` has the same words throughout, `detail` says what is at hand now. `numbers` are
        measured on the way: a fine-tune reports `loss` and `tokens_per_s`, and what else its
        curve has.
        """
