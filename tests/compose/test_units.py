"""Sizes, durations and metrics as text, and sizes read from text."""

from __future__ import annotations

import pytest

from compose.errors import UserError
from compose.numbers import bytes_text, duration_text, metric_text
from compose.units import parse_bytes, progress_text


@pytest.mark.parametrize(
    ("text", "size"), [("1200", 1200), ("90MB", 9e7), ("1.5 GiB", 1.5 * 2**30), ("2k", 2000)]
)
def test_sizes(text: str, size: float) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "1.2.3MB", "5 tons", "-4"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError):
        parse_bytes(text)


def test_numbers_for_people() -> None:
    durations = [duration_text(seconds) for seconds in (0.4, 12, 185, 7800)]
    assert durations == ["0.4 s", "12 s", "3 min 05 s", "2 h 10 min"]
    progress = [progress_text(*parts) for parts in ((1, 1), (3, 9), (5_000_000, 90_000_000))]
    assert progress == ["", "3/9", "5.0 MB of 90.0 MB"]
    assert [bytes_text(size) for size in (500, 5e5, 1.5e9)] == ["500 B", "500.0 KB", "1.5 GB"]
    shown = [metric_text(*m) for m in (("agreement", 0.5), ("size", 1e6), ("perplexity", 12.3456))]
    assert shown == ["50.0 %", "1.0 MB", "12.35"]
    assert metric_text("kl", None) == "–"
