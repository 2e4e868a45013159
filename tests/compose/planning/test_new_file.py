"""`gateskip new`: a file that validates and plans as it is, for every kind of model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gguf_files import converted

from compose.errors import ArtifactError, AssetError, UserError
from compose.language.parse import load_pipeline
from compose.planning.new_file import pipeline_text, write_new_file
from compose.planning.prepare import load_plan


def test_the_file_validates_and_plans_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "my" / "first model!.yaml"
    write_new_file(file, "smollm2-135m-instruct")
    plan = load_plan(file, tmp_path / "cache")
    assert plan.pipeline.name == "first-model-"
    assert [cell.name for cell in plan.cells] == ["dense", "int8", "int4", "int4+drafts"]
    assert plan.left_out == ()
    assert plan.pipeline.export["int4"].to == "exports/first-model-"


def test_the_file_is_short_and_explains_every_line() -> None:
    lines = pipeline_text("first", "smollm2-135m-instruct").splitlines()
    assert len(lines) < 40 and max(map(len, lines)) <= 100
    explained = [lines.index(line) for line in lines if "#" not in line]
    assert all(lines[number - 1].lstrip().startswith("#") for number in explained)
    assert [lines[number].split()[0] for number in explained] == ["name:", "source:", "int4:"]


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("mine")
    with pytest.raises(UserError, match=r"a\.yaml exists already, and is not overwritten\n  fix: "):
        write_new_file(file, "smollm2-135m-instruct")
    with pytest.raises(UserError, match="cannot be written"):
        write_new_file(file / "b.yaml", "smollm2-135m-instruct")
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("smollm2-135m-instrct", AssetError, "did you mean 'smollm2-135m-instruct'"),
        ("./nowhere/model", AssetError, "there is no model folder './nowhere/model'"),
        ("nowhere.gguf", ArtifactError, "nowhere.gguf"),
    ],
)
def test_a_model_that_does_not_exist_is_refused(
    model: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.yaml"
    with pytest.raises(error, match=re.escape(message)):
        write_new_file(file, model)
    assert not file.exists()


def test_a_folder_that_is_not_whole_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(AssetError, match="no weights"):
        write_new_file(tmp_path / "a.yaml", str(tmp_path / "model"))


def test_a_relative_folder_is_named_from_the_file(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a #1").symlink_to(tiny_llama)
    monkeypatch.chdir(tmp_path)
    file = Path("files/123.yaml")
    write_new_file(file, "a #1")
    plan = load_plan(file, tmp_path / "cache")
    assert plan.pipeline.name == "123", "text, though YAML would read a number"
    assert plan.pipeline.model.source == str(tmp_path / "a #1")
    assert len(plan.cells) == 4


def test_a_hub_id_is_taken_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    write_new_file(file, "owner/name@main")
    assert load_pipeline(file).model.source == "owner/name@main"


def test_a_gguf_file_is_taken(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    write_new_file(file, str(converted(tiny_llama, tmp_path / "tiny.gguf", "Q4_1")))
    assert len(load_plan(file, tmp_path / "cache").cells) == 4
