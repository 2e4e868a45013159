"""Picking: the best cell by an aim under constraints, or an error that says what stands in the way.

The results here are test data, made in code; no number in them was measured.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compose.analysis.metrics import METRICS, metric_of
from compose.analysis.pick import AIMS, pick, retained_bound
from compose.analysis.relate import relate
from compose.errors import UserError
from compose.results.schema import Results


def made_up_cell(
    name: str, decode: float | None, megabytes: float, ratio: float | None, **more: Any
) -> dict[str, Any]:
    cell: dict[str, Any] = {"name": name, "chain": name.split("+"), "status": "ok"}
    cell["size"] = {"disk_bytes": int(megabytes * 1e6), "resident_bytes": int(megabytes * 2e6)}
    if decode is not None:
        cell["speed"] = {"decode_tokens_per_s": {"median": decode}}
    if ratio is not None:
        spread = (ratio * (1 - more.pop("spread", 0.0)), ratio * (1 + more.pop("spread_up", 0.0)))
        perplexity = {"dataset": "wikitext2", "value": 20 * ratio, "ratio_ci95": spread}
        cell["quality"] = {"perplexity": perplexity}
    return cell | more


@pytest.fixture
def results() -> Results:
    cells = [
        made_up_cell("dense", 20.0, 270, 1.0),
        made_up_cell("nf4", 28.0, 110, 1.04),
        made_up_cell("gates+skip", 34.0, 270, 1.3),
        made_up_cell("gates+spec", 31.0, 270, 1.0, lossless_check={"lossless": True}),
        made_up_cell("gates+nf4+spec", 45.0, 111, 1.04, lossless_check={"lossless": False}),
        made_up_cell("gates+gptq4+spec", 44.0, 105, 1.04, speculation={}),
        made_up_cell("broken", 99.0, 1, 1.0, status="failed"),
    ]
    return Results.model_validate({"run": "test", "cells": cells})


@pytest.mark.parametrize(
    ("options", "winner"),
    [
        ({}, "gates+skip"),
        ({"min_retained": 0.95}, "gates+spec"),
        ({"max_perplexity_ratio": 1.05}, "gates+spec"),
        ({"max_bytes": 200e6}, "nf4"),
        ({"max_resident": 230e6}, "nf4"),
        ({"require_lossless": False}, "gates+nf4+spec"),
        ({"require_lossless": False, "max_bytes": 110e6}, "gates+gptq4+spec"),
        ({"maximize": "size"}, "nf4"),
        ({"maximize": "size", "require_lossless": False}, "gates+gptq4+spec"),
        ({"maximize": "perplexity"}, "gates+spec"),
        ({"maximize": "retained", "max_bytes": 200e6}, "nf4"),
        ({"minimize": "size", "require_lossless": False}, "gates+gptq4+spec"),
        ({"minimize": "perplexity"}, "gates+spec"),
    ],
)
def test_picks(results: Results, options: dict[str, Any], winner: str) -> None:
    assert pick(results, **options).name == winner


def test_one_aim_is_named_and_less_of_a_speed_is_none(results: Results) -> None:
    with pytest.raises(UserError, match="two aims are given"):
        pick(results, maximize="decode", minimize="size")
    with pytest.raises(UserError, match="cannot minimize 'decode'"):
        pick(results, minimize="decode")


def test_the_dense_model_may_win(results: Results) -> None:
    only = Results(run="test", cells=results.cells[:2])
    assert pick(only, max_perplexity_ratio=1.0).name == "dense"


def test_a_constraint_that_nothing_meets_is_named(results: Results) -> None:
    with pytest.raises(UserError) as caught:
        pick(results, max_bytes=50e6, min_retained=0.5)
    text = str(caught.value)
    assert "no variant meets disk <= 50.0 MB (6 were measured)" in text
    assert "the nearest is 'nf4': disk 110.0 MB" in text
    assert "loosen --at-most-mb" in text
    assert caught.value.exit_code == 2


def test_constraints_that_only_clash_are_counted(results: Results) -> None:
    with pytest.raises(UserError) as caught:
        pick(results, max_bytes=200e6, min_retained=0.99)
    text = str(caught.value)
    assert "2 of 6 meet retained (at least) >= 0.990, 3 of 6 meet disk <= 200.0 MB" in text
    assert "4 of 6 meet lossless drafts" in text
    assert "the nearest is 'nf4': retained (at least) 0.962" in text


def test_losslessness_can_be_what_stands_in_the_way(results: Results) -> None:
    only = Results(run="test", cells=results.cells[4:5])
    with pytest.raises(UserError, match="'gates\\+nf4\\+spec': not lossless") as caught:
        pick(only)
    assert "--no-require-lossless" in str(caught.value)


def test_an_unmeasured_number_meets_no_constraint() -> None:
    cells = [made_up_cell("dense", 20.0, 1, 1.0), made_up_cell("fast", 30.0, 1, None)]
    results = Results.model_validate({"run": "test", "cells": [*cells, made_up_cell("q", 9, 1, 2)]})
    assert pick(results, min_retained=0.1, maximize="decode").name == "dense"


# --- bounds of quality are on the unlucky end of the interval ------------------------------------


def tasks_of(own: list[float], kind: str = "generative") -> dict[str, Any]:
    score = sum(own) / len(own)
    return {
        "write": {
            "metric": "exact_match",
            "value": score,
            "n": len(own),
            "outcomes": own,
            "questions": "0123456789abcdef",
            "kind": kind,
        }
    }


def run_with_tasks(questions: int, lost: int) -> Results:
    """Dense has half of the questions right; `fast` loses some of these."""
    right = questions // 2
    dense = [1.0] * right + [0.0] * (questions - right)
    fast = [0.0] * lost + dense[lost:]
    cells = [made_up_cell("dense", 20.0, 270, None), made_up_cell("fast", 40.0, 110, None)]
    cells[0]["quality"] = {"tasks": tasks_of(dense)}
    cells[1]["quality"] = {"tasks": tasks_of(fast)}
    return relate(Results.model_validate({"run": "test", "cells": cells}))


def test_the_lower_end_of_what_is_retained_decides() -> None:
    """Of 1000 right answers 30 are lost: 0.97, with an interval from about 0.958 to 0.98."""
    results = run_with_tasks(2000, 30)
    bound = retained_bound(results, results.cell("fast"))
    assert bound is not None and 0.95 < bound < 0.965
    assert pick(results, min_retained=0.95).name == "fast"
    assert pick(results, min_retained=0.965).name == "dense", "the estimate keeps it, the end not"
    assert pick(results, min_retained=0.965, by_estimate=True).name == "fast"


def test_too_few_questions_are_no_evidence() -> None:
    results = run_with_tasks(26, 0)
    with pytest.raises(UserError) as caught:
        pick(results, min_retained=0.95)
    text = str(caught.value)
    assert "26 questions are too few to judge quality: at least 200 are needed" in text
    assert "the nearest by estimate is 'fast': retained 1.000" in text
    assert "--by-estimate" in text
    assert pick(results, min_retained=0.95, by_estimate=True).name == "fast"
    assert pick(results).name == "fast", "without a bound of quality nothing is claimed"


def test_the_upper_end_of_the_perplexity_ratio_decides() -> None:
    cells = [
        made_up_cell("dense", 20.0, 270, 1.0),
        made_up_cell("nf4", 28.0, 110, 1.04, spread=0.005, spread_up=0.005),
        made_up_cell("int4", 30.0, 110, 1.03, spread=0.05, spread_up=0.05),
    ]
    results = Results.model_validate({"run": "test", "cells": cells})
    assert pick(results, max_perplexity_ratio=1.05).name == "nf4"
    assert pick(results, max_perplexity_ratio=1.05, by_estimate=True).name == "int4"


def test_the_upper_end_of_the_kl_decides() -> None:
    cells = [
        made_up_cell("dense", 20.0, 270, 1.0),
        made_up_cell("nf4", 28.0, 110, 1.04),
        made_up_cell("int4", 30.0, 110, 1.03),
        made_up_cell(
            "spec", 40.0, 110, None, quality_of="dense", lossless_check={"lossless": True}
        ),
        made_up_cell("lost", 90.0, 110, 1.0),
    ]
    cells[1]["quality"] |= {"kl_to_baseline": 0.04, "kl_ci95": (0.035, 0.045)}
    cells[2]["quality"] |= {"kl_to_baseline": 0.03, "kl_ci95": (0.0, 0.06)}
    results = Results.model_validate({"run": "test", "cells": cells})
    assert pick(results, max_kl=0.05).name == "spec", (
        "the baseline's predictions are at no distance"
    )
    assert pick(results, max_kl=0.05, max_bytes=200e6, maximize="kl").name == "nf4"
    estimated = pick(results, max_kl=0.05, maximize="kl", by_estimate=True)
    assert estimated.name == "int4"
    with pytest.raises(
        UserError, match=r"no variant meets KL \(at most\) <= 0.030.*nearest is 'nf4'"
    ):
        pick(results, max_kl=0.03, maximize="kl")


def test_a_ratio_without_interval_is_no_evidence() -> None:
    cells = [made_up_cell("dense", 20.0, 270, 1.0), made_up_cell("nf4", 28.0, 110, 1.0)]
    del cells[1]["quality"]["perplexity"]["ratio_ci95"]
    results = Results.model_validate({"run": "test", "cells": cells})
    with pytest.raises(UserError, match="no evidence for perplexity ratio"):
        pick(results, max_perplexity_ratio=1.05)


def test_speculation_that_was_refuted_has_no_quality() -> None:
    results = run_with_tasks(2000, 30)
    spec = made_up_cell("spec", 80.0, 110, None, lossless_check={"lossless": False})
    spec |= {"quality_of": "fast", "plain": "fast"}
    cells = [*results.cells, Results.model_validate({"run": "x", "cells": [spec]}).cells[0]]
    results = Results(run="test", cells=tuple(cells))
    assert retained_bound(results, results.cell("spec")) is None
    assert pick(results, min_retained=0.9, require_lossless=False).name == "fast"


def test_other_engines_are_not_picked() -> None:
    cells = [made_up_cell("dense", 20.0, 270, 1.0), made_up_cell("nf4", 28.0, 110, 1.04)]
    peer = made_up_cell("llama.cpp:q4_0", 99.0, 90, 1.0, peer={"engine": "llama.cpp"})
    results = Results.model_validate({"run": "test", "cells": [*cells, peer]})
    assert pick(results).name == "nf4"


def test_unknown_and_unmeasured_aims(results: Results) -> None:
    with pytest.raises(UserError, match="did you mean 'decode'"):
        pick(results, maximize="decod")
    with pytest.raises(
        UserError, match="no variant of run 'test' has a measurement of prefill tokens/s"
    ):
        pick(results, maximize="prefill")


def test_equal_cells_are_told_apart_by_quality_then_by_place() -> None:
    cells = [
        made_up_cell("dense", 20.0, 1, 1.0),
        made_up_cell("a", 30.0, 2, 1.2),
        made_up_cell("b", 30.0, 2, 1.1),
        made_up_cell("c", 30.0, 2, 1.1),
    ]
    assert pick(Results.model_validate({"run": "test", "cells": cells})).name == "b"


def test_aims_are_metrics() -> None:
    assert set(AIMS) <= set(METRICS)


numbers = st.floats(min_value=1, max_value=100)


@given(
    st.lists(st.tuples(numbers, numbers, st.floats(1, 3)), min_size=1, max_size=8),
    st.floats(0.3, 1),
    numbers,
)
def test_the_pick_is_feasible_and_none_is_better(
    rows: list[tuple[float, float, float]], least: float, most: float
) -> None:
    cells = [made_up_cell("dense", 1.0, 100, 1.0)]
    cells += [made_up_cell(f"c{i}", *row) for i, row in enumerate(rows)]
    results = Results.model_validate({"run": "test", "cells": cells})

    def fits(name: str) -> bool:
        cell = results.cell(name)
        kept, size = metric_of(results, "retained", cell), metric_of(results, "size", cell)
        return kept is not None and size is not None and kept >= least and size <= most * 1e6

    fit = [cell for cell in results.cells if fits(cell.name)]
    if not fit:
        with pytest.raises(UserError):
            pick(results, min_retained=least, max_bytes=most * 1e6)
        return
    won = pick(results, min_retained=least, max_bytes=most * 1e6)
    speeds = [metric_of(results, "decode", cell) or 0.0 for cell in fit]
    assert won in fit
    assert metric_of(results, "decode", won) == max(speeds)
