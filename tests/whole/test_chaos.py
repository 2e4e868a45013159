"""What `make chaos` calls an error; tests/compose/run/test_runner.py kills runs itself."""

from __future__ import annotations

import chaos


def test_what_differs_is_found() -> None:
    wanted = {"cells": [{"name": "a", "seconds": 1.0, "quality": {"value": 2.0}}]}
    found = {"cells": [{"name": "a", "seconds": 9.0, "quality": {"value": 2.5}}]}
    same = chaos.without_timings(wanted)
    assert chaos.differences(same, chaos.without_timings(wanted)) == []
    assert chaos.differences(same, chaos.without_timings(found)) == [
        "/cells/0/quality/value: 2.0 is now 2.5"
    ]


def test_an_outcome_holds_only_where_nothing_is_wrong() -> None:
    good = chaos.Outcome("kill", "the run", 1.0, -9, 0)
    assert good.holds and chaos.problems(good) == []
    for bad in ("repeated", "differences", "processes_left", "files_left", "tracebacks"):
        outcome = chaos.Outcome("kill", "the run", 1.0, -9, 0, **{bad: ["x"]})
        assert not outcome.holds and chaos.problems(outcome)
    assert not chaos.Outcome("kill", "the run", 1.0, -9, 1).holds
