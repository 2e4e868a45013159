"""Weights on huge pages: asked for by address, and never more than a request."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from gateskip.runtime import huge_pages
from gateskip.runtime.huge_pages import HUGE, collapse, prefer, setting

here = pytest.mark.skipif(
    setting() in (None, "never"), reason="this system gives nobody huge pages"
)


def on_huge_pages() -> int:
    """Bytes of this process's anonymous memory that stand on huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text("ascii").splitlines()
    found = next(line for line in lines if line.startswith("AnonHugePages:"))
    return 1024 * int(found.split()[1])


@here
def test_memory_moves_and_stays_what_it_is() -> None:
    weights = torch.arange(3 * HUGE, dtype=torch.int32)  # 12 huge pages, and not from their begin
    wanted, address = weights.clone(), weights.data_ptr()
    moved = collapse([weights])
    if not moved:
        pytest.skip("this kernel has no MADV_COLLAPSE, or no huge page to give")
    assert 11 * HUGE <= moved <= on_huge_pages()
    assert weights.data_ptr() == address and torch.equal(weights, wanted)
    assert collapse([weights]) == moved, "asked again, nothing is to be done"


@here
def test_small_tensors_together_fill_a_page() -> None:
    """What counts is how much of a page tensors fill, not how large one is."""
    whole = torch.zeros(4 * HUGE, dtype=torch.uint8)
    first = -whole.data_ptr() % HUGE
    page = whole[first : first + HUGE].split(HUGE // 8)
    assert sum(huge_pages._filled(page[:3]).values()) == 3 * HUGE // 8
    assert collapse(page[:3]) == 0
    assert collapse([*page[:2], *page[:2]]) == 0, "a tensor that comes twice fills it once"
    assert collapse(page[:4]) in (0, HUGE)


@here
def test_memory_that_was_not_touched_comes_on_huge_pages() -> None:
    before, cache = on_huge_pages(), torch.zeros(16 * HUGE, dtype=torch.uint8)
    prefer(cache)
    cache.fill_(1)
    assert int(cache.sum()) == 16 * HUGE
    assert on_huge_pages() - before in range(0, 17 * HUGE)
    prefer(torch.zeros(8))  # too small for one


def test_neighbours_go_together_and_alone_where_some_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []

    def madvise(begin: int, size: int, advice: int) -> int:
        asked.append((begin // HUGE, size // HUGE))
        return -1 if 8 in range(begin // HUGE, (begin + size) // HUGE) else 0

    monkeypatch.setattr(huge_pages, "_madvise", lambda: madvise)
    filled = {3: HUGE, 4: HUGE, 7: HUGE, 8: HUGE, 11: HUGE // 2, 12: HUGE // 2 - 1}
    monkeypatch.setattr(huge_pages, "_filled", lambda tensors: filled)
    assert collapse([]) == 4 * HUGE
    assert asked == [(3, 2), (7, 2), (7, 1), (8, 1), (11, 1)]


def test_where_there_are_none_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "setting", lambda: "never")
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", None, raising=False)
    weights = torch.ones(HUGE)
    assert collapse([weights]) == 0
    prefer(weights)
    assert bool((weights == 1).all())


def test_the_setting_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "enabled"
    monkeypatch.setattr(huge_pages, "_SETTING", file)
    setting.cache_clear()
    assert setting() is None
    file.write_text("always [madvise] never\n", "ascii")
    setting.cache_clear()
    assert setting() == "madvise"
    setting.cache_clear()
