"""Rounds of a session -> speeds, ratios and speculation, against ones worked by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from compose.bench.speed.workloads import add_turns
from compose.outputs.gather_speed import speculation_of, timed_parts
from compose.outputs.sessions import Round, Session, Shape
from compose.results.parts import Speculation, Speed

T2 = 4.302653
"""Student's t at 97.5 % with 2 degrees of freedom, from a table."""


def numbers(decode: float, prefill: float = 100.0, **more: Any) -> dict[str, Any]:
    """A repeat that decodes for two seconds."""
    turn = {"prompt_tokens": 100, "prefill_s": 100 / prefill, "ttft_s": 0.1, "digest": "a"}
    turn |= {"tokens": 1000, "decode_s": 1000 / decode, "peak_bytes": 5}
    return add_turns([turn | more])


def session(*rounds: dict[str, dict[str, Any]], groups: list[list[str]] | None = None) -> Session:
    """Rounds of one group, in the main shape."""
    speed = {"prompt_tokens": 8, "batch_sizes": [1], "contexts": [], "repeats": len(rounds)}
    names = sorted(rounds[0])
    made = Session(Path("x"), {"speed": speed}, {}, groups or [names], {}, "")
    for number, cells in enumerate(rounds):
        made.rounds[Round(0, Shape(1, 8), number)] = cells
    return made


def test_a_ratio_is_taken_round_by_round() -> None:
    """Ratios 1.1, 1.2 and 1.3 while the machine halves its speed: drift is not in the interval."""
    rounds = [
        {"dense": numbers(base), "nf4": numbers(base * times)}
        for base, times in ((100.0, 1.1), (50.0, 1.2), (80.0, 1.3))
    ]
    speed = Speed.model_validate(timed_parts(session(*rounds), "nf4", "dense", None)["speed"])
    logs = [math.log(times) for times in (1.1, 1.2, 1.3)]
    mean = sum(logs) / 3
    error = math.sqrt(sum((each - mean) ** 2 for each in logs) / 2 / 3)
    assert speed.decode_ratio is not None and speed.prefill_ratio is not None
    assert speed.decode_ratio.value == pytest.approx(math.exp(mean))
    assert speed.decode_ratio.low == pytest.approx(math.exp(mean - T2 * error), rel=1e-5)
    assert speed.decode_ratio.high == pytest.approx(math.exp(mean + T2 * error), rel=1e-5)
    assert speed.decode_ratio.n == 3
    assert speed.prefill_ratio.different is False
    assert speed.repeat_s == pytest.approx((1000 / 110, 1000 / 60, 1000 / 104))
    assert speed.equal_to_baseline is True
    decode = speed.decode_tokens_per_s
    assert decode is not None and decode.median == pytest.approx(104)
    assert decode.quartiles == pytest.approx((82.0, 107.0)), "between 60, 104 and 110"


def test_the_baseline_is_not_related_to_itself() -> None:
    parts = timed_parts(
        session({"dense": numbers(1.0)}, {"dense": numbers(2.0)}), "dense", "dense", None
    )
    assert "decode_ratio" not in parts["speed"]
    assert timed_parts(session({"dense": numbers(1.0)}), "other", "dense", None) == {}


def test_shapes_have_their_places() -> None:
    made = session({"dense": numbers(10.0), "nf4": numbers(20.0)})
    made.settings["speed"] |= {"batch_sizes": [1, 4], "contexts": [8, 32]}
    for shape, times in ((Shape(4, 8), 3.0), (Shape(1, 32), 4.0)):
        cells = {"dense": numbers(10.0), "nf4": numbers(10.0 * times)}
        made.rounds[Round(0, shape, 0)] = cells
    speed = Speed.model_validate(timed_parts(made, "nf4", "dense", None)["speed"])
    assert (
        speed.decode_tokens_per_s is not None
        and speed.decode_tokens_per_s.median == pytest.approx(20)
    )
    assert speed.by_batch is not None and speed.by_context is not None
    assert speed.by_batch[4].decode_tokens_per_s.median == pytest.approx(30)  # type: ignore[union-attr]
    assert speed.by_context[32].decode_tokens_per_s.median == pytest.approx(40)  # type: ignore[union-attr]
    assert speed.decode_ratio is None, "one round has no interval"


def drafts(lengths: dict[str, int], drafted: int, accepted: int) -> dict[str, Any]:
    positions = [[drafted, accepted]]
    counts = {"drafted": drafted, "accepted": accepted, "passes": sum(lengths.values())}
    more = {"looked_up": 0, "draft_s": 0.5, "verify_s": 1.0, "positions": positions}
    more["draft_weights"] = "int4"
    return {"speculation": {"draft_length_histogram": lengths, **counts, **more}}


def test_speculation_is_of_all_timed_rounds() -> None:
    """The last round alone would say: 100 % accepted. All: 10 of 20, 5 passes of 25 plain."""
    rounds = [
        {"gates": numbers(100.0), "spec": numbers(150.0, **drafts({"0": 5, "1": 10}, 10, 0))},
        {"gates": numbers(100.0), "spec": numbers(130.0, **drafts({"1": 10}, 10, 10))},
    ]
    parts = timed_parts(session(*rounds), "spec", "gates", "gates")
    speculation = Speculation.model_validate(parts["speculation"])
    assert speculation.acceptance_rate == 0.5
    assert speculation.draft_weights == "int4"
    assert speculation.drafts_by_round == ((10, 0, 15), (10, 10, 10))
    assert speculation.acceptance_rate_ci95 == (0.0, 1.0), "two rounds, none and all"
    least, most = speculation.mean_accepted_tokens_ci95 or (0, 0)
    assert 1 <= least < 1.4 < most
    assert speculation.mean_accepted_tokens == pytest.approx((25 + 10) / 25)
    assert speculation.draft_length_histogram == {0: 5, 1: 20}
    assert (speculation.plain_steps, speculation.fell_back) == (0.2, False)
    assert (speculation.draft_s, speculation.verify_s) == (1.0, 2.0)
    assert speculation.speedup == pytest.approx(math.sqrt(1.5 * 1.3))
    low, high = speculation.speedup_ci95 or (0, 0)
    assert low < 1.3 < 1.5 < high, "two rounds know little"


def test_mostly_plain_steps_are_a_fall_back_to_plain_decoding() -> None:
    counts = drafts({"0": 27, "1": 1}, 1, 0)["speculation"]
    found = Speculation.model_validate(speculation_of(counts))
    assert found.plain_steps == pytest.approx(27 / 28)
    assert found.fell_back is True
    assert found.acceptance_rate == 0.0
    never = speculation_of(drafts({"0": 3}, 0, 0)["speculation"])
    assert never["acceptance_rate"] is None and never["acceptance_by_position"] == []
