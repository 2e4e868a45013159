"""Hostile input: what comes from others is shown as text, and never run, opened or followed.

Names, reasons, tokens and logs that hold markup and control sequences go through every output; job
files, archives and caches that others may have written are refused.
"""

from __future__ import annotations

import io
import os
import re
import stat
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from report_data import made_up_results, with_evidence
from rich.console import Console
from typer.testing import CliRunner

from compose.assets import fetch
from compose.cli import app
from compose.contract import CheckJob, read_job
from compose.errors import StepError, UserError
from compose.outputs.run_folder import RunFolder
from compose.processes.endings import failure_of
from compose.results.schema import Results
from compose.run.runner import RunResult
from compose.terminal import show
from compose.terminal.bench import print_bench
from compose.terminal.live.progress import Board
from compose.terminal.shown import shown
from compose.units import printable

ROOT = Path(__file__).resolve().parents[2]
ESCAPES = "\x1b[31m\x1b]0;title\x07\x9b2J\r\x00\u202e"
HTML = "<script>alert(1)</script><img src=x onerror=alert(1)>"
MARKDOWN = "[a](javascript:x) ![b](x) | c ` d\n# e"
HOSTILE = f"cell{ESCAPES}{HTML}[red]{MARKDOWN}[/] $x^2$ \\"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def hostile_results() -> Results:
    """Made-up results, in which texts that a stranger could choose are hostile.

    Pages and pictures of such results are in test_reports.py.
    """
    raw: dict[str, Any] = with_evidence(made_up_results())
    raw |= {"run": HOSTILE, "model": HOSTILE, "command": HOSTILE, "notes": [HOSTILE]}
    for number, cell in enumerate(raw["cells"][1:4]):
        cell["name"] = f"{number} {HOSTILE}"
    raw["cells"][0]["quality"]["tasks"][HOSTILE] = {"metric": HOSTILE, "value": 0.5}
    for cell in raw["cells"]:
        if cell["status"] == "failed":
            cell |= {"reason": HOSTILE, "traceback": HOSTILE, "failed_in": HOSTILE}
    return Results.model_validate(raw)


def test_the_terminal_gets_no_control_sequence_of_theirs() -> None:
    results = hostile_results()
    out = Console(file=io.StringIO(), width=400, force_terminal=False)
    out.print(show.verdict_table(results.cells))
    for cell in results.measured:
        out.print(show.cell_text(results, cell))
    print_bench(out, results)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "cell" in text
    assert not CONTROL.search(text)
    assert "[red]" in text, "markup of theirs is text"


def test_folders_are_shown_as_text(tmp_path: Path) -> None:
    """Brackets in the name of a folder are no markup: `[red]` would vanish, `[/]` would raise."""
    folder = tmp_path / "[red]runs" / "[x]"
    out = Console(file=io.StringIO(), width=400, force_terminal=False)
    results = Results.model_validate(made_up_results())
    show.print_result(out, RunResult(0, RunFolder(folder), results, worked=True))
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert f"{folder / 'results.json'}\n" in text
    done = CliRunner().invoke(app, ["cache", "list", "--out", str(folder)], env={"COLUMNS": "400"})
    assert str(folder / "store") in done.output


def test_a_board_shows_names_and_logs_as_text() -> None:
    out = Console(file=io.StringIO(), width=400, force_terminal=False)
    board = Board(out, plain_every_s=0)
    line = board.line(HOSTILE)
    line.update(1, 2, HOSTILE, detail=HOSTILE)
    line.failed(HOSTILE)
    board.print(HOSTILE)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert not CONTROL.search(text)
    assert text.count("[red]") >= 4


def test_a_token_heat_map_is_text() -> None:
    from reports.insight import to_html

    tokens = [
        {"text": HOSTILE, "compute": 0.5, "kind": "word"},
        {"text": "b", "compute": 1.0, "kind": HOSTILE},
    ]
    kinds = {HOSTILE: {"tokens": 1, "compute": 0.5}}
    found = {"tokens": tokens, "budget": 0.8, "summary": {"kinds": kinds}}
    page = to_html(found, HOSTILE)
    assert "<script>alert" not in page and "<img" not in page
    assert not CONTROL.search(page)
    out = Console(file=io.StringIO(), width=400, force_terminal=False)
    show.print_insight(out, found)
    assert not CONTROL.search(out.file.getvalue())  # type: ignore[attr-defined]


def test_a_failure_keeps_no_control_sequence() -> None:
    error = StepError(f"a library said {HOSTILE}")
    error.add_note(f"Traceback {HOSTILE}")
    failure = failure_of(error, "gates")
    assert not CONTROL.search(failure.reason + str(failure.traceback))
    assert HTML in failure.reason


def test_an_error_of_the_command_line_is_printable(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["validate", str(tmp_path / f"no{ESCAPES[:6]}.yaml")])
    assert done.exit_code == 2
    assert not CONTROL.search(done.stderr)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]0;title\x07text", "text"),
        ("a\rb", "ab"),
        ("a\x9bb\x85c", "abc"),
        ("a\u202eb\u2066c", "abc"),
        ("a\ud800b", "ab"),
        ("naïve 漢字 🙂", "naïve 漢字 🙂"),
        ("\x1b", ""),
    ],
)
def test_printable(text: str, wanted: str) -> None:
    assert printable(text) == wanted


def test_markup_is_text() -> None:
    out = Console(file=io.StringIO(), width=100, force_terminal=False)
    out.print(shown("[bold]a[/bold] [link=x]b[/link]"))
    assert out.file.getvalue() == "[bold]a[/bold] [link=x]b[/link]\n"  # type: ignore[attr-defined]


def test_a_model_card_is_one_cell_a_value() -> None:
    from compose.outputs.export import _on_card

    assert _on_card(HOSTILE) == printable(_on_card(HOSTILE))
    assert "\n" not in _on_card(HOSTILE) and "<" not in _on_card(HOSTILE)
    assert "`" not in _on_card(HOSTILE) and " | " not in _on_card(HOSTILE)
    assert _on_card(3) == 3


# --- Files of others -----------------------------------------------------------------------------


def _job(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)
    file = folder / "a.step.json"
    file.write_text('{"folder": "a", "reference": "b"}')
    return file


def test_a_job_of_ones_own_is_read(tmp_path: Path) -> None:
    file = _job(tmp_path / "jobs")
    assert read_job("check", file) == CheckJob(Path("a"), Path("b"))
    file.chmod(0o666)
    assert read_job("check", file) == CheckJob(Path("a"), Path("b")), (
        "nobody else gets into its folder"
    )


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o775, 0o1777, 0o722])
def test_a_job_in_a_folder_that_others_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    file = _job(tmp_path / "jobs")
    file.parent.chmod(mode)
    with pytest.raises(UserError, match="open to other users to write to, so what it asks for"):
        read_job("check", file)


def test_a_job_that_others_write_to_is_refused(tmp_path: Path) -> None:
    file = _job(tmp_path / "jobs")
    file.parent.chmod(0o755)
    assert read_job("check", file) == CheckJob(Path("a"), Path("b"))
    file.chmod(0o666)
    with pytest.raises(UserError, match="open to other users"):
        read_job("check", file)


def test_another_users_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _job(tmp_path / "jobs")
    other = os.stat(file).st_uid + 1
    if os.geteuid() == 0:
        os.chown(file.parent, 12345, -1)
    else:
        monkeypatch.setattr("compose.contract.os.geteuid", lambda: other)
    with pytest.raises(UserError, match="another user's"):
        read_job("check", file)


def test_a_worker_answers_such_a_job_with_a_refusal(tmp_path: Path) -> None:
    from compose.processes.worker_process import LocalWorker, await_answer

    file = _job(tmp_path / "jobs")
    file.parent.chmod(0o777)
    worker = LocalWorker("check", file, tmp_path / "a.log", 1)
    try:
        with pytest.raises(UserError, match="open to other users"):
            await_answer(worker)
    finally:
        worker.stop()


def test_the_jobs_of_a_run_are_private(tmp_path: Path) -> None:
    from compose.outputs.run_folder import RunFolder
    from compose.run.state import RunWorkers

    class Nothing:
        def start(self, *_: Any, **__: Any) -> Any:
            return object()

    folder = RunFolder(tmp_path / "run")
    RunWorkers(Nothing(), folder).start("a", CheckJob(Path("a"), Path("b")))  # type: ignore[arg-type]
    assert stat.S_IMODE(folder.job("a.check").parent.stat().st_mode) == 0o700


def test_an_archive_never_leaves_its_folder(tmp_path: Path) -> None:
    archive, target = tmp_path / "a.whl", tmp_path / "in" / "target"
    with zipfile.ZipFile(archive, "w") as made:
        for name in ("../out.txt", "/tmp/absolute.txt", "data/../../out.txt", "data/a.txt"):
            made.writestr(name, "x")
        link = zipfile.ZipInfo("data/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        made.writestr(link, "/etc/passwd")
    target.mkdir(parents=True)
    fetch._unpack(archive, target, ("*",))
    inside = {path.resolve() for path in tmp_path.rglob("*") if path.is_file()}
    assert all(path == archive or target.resolve() in path.parents for path in inside)
    assert not any(path.is_symlink() for path in target.rglob("*"))
    assert (target / "data" / "a.txt").read_text() == "x"


def test_no_module_unpickles_evaluates_or_asks_a_shell() -> None:
    """A look at every line: what is found is listed here with the reason why it may stand."""
    dangerous = re.compile(
        r"\bpickle\.|\beval\(|\bexec\(|os\.system|shell=True|torch\.load\(|yaml\.load\(|"
        r"trust_remote_code=True|marshal\.|shelve\.|joblib\.load|np\.load\("
    )
    allowed = {
        "gateskip/training/loop.py": "weights_only=True",  # its own checkpoint, tensors alone
    }
    found = []
    for package in ("gateskip", "compose", "reports"):
        for file in sorted((ROOT / package).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                code = line.replace(".eval()", "").partition("#")[0]
                if dangerous.search(code) and allowed.get(name, "\0") not in line:
                    found.append(f"{name}:{number}: {line.strip()}")
    known = {
        "compose/artifacts/bundle.py",  # a docstring on how exports are loaded elsewhere
        "compose/bench/quality/sandboxed.py",  # a model's code, with allow_code and limits
    }
    assert [each for each in found if each.split(":")[0] not in known] == []


def test_a_pipeline_in_a_hostile_place_runs_nothing(tmp_path: Path) -> None:
    """Names with a shell's signs are names."""
    folder = tmp_path / "$(touch x);`touch y`"
    folder.mkdir()
    file = folder / "p.yaml"
    file.write_text("schema: 1\nname: x\nmodel: {source: smollm2-135m-instruct}\nmatrix: default\n")
    done = CliRunner().invoke(app, ["validate", str(file)])
    assert done.exit_code == 0, done.output
    assert [path.name for path in folder.iterdir()] == ["p.yaml"]
    assert sys.flags.interactive == 0
