"""The exception tree: messages, the place that context adds, and suggested names."""

from __future__ import annotations

import pickle

import pytest

from compose.errors import (
    ArtifactError,
    AssetError,
    ComposeError,
    PipelineError,
    PlanError,
    RuleBroken,
    StepError,
    UserError,
    context,
    suggest,
)


def test_message_names_place_roles_and_fix() -> None:
    error = PlanError("no", fix="do so", file="a.yaml", line=3, column=7, stage="heal", cell="c")
    assert str(error) == "a.yaml:3:7: cell 'c', stage 'heal': no\n  fix: do so"


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ({}, "no"),
        ({"file": "a.yaml"}, "a.yaml: no"),
        ({"file": "a.yaml", "line": 3}, "a.yaml:3: no"),
        ({"file": "a.yaml", "column": 3}, "a.yaml: no"),
        ({"line": 3}, "no"),
    ],
)
def test_message_has_only_what_is_known(where: dict[str, object], text: str) -> None:
    assert str(ComposeError("no", **where)) == text  # type: ignore[arg-type]


def test_user_errors_are_value_errors_with_exit_code_2() -> None:
    for kind in (PipelineError, PlanError, AssetError, ArtifactError):
        error = kind("no")
        assert isinstance(error, UserError) and isinstance(error, ValueError)
        assert error.exit_code == 2


def test_step_error_is_no_user_error() -> None:
    error = StepError("no")
    assert not isinstance(error, UserError)
    assert error.exit_code == 1


def test_context_adds_what_is_missing_and_keeps_what_is_known() -> None:
    with (
        pytest.raises(PlanError) as caught,
        context(file="outer.yaml", line=1, cell="c"),
        context(stage="heal", cell="inner"),
    ):
        raise PlanError("no", stage="gates")
    error = caught.value
    assert (error.file, error.line, error.stage, error.cell) == ("outer.yaml", 1, "gates", "inner")


def test_context_does_not_mix_a_line_with_another_file() -> None:
    with pytest.raises(PlanError) as caught, context(file="outer.yaml", line=1, column=2):
        raise PlanError("no", file="inner.yaml")
    assert str(caught.value) == "inner.yaml: no"


def test_context_leaves_other_exceptions_alone() -> None:
    with pytest.raises(KeyError), context(file="outer.yaml"):
        raise KeyError("x")


def test_errors_survive_pickling_between_processes() -> None:
    broken = RuleBroken("two-gates", "twice", fix="take one")
    broken.line, broken.file = 4, "a.yaml"
    for error in (broken, StepError("died", cell="c")):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert str(copy) == str(error)


def test_rule_is_named_in_the_message() -> None:
    assert str(RuleBroken("two-gates", "twice")) == "twice [rule two-gates]"


def test_suggest_tells_the_nearest_then_all() -> None:
    assert suggest("gats", ["heal", "gates"]) == "did you mean 'gates'? known: heal, gates"
    assert suggest("GPTQ", ["bnb", "gptq"]) == "did you mean 'gptq'? known: bnb, gptq"
    assert suggest("zzz", ["heal", "gates"]) == "known: heal, gates"
    assert suggest("zzz", []) == "none are known here"
