"""`gateskip chat`: messages from the keyboard or a pipe, answers as they are written."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from compose.contract import ChatJob, Message
from compose.errors import UserError
from compose.numbers import PLAIN, duration_text, four_digits
from compose.processes.worker_process import LocalWorker, await_answer, one_worker
from compose.units import printable

BLOCK = '"""'
HELP = f"""\
/help    show this list
/stats   show the token counts of the last answer, and how full the context is
/reset   forget the conversation
/quit    end the chat; /exit, /bye, Ctrl-D and two times Ctrl-C do the same
{BLOCK}      begins and ends a message of several lines
Ctrl-C   stops an answer"""
QUIT = ("/quit", "/exit", "/bye")  # the last is ollama's
LONG_S = 0.5
"""What is worth telling apart from the time of an answer."""
ENDINGS = {"stopped": "stopped", "length": "stopped at the maximum number of tokens"}


def chat(job: ChatJob) -> None:
    """Chat with a model folder until the user ends it.

    Answers go to stdout, all else to stderr. Raises ComposeError where the folder cannot be loaded
    or its process ends.
    """
    notes = Console(stderr=True, highlight=False)
    with one_worker(job) as worker:
        with notes.status("loading the model"):
            await_answer(worker)
        _Chat(worker, notes).run()


def show_text(message: Message) -> None:
    """Print the piece of text in a worker's message, if it has one."""
    if "text" in message:
        terminal = sys.stdout.isatty()
        sys.stdout.write(printable(message["text"]) if terminal else message["text"])
        sys.stdout.flush()


class _Chat:
    """One chat at a terminal, or out of a pipe."""

    def __init__(self, worker: LocalWorker, notes: Console) -> None:
        self._worker, self._notes = worker, notes
        self._last: dict[str, Any] | None = None
        self._commands: dict[str, Callable[[], None]] = {
            "/help": lambda: self._note(HELP),
            "/stats": self._stats,
            "/reset": self._reset,
        }

    def run(self) -> None:
        """Read messages and show answers, until /quit, Ctrl-D, or Ctrl-C twice."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):  # then lines cannot be edited
                import readline  # noqa: F401

            self._note("/help lists the commands")
        interrupted = False
        while True:
            try:
                if not self._turn():
                    return
                interrupted = False
            except KeyboardInterrupt:
                self._notes.print()
                if interrupted:
                    return
                interrupted = True
                self._note("press Ctrl-C again, or Ctrl-D, to end the chat")

    def _turn(self) -> bool:
        """Do what one message or command asks; False where it is the last."""
        try:
            line = _read_line("> ")
        except EOFError:
            return False
        if line.startswith(BLOCK):
            self._say(_read_block(line))
        elif line.startswith("/"):
            if line.strip() in QUIT:
                return False
            self._commands.get(line.strip(), self._unknown)()
        else:
            self._say(line.strip())
        return True

    def _say(self, text: str) -> None:
        if not text:
            return
        try:
            with _on_ctrl_c(self._worker.interrupt):
                self._worker.send({"do": "say", "text": text})
                self._last = await_answer(self._worker, show_text)
        except UserError as error:
            self._notes.print(printable(f"error: {error}"), markup=False, soft_wrap=True)
            return
        print(flush=True)
        for line in turn_lines(self._last):
            self._note(line)

    def _stats(self) -> None:
        if self._last is None:
            self._note("no answer yet")
            return
        self._note(stats_text(self._last))
        self._note(f"  context: {self._last['used']} of {self._last['context']} tokens")

    def _reset(self) -> None:
        self._worker.send({"do": "reset"})
        await_answer(self._worker)
        self._last = None
        self._note("the conversation is forgotten")

    def _unknown(self) -> None:
        self._note(
            f"no such command: /help lists all; to send a text that begins with /, type {BLOCK}/"
        )

    def _note(self, text: str) -> None:
        self._notes.print(printable(text), style="bright_black", markup=False, soft_wrap=True)


def turn_lines(answered: dict[str, Any]) -> list[str]:
    """What to say after an answer: that turns were dropped, if so, and one line of counts."""
    lines = []
    if dropped := answered["dropped"]:
        turns = "the oldest turn was" if dropped == 1 else f"the {dropped} oldest turns were"
        lines.append(
            f"the conversation is longer than the model's context ({answered['context']} tokens):"
            f" {turns} forgotten"
        )
    stats = answered["stats"]
    parts = [f"{answered['tokens']} tokens"]
    if stats.get("decode_s") and answered["tokens"] > 1:
        rate = (answered["tokens"] - 1) / stats["decode_s"]  # the first token is the prompt's
        parts.append(f"{PLAIN.number(rate)} tokens/s")
    if stats.get("drafted"):
        parts.append(f"{stats['accepted']} of {stats['drafted']} drafted tokens accepted")
    if answered["kept"] is not None:
        parts.append(f"{PLAIN.percent(1 - answered['kept'])} skipped")
    if answered["ended"] in ENDINGS:
        parts.append(ENDINGS[answered["ended"]])
    return [*lines, ", ".join(parts)]


def _read_line(prompt: str) -> str:
    """The next line of stdin; raises EOFError at its end, KeyboardInterrupt for Ctrl-C."""
    return input(prompt if sys.stdin.isatty() else "")


def _read_block(first: str) -> str:
    """A message of several lines, up to the closing quotes or the end of stdin."""
    lines = [first.removeprefix(BLOCK)]
    while not lines[-1].rstrip().endswith(BLOCK):
        try:
            lines.append(_read_line(". "))
        except EOFError:
            break
    return "\n".join(lines).strip().removesuffix(BLOCK).strip()


@contextlib.contextmanager
def _on_ctrl_c(stop: Callable[[], None]) -> Iterator[None]:
    """Inside this context Ctrl-C calls `stop` and raises nothing."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def stats_text(answer: dict[str, Any]) -> str:
    """Tokens a second, settings and counts of an answer, in lines."""
    speed = answer["tokens"] / answer["seconds"] if answer["seconds"] else 0.0
    settings = ", ".join(f"{key} {value}" for key, value in answer["settings"].items())
    lines = [f"{answer['tokens']} tokens, {PLAIN.number(speed)} tokens/s, {settings}"]
    if (seconds := answer["preparing_s"]) > LONG_S:
        lines.append(
            f"  the draft model was made in {duration_text(seconds)}, once for each process"
        )
    stats = {key: value for key, value in answer["stats"].items() if value not in (None, {})}
    for key, value in stats.items():
        lines.append(f"  {key}: {four_digits(value) if isinstance(value, float) else value}")
    return "\n".join(lines)
