"""`gateskip cache`: list, prune and verify the store of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compose.cli import app
from compose.store import MANIFEST, Store, read_json, write_json

USED, UNUSED, BEGUN = "a" * 16, "b" * 16, "c" * 16


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Two stored steps, one of them named by a run, and the scratch of a third."""
    store = Store(tmp_path / "store")
    for key, names in ((USED, ["source", "drop"]), (UNUSED, ["source"])):
        with store.locked(key), store.write(key) as folder:
            (folder / "model").mkdir()
            (folder / "model" / "model.safetensors").write_text("weights")
            stages = [{"name": name} for name in names]
            write_json(folder / "model" / "compose.json", {"stages": stages})
    (store.work(BEGUN) / "checkpoint.pt").write_text("half")
    write_json(tmp_path / "night" / "plan.json", {"steps": [{"key": USED}]})
    return tmp_path


def call(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["cache", *map(str, words)], env={"COLUMNS": "160"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_list_names_stages_sizes_and_runs(out: Path) -> None:
    code, text = call("list", "--out", out)
    assert code == 0
    (used,) = [line for line in text.splitlines() if USED in line]
    assert "source > drop" in used and "night" in used
    (unused,) = [line for line in text.splitlines() if UNUSED in line]
    assert "none" in unused
    assert "unfinished" in text and "3 steps" in text
    code, text = call("list", "--out", out, "--json")
    assert {entry["key"]: entry["runs"] for entry in json.loads(text)} == {
        **{USED: ["night"], UNUSED: [], BEGUN: []},
    }


def test_an_empty_store_is_no_error(tmp_path: Path) -> None:
    for command in ("list", "prune", "verify"):
        assert call(command, "--out", tmp_path)[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_prune_removes_what_no_run_names(out: Path) -> None:
    code, text = call("prune", "--out", out, "--dry-run")
    assert code == 0 and UNUSED in text and BEGUN in text and USED not in text
    store = Store(out / "store")
    assert store.all_keys() == [USED, UNUSED]
    with store.locked(UNUSED):
        assert f"{UNUSED} is kept" in call("prune", "--out", out)[1]
    call("prune", "--out", out)
    assert store.all_keys() == [USED] and store.unfinished() == {}
    assert store.damage(USED) is None


def test_the_runs_of_a_search_are_runs(out: Path) -> None:
    for rung in ("rung1-a", "rung1-b"):
        plan = out / "fast-search" / "probes" / rung / "plan.json"
        write_json(plan, {"steps": [{"key": UNUSED}]})
    call("prune", "--out", out)
    assert Store(out / "store").all_keys() == [USED, UNUSED]
    text = call("list", "--out", out, "--json")[1]
    assert {entry["key"]: entry["runs"] for entry in json.loads(text)}[UNUSED] == ["fast-search"]


def test_verify_reads_everything_and_exits_with_1_on_damage(out: Path) -> None:
    code, text = call("verify", "--out", out)
    assert code == 0 and text.count("✓") == 2
    path = Store(out / "store").model(UNUSED) / "model.safetensors"
    path.write_text("weighty")
    code, text = call("verify", "--out", out)
    assert code == 1
    assert f"✗ {UNUSED} model/model.safetensors is not what was stored" in text
    assert text.count("✓") == 1


def test_verify_says_what_it_cannot_check(out: Path) -> None:
    path = Store(out / "store").path(USED) / MANIFEST
    manifest: dict[str, Any] = read_json(path)
    write_json(path, {name: manifest[name] for name in ("key", "files", "record")})
    code, text = call("verify", "--out", out)
    assert code == 0 and "no hashes" in text
