"""What a repeat is made of: turns, added up, worked by hand."""

from __future__ import annotations

from typing import Any

from compose.bench.speed.workloads import add_speculation, add_turns


def turn(**own: Any) -> dict[str, Any]:
    """A turn of 100 prompt tokens in 0.5 s and 9 decoded ones in 0.3 s."""
    times = {"prompt_tokens": 100, "prefill_s": 0.5, "tokens": 9, "decode_s": 0.3, "ttft_s": 0.5}
    return {**times, "digest": "a", **own}


def test_a_rate_is_the_sum_of_tokens_over_the_sum_of_seconds() -> None:
    both = add_turns([turn(), turn(prefill_s=1.5, tokens=3, decode_s=0.9, ttft_s=1.5)])
    assert both["prefill_tokens_per_s"] == 200 / 2.0
    assert both["decode_tokens_per_s"] == 12 / (0.3 + 0.9)
    assert (both["ttft_s"], both["turns"], both["decode_s"]) == (1.0, 2, 0.3 + 0.9)


def test_nothing_decoded_is_no_speed() -> None:
    assert add_turns([turn(tokens=0, decode_s=0.0)])["decode_tokens_per_s"] is None


def test_texts_that_differ_have_no_digest() -> None:
    assert add_turns([turn(), turn()])["digest"] == "a"
    assert add_turns([turn(), turn(digest="b")])["digest"] is None


def test_the_largest_memory_is_kept() -> None:
    both = add_turns([turn(peak_bytes=3), turn(peak_bytes=None), turn(peak_bytes=5)])
    assert both["peak_bytes"] == 5
    assert "cache_bytes" not in both


def test_counts_of_speculation_are_added() -> None:
    one = {
        "draft_length_histogram": {"0": 2, "3": 1},
        **{"drafted": 3, "accepted": 2, "passes": 3, "looked_up": 0},
        **{"positions": [[1, 1], [1, 1], [1, 0]], "draft_s": 0.5, "verify_s": 1.0},
    }
    two = {
        "draft_length_histogram": {0: 1, 1: 4},
        **{"drafted": 4, "accepted": 1, "passes": 5, "looked_up": 4},
        **{"positions": [[4, 1]], "draft_s": 0.25, "verify_s": 0.5, "draft_weights": "int4"},
    }
    both = add_speculation([one, two])
    assert both == {
        "draft_length_histogram": {"0": 3, "3": 1, "1": 4},
        **{"drafted": 7, "accepted": 3, "passes": 8, "looked_up": 4},
        **{"positions": [[5, 2], [1, 1], [1, 0]], "draft_s": 0.75, "verify_s": 1.5},
        "draft_weights": "int4",
    }
    assert add_turns([turn(speculation=one), turn(speculation=two)])["speculation"] == both
