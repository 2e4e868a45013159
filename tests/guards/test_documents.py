"""What the documents tell a reader to type exists, and the stage that they show does its work."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from compose.stages.registry import Stage

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = {"sh", "bash", "console", "shell"}


def _documents() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def _shell_lines() -> list[str]:
    blocks = [b for d in _documents() for b in FENCE.findall(d.read_text("utf-8"))]
    return [line for kind, text in blocks if kind in SHELL for line in text.splitlines()]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert {"quickstart", "test", "test-slow", "check", "bench", "clean"} <= targets
    told = {name for line in _shell_lines() for name in re.findall(r"\bmake ([a-z-]+)", line)}
    assert told <= targets


def test_commands_exist() -> None:
    from typer.main import get_command

    from compose import cli

    known = set(get_command(cli.app).commands)  # type: ignore[attr-defined]
    told = {
        name
        for line in _shell_lines()
        for name in re.findall(r"(?:^|[\s/$;&])gateskip ([a-z][a-z-]*)", line)
    }
    assert told <= known, f"the documents name {sorted(told - known)}"


def test_links_lead_somewhere() -> None:
    broken = []
    for document in _documents():
        text = FENCE.sub("", document.read_text("utf-8"))
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not re.match(r"[a-z]+:", target) and not (document.parent / target).exists():
                broken.append(f"{document.name}: {target}")
    assert not broken, broken


def test_the_page_of_mutants_is_made_by_its_command() -> None:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tools/mutants.py")
    assert spec and spec.loader
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    text = report.PAGE.read_text("utf-8")
    assert report.counts_of(text) and report.page(report.counts_of(text)) == text


def test_every_experiment_has_its_line() -> None:
    """docs/experiments.md has one line for each entry of docs/experiments/, by its heading."""
    entries = {
        f"experiments/{page.name}#{anchor(title)}"
        for page in (ROOT / "docs" / "experiments").glob("*.md")
        for title in re.findall(r"^## (\d{4}-.*)$", page.read_text("utf-8"), re.MULTILINE)
    }
    ledger = (ROOT / "docs" / "experiments.md").read_text("utf-8")
    lines = re.findall(r"^\| \d{4}-\d\d-\d\d \| \[.+\]\((\S+)\) \| .+ \|$", ledger, re.MULTILINE)
    assert len(lines) == len(entries) and set(lines) == entries


def anchor(title: str) -> str:
    """What a heading is linked by."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_anchors_of_experiments_exist() -> None:
    broken = []
    for document in _documents():
        links = re.findall(
            r"\]\(([^)\s]*experiments/\w+\.md)#([^)\s]+)\)", document.read_text("utf-8")
        )
        for path, named in links:
            titles = re.findall(
                r"^## (.+)$", (document.parent / path).read_text("utf-8"), re.MULTILINE
            )
            if named not in map(anchor, titles):
                broken.append(f"{document.name}: {path}#{named}")
    assert not broken, broken


def test_paths_exist() -> None:
    """Files that README and CONTRIBUTING name; docs/structure.md has a guard of its own."""
    example = "compose/stages/clip.py"  # the stage that CONTRIBUTING.md teaches to write
    top = ("gateskip/", "compose/", "reports/", "pipelines/", "tests/", "docs/")
    wrong = [
        f"{name}: {path}"
        for name in ("README.md", "CONTRIBUTING.md")
        for path in re.findall(r"`([\w./-]+)`", (ROOT / name).read_text("utf-8"))
        if path.startswith(top) and path != example and not (ROOT / path).exists()
    ]
    assert not wrong, wrong


def _example_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    (code,) = [block for kind, block in FENCE.findall(text) if kind == "python"]
    file = tmp_path / "clip.py"
    file.write_text(code, "utf-8")
    spec = importlib.util.spec_from_file_location("example_stage", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # pydantic resolves annotations through it
    spec.loader.exec_module(module)
    return module


def test_the_stage_in_contributing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_job: Any
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stage = _example_stage(tmp_path, monkeypatch).ClipWeights(sigmas=2.0)
    assert isinstance(stage, Stage)
    target = tmp_path / "target"
    target.mkdir()
    steps: list[tuple[int, int, str]] = []
    record = stage.run(
        make_job(
            tiny_llama,
            target,
            progress=lambda done, total, note: steps.append((done, total, note)),
        )
    )

    before = AutoModelForCausalLM.from_pretrained(tiny_llama)
    after = AutoModelForCausalLM.from_pretrained(target)
    assert len(AutoTokenizer.from_pretrained(target)) == before.config.vocab_size
    assert record["clipped_share"] == pytest.approx(
        0.0455, abs=0.01
    )  # of a normal distribution, beyond 2 s
    assert steps[-1][:2] == (28, 28)
    old = before.model.layers[0].mlp.up_proj.weight
    new = after.model.layers[0].mlp.up_proj.weight
    limit = 2.0 * old.std().item()
    torch.testing.assert_close(new, old.clamp(-limit, limit))
    assert torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)
