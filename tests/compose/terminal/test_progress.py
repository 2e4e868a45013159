"""What a run shows while it goes on: live lines, plain lines, `--quiet`, events, TensorBoard."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from compose.terminal.live.events import JsonLines
from compose.terminal.live.progress import Board, takes_live_lines
from compose.terminal.live.timing import Smoothed, TimeLeft
from compose.workers.protocol import Channel

ROOT = Path(__file__).resolve().parents[3]
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
PIPELINE = """\
schema: 1
name: tiny
model: {source: %s, dtype: float32}
data:
  train:       {source: %s, limit: 12, length: 32}
  calibration: {source: %s, limit: 4, length: 32}
stages:
  heal:  {use: heal, steps: 3, validate_every: 0}
  gates: {use: gate, steps: 4, budgets: [0.8], calibration_blocks: 2}
  skip:  {use: skip, budget: 0.8}
pipelines:
  skipping: [heal, gates, skip]
benchmark:
  speed:   {prompt_tokens: 16, new_tokens: 8, repeats: 2, min_seconds: 0.05}
  quality: {perplexity: %s, perplexity_tokens: 1024, own_answers: null}
"""


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


# --- Time left, averages ------------------------------------------------------------------------


def test_time_left_counts_from_the_first_report() -> None:
    left = TimeLeft()
    assert left.update(250, 600, 100.0) is None, "what an earlier run did tells no rate"
    assert left.update(260, 600, 110.0) == pytest.approx(340.0)
    assert left.update(600, 600, 450.0) == 0.0


def test_a_slow_begin_is_forgotten() -> None:
    left = TimeLeft()
    left.update(0, 200, 0.0)
    seconds = [left.update(done, 200, 1000.0 + done) for done in range(1, 101)]
    assert seconds[-1] == pytest.approx(100.0)


def test_an_average_begins_without_bias() -> None:
    mean = Smoothed()
    assert [mean.update(3.0) for _ in range(5)] == pytest.approx([3.0] * 5)
    assert 3.0 < mean.update(5.0) < 4.0


# --- The board ----------------------------------------------------------------------------------


def board_of(stream: io.StringIO, **given: Any) -> Board:
    return Board(Console(file=stream, width=200), **given)


def test_plain_lines_come_at_intervals_and_without_control_codes() -> None:
    out, clock = io.StringIO(), Clock()
    with board_of(out, clock=clock, plain_every_s=20.0).shown() as board:
        line = board.line("heal after narrow")
        for step in range(1, 61):
            clock.now = float(step)
            line.update(step, 60, "training", loss=0.5, tokens_per_s=800.0)
        line.done()
    lines = out.getvalue().splitlines()
    assert lines == [
        "  heal after narrow: training 20/60 · loss 0.500 · 800 tokens/s · 40 s left",
        "  heal after narrow: training 40/60 · loss 0.500 · 800 tokens/s · 20 s left",
        "  heal after narrow: training 60/60 · loss 0.500 · 800 tokens/s",
        "✓ heal after narrow 1 min 00 s",
    ]
    assert not CONTROL.search(out.getvalue().replace("\n", ""))


def test_a_terminal_has_a_line_for_every_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("CI", raising=False)
    out = Terminal()
    with board_of(out).shown() as board:
        one, two = board.line("heal"), board.line("measure dense")
        one.update(1, 9, "training", loss=0.25)
        two.update(3, 8, "scoring answers")
        assert board._live is not None
        board._live.refresh()
        shown = out.getvalue()
        one.done()
        two.failed("no memory")
    assert "training 1/9 · loss 0.250" in shown and "scoring answers 3/8" in shown
    assert re.search("✗.* measure dense .*no memory", out.getvalue())


@pytest.mark.parametrize(
    ("stream", "environment"),
    [
        (Terminal(), {"TERM": "dumb"}),
        (Terminal(), {"TERM": "xterm", "CI": "true"}),
        (io.StringIO(), {"TERM": "xterm", "FORCE_COLOR": "1"}),
    ],
    ids=["dumb", "ci", "pipe-with-colour"],
)
def test_no_live_lines(
    stream: io.StringIO, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CI", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not takes_live_lines(Console(file=stream))


def test_quiet_shows_only_what_failed() -> None:
    out = io.StringIO()
    with board_of(out, quiet=True, plain_every_s=0.0).shown() as board:
        good, bad = board.line("one"), board.line("two")
        good.update(1, 2, "training")
        good.done()
        bad.failed("died")
        board.print("✗ no export of x")
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["two", "no"]


def test_events_smooth_the_loss_and_forget_it_with_the_phase() -> None:
    out, clock = io.StringIO(), Clock()
    board = board_of(io.StringIO(), events=JsonLines(out), clock=clock)
    line = board.line("gates", step="gates")
    for step in (1, 2):
        clock.now = 2.0 * step
        line.update(step, 4, "training", loss=float(step), kept=0.8)
    line.update(1, 3, "calibrating budgets")
    line.done()
    events = [json.loads(text) for text in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["begin", *["progress"] * 3, "done"]
    assert events[2]["loss"] == pytest.approx((0.9 * 0.1 * 1 + 0.1 * 2) / 0.19, abs=1e-4)
    assert events[2]["eta_s"] == 4.0
    assert events[3]["loss"] is None and events[3]["eta_s"] is None
    assert {event["step"] for event in events} == {"gates"}


def test_a_worker_sends_a_phases_first_and_last_report() -> None:
    channel, sent = object.__new__(Channel), list[Any]()
    channel._reported, channel._phase = 0.0, ""
    channel.send = lambda message: sent.append(message["progress"][:3])  # type: ignore[method-assign]
    for phase in ("fetching", "training"):
        for done in range(5):
            channel.progress(done, 4, phase)
    assert sent == [[0, 4, "fetching"], [4, 4, "fetching"], [0, 4, "training"], [4, 4, "training"]]


# --- Quantizing, layer by layer -----------------------------------------------------------------


def test_each_layer_that_gptq_quantizes_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    gptq = pytest.importorskip("gptqmodel.quantization.gptq")
    from compose.stages.quantize.counted import counted

    def quantize(self: Any, again: bool = False) -> str:
        return "twice" if again else gptq.GPTQ.quantize(self, again=True)

    monkeypatch.setattr(gptq.GPTQ, "quantize", quantize)
    seen: list[tuple[int, int, str]] = []
    with counted(lambda *report, **_: seen.append(report), 2, "GPTQ, 4 bits"):
        for _ in range(2):
            assert gptq.GPTQ.quantize(SimpleNamespace()) == "twice"
    assert gptq.GPTQ.quantize is quantize, "taken back"
    assert [done for done, _, _ in seen] == [0, 1, 2]


# --- The command, in a process of its own -------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("progress")
    model = make_tiny("llama")
    rows = [
        {"text": f"The river number {n} runs past the town and to the sea. " * 40}
        for n in range(60)
    ]
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(PIPELINE % (model, text, text, text))
    return folder


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "compose", "run", "tiny.yaml", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.mark.slow
def test_json_lines_of_a_real_run(pipeline: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    done = command(pipeline, "--out", "json", "--json-lines", "--tensorboard")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert "variants measured" in done.stderr
    told = documented_fields()
    for event in events:
        assert set(event) == told[event["event"]] - {"search"}, event["event"]
    progress = [event for event in events if event["event"] == "progress"]
    training = [e for e in progress if e["step"] == "heal+gates" and e["phase"] == "training"]
    assert training and all(e["loss"] > 0 and e["tokens_per_s"] > 0 for e in training)
    assert training[-1]["done"] == training[-1]["total"] == 4
    phases = {(e["job"], e["phase"]) for e in progress}
    assert ("measure dense", "scoring text") in phases
    assert ("speed", "speed") in phases
    turns = [e for e in progress if e["phase"] == "speed"]
    assert turns[-1]["done"] == turns[-1]["total"] - 1
    assert any(e["detail"].endswith("round 2, skipping") for e in turns)
    assert {e["cell"] for e in events if e["event"] == "done"} >= {"dense", "skipping"}
    end = events[-1]
    assert (end["event"], end["exit_code"], end["worked"]) == ("result", 0, True)
    assert {cell["status"] for cell in end["cells"]} == {"ok"}
    assert Path(end["results"]).is_file()
    read_back(pipeline / "json" / "tiny" / "tensorboard")


def documented_fields() -> dict[str, set[str]]:
    """Fields of each event, from the table of docs/progress.md."""
    text = (ROOT / "docs" / "progress.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", text, re.MULTILINE)
    return {name: {"event", *re.findall(r"`(\w+)`", fields)} for name, fields in rows}


def read_back(folder: Path) -> None:
    """The event files hold each step's scalars."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = {}
    for step in folder.iterdir():
        events = EventAccumulator(str(step))
        events.Reload()
        scalars[step.name] = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    heal, gates = scalars["heal"], scalars["heal+gates"]
    assert {"loss", "lr", "tokens_per_s"} <= set(heal)
    assert {"loss", "lr", "budget", "kept", "tokens_per_s"} <= set(gates)
    assert [each.step for each in gates["loss"]] == [1, 2, 3, 4]
    assert all(0 < each.value <= 1 for each in gates["kept"])


@pytest.mark.slow
def test_a_plain_run_has_no_control_codes_and_a_quiet_one_only_its_end(pipeline: Path) -> None:
    plain = command(pipeline, "--out", "plain", "--only", "dense")
    assert plain.returncode == 0, plain.stderr
    assert not CONTROL.search(plain.stdout.replace("\n", ""))
    assert "✓ measure dense" in plain.stdout
    quiet = command(pipeline, "--out", "plain", "--only", "dense", "--again", "--quiet")
    assert quiet.returncode == 0, quiet.stderr
    shown = quiet.stdout.splitlines()
    assert "variants measured." in shown[0]
    assert len(shown) == 5, shown
    assert json.loads(shown[-1])["event"] == "result"


@pytest.mark.slow
def test_a_terminal_gets_live_lines(pipeline: Path) -> None:
    parent, child = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "160"}
    environment.pop("CI", None)
    words = [sys.executable, "-m", "compose", "run", "tiny.yaml", "--out", "plain"]
    words += ["--only", "dense", "--again"]
    process = subprocess.Popen(words, cwd=pipeline, env=environment, stdout=child, stderr=child)
    os.close(child)
    text = b""
    try:
        while part := os.read(parent, 1 << 16):
            text += part
    except OSError:  # Linux, when the other end is closed
        pass
    os.close(parent)
    assert process.wait() == 0, text.decode()
    assert b"\x1b[" in text and b"measure dense" in text
