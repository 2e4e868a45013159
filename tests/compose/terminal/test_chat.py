"""Chatting: history, the model's context, whole characters, and Ctrl-C, on tiny models."""

from __future__ import annotations

import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_models import save_gated
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import gateskip
from compose.bench.conversation import Conversation, StopRequest
from compose.bench.generate import answer, answer_ids, answer_text, chat_ids
from compose.bench.text_stream import TextStream
from compose.errors import ArtifactError, UserError
from compose.terminal import chat as terminal_chat
from compose.terminal.chat import turn_lines
from compose.units import printable
from gateskip.runtime.backend import BackendName

ROOT = Path(__file__).resolve().parents[3]
WRITTEN = "Grüße aus München 😀, 日本語 und\n\n    vier Leerzeichen."
LONG = 16384


@pytest.fixture
def tiny(make_tiny: Callable[..., Path]) -> Path:
    return make_tiny("llama")


@pytest.fixture
def load(tiny: Path) -> Callable[..., Conversation]:
    """`load(max_new_tokens=8, folder=…)`: a conversation with a loaded model."""

    def make(max_new_tokens: int = 16, folder: Path = tiny, **settings: Any) -> Conversation:
        conversation = Conversation(folder, max_new_tokens, **settings)
        conversation.load()
        return conversation

    return make


# --- text while it is written -------------------------------------------------------------------


def _pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    for token in tokens:
        stream.add(token)
    stream.finish(answer_text(tokenizer, tokens))
    return pieces


def test_pieces_are_whole_characters(load: Callable[..., Conversation]) -> None:
    tokenizer = load().decoder.tokenizer
    tokens = tokenizer(f"  {WRITTEN}\n").input_ids
    assert len(tokens) > len(WRITTEN) / 2  # characters of several tokens are among them
    pieces = _pieces(tokenizer, tokens)
    assert "".join(pieces) == WRITTEN
    assert len(pieces) > 20
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    end = tokenizer("Smile 😀").input_ids[:-1]
    assert "".join(_pieces(tokenizer, end)) == answer_text(tokenizer, end)


def test_pieces_of_any_tokens_are_their_text(load: Callable[..., Conversation]) -> None:
    tokenizer, draw = load().decoder.tokenizer, random.Random(0)
    for _ in range(200):
        tokens = [draw.randrange(512) for _ in range(draw.randrange(1, 40))]
        assert "".join(_pieces(tokenizer, tokens)) == answer_text(tokenizer, tokens)


def _byte_fallback() -> Any:
    """A tokenizer as Llama 2 and Gemma have one: bytes are tokens, spaces are part of words."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁a", "b", ",", "日"]
    vocabulary = {word: place for place, word in enumerate(words)}
    model = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_bytes_that_are_no_character_end_no_answer() -> None:
    tokenizer, draw = _byte_fallback(), random.Random(0)
    size = len(tokenizer)
    smile = [1 + byte for byte in "😀".encode()]
    words = [size - 5, *smile, size - 4, size - 3, size - 2, size - 1, *smile]
    assert _pieces(tokenizer, words) == ["the", "😀", " a", "b", ",", "日", "😀"]
    broken = [size - 3, *smile[:2], size - 2, size - 4]
    assert _pieces(tokenizer, broken) == ["b", "\N{REPLACEMENT CHARACTER}" * 2 + ",", " a"]
    for _ in range(300):
        tokens = [draw.randrange(1, size) for _ in range(20)] + words
        assert "".join(_pieces(tokenizer, tokens)).endswith("the😀 ab,日😀")


def test_an_answer_is_given_while_it_is_written(tiny: Path) -> None:
    pieces: list[str] = []
    whole = answer(tiny, "What now?", max_new_tokens=24, on_text=pieces.append)
    assert "".join(pieces) == whole["text"]
    assert len(pieces) > 8


# --- turns and the context ----------------------------------------------------------------------


def test_an_answer_continues_all_turns(load: Callable[..., Conversation]) -> None:
    conversation = load()
    pieces: list[str] = []
    first = conversation.say("Who are you?", pieces.append)
    assert "".join(pieces) == first["text"]
    second = conversation.say("And now?", pieces.append)
    turns = [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": "And now?"},
    ]
    ids = chat_ids(conversation.decoder.tokenizer, turns)
    alone = answer_ids(
        conversation.decoder, conversation.settings, ids, lambda _: None, max_new_tokens=16
    )
    assert second["text"] == alone["text"]
    assert second["used"] == len(ids) + second["tokens"]
    assert conversation.messages[:3] == turns
    conversation.reset()
    assert conversation.say("Who are you?", pieces.append)["text"] == first["text"]


def test_the_oldest_turns_are_forgotten_when_they_no_longer_fit(
    load: Callable[..., Conversation],
) -> None:
    for speculate in (False, True):
        conversation = load(max_new_tokens=40, speculate=speculate)
        dropped = 0
        for turn in range(14):
            message = f"Message {turn} of a long conversation."
            answered = conversation.say(message, lambda _: None)
            assert answered["used"] <= answered["context"] < 512
            dropped += answered["dropped"]
            assert len(conversation.messages) == 2 * (turn + 1 - dropped)
            assert conversation.messages[-2]["content"] == message
        assert 0 < dropped < 14


def test_a_message_that_does_not_fit_is_refused_and_nothing_forgotten(
    load: Callable[..., Conversation],
) -> None:
    conversation = load()
    conversation.say("Hello", lambda _: None)
    before = list(conversation.messages)
    with pytest.raises(UserError, match=r"the message has \d+ tokens; the model takes \d+"):
        conversation.say("too long " * 400, lambda _: None)
    assert conversation.messages == before


def test_a_folder_without_a_chat_template_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ArtifactError, match="plain has no chat template") as raised:
        Conversation(folder, 8).load()
    assert "gateskip generate" in str(raised.value)


def test_a_turn_ends_in_one_line_of_what_applies(
    load: Callable[..., Conversation], tiny: Path, tmp_path: Path
) -> None:
    gated = save_gated(tiny, tmp_path / "gated", (0.5,), decode={"mode": "skip", "budget": 0.5})
    (skipped,) = turn_lines(load(24, folder=gated).say("Hello", lambda _: None))
    assert "24 tokens, " in skipped and " tokens/s, " in skipped and " % skipped" in skipped
    assert "drafted" not in skipped
    (plain,) = turn_lines(load(24).say("Hello", lambda _: None))
    assert "tokens/s" in plain and "skipped" not in plain and "drafted" not in plain
    answered = load(24).say("Hello", lambda _: None)
    drafted = answered | {"dropped": 2, "stats": answered["stats"] | {"drafted": 9, "accepted": 4}}
    forgotten, line = turn_lines(drafted)
    assert "the 2 oldest turns were forgotten" in forgotten
    assert "4 of 9 drafted tokens accepted" in line


# --- Ctrl-C -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "gathered"])
@pytest.mark.parametrize("speculate", [False, True])
def test_a_signal_stops_the_answer_and_keeps_its_part(
    load: Callable[..., Conversation],
    make_tiny: Callable[..., Path],
    backend: BackendName,
    speculate: bool,
) -> None:
    folder = make_tiny("llama", max_position_embeddings=LONG)
    conversation = load(LONG, folder=folder, speculate=speculate)
    conversation.decoder = gateskip.load(folder, backend=backend)
    pieces: list[str] = []

    def stop_soon(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    stopped = conversation.say("Hello", stop_soon)
    assert signal.getsignal(signal.SIGINT) is before
    assert stopped["ended"] == "stopped" and stopped["tokens"] < 200
    assert "".join(pieces) == stopped["text"] == conversation.messages[-1]["content"]
    assert turn_lines(stopped) == [f"{stopped['tokens']} tokens, stopped"]
    conversation.max_new_tokens = 8
    assert conversation.say("Hello again", pieces.append)["ended"] in ("length", "done")
    assert len(conversation.messages) == 4


def test_a_signal_while_the_prompt_is_read_is_raised_once() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            stop.check()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


# --- the command --------------------------------------------------------------------------------

SCRIPT = '''\
Hello
/stats
"""
one line
/another
"""
/unknown
/reset
/help
/quit
not read
'''


def _command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-P", "-m", "compose", *map(str, arguments)]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "200"}


def _piped(*arguments: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(*arguments),
        input=text,
        capture_output=True,
        encoding="utf-8",
        env=_environment(),
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_a_scripted_chat(tiny: Path, load: Callable[..., Conversation]) -> None:
    done = _piped("chat", tiny, "--max-new-tokens", "12", text=SCRIPT)
    assert done.returncode == 0
    conversation = load(12)
    answers = [
        conversation.say(message, lambda _: None)["text"]
        for message in ("Hello", "one line\n/another")
    ]
    assert done.stdout == "".join(f"{each}\n" for each in answers)
    for words in (
        "tokens/s",
        "prompt_tokens: ",
        "context: ",
        "no such command",
        "the conversation is forgotten",
        "Ctrl-C   stops an answer",
    ):
        assert words in done.stderr
    assert "not read" not in done.stderr and "\x1b" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["/quit", "/exit", "/bye ", "/help"])
def test_words_that_end_a_chat(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this program and of its neighbours; all other commands go on."""
    monkeypatch.setattr(terminal_chat, "_read_line", lambda prompt: command)
    no_worker: Any = None  # none of these asks the model
    chat = terminal_chat._Chat(no_worker, Console(stderr=True))
    assert chat._turn() == (command == "/help")


def test_chat_refuses_what_is_no_model(tmp_path: Path) -> None:
    done = _piped("chat", tmp_path / "absent", text="Hello\n")
    assert done.returncode == 2
    assert "no folder" in done.stderr and done.stdout == ""


class _Terminal:
    """A command at a terminal of its own."""

    def __init__(self, *arguments: str | Path) -> None:
        self.seen, self._ended = "", False
        self._pid, self._end = pty.fork()
        if self._pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a CI may ignore it
            command = _command(*arguments)
            os.execve(command[0], command, _environment())

    def type(self, text: str, after: float = 0.3) -> None:
        """Send keys, after which only later output counts."""
        time.sleep(after)  # readline misses a signal between its prompt and its wait
        self.seen = ""
        os.write(self._end, text.encode())

    def wait_for(self, words: str, at_least: int = 0, seconds: float = 60) -> None:
        """Read until `words` are seen, and so many characters."""
        end = time.monotonic() + seconds
        while words not in self.seen or len(self.seen) < at_least:
            assert time.monotonic() < end, self.seen
            assert self._read(), f"it ended after {self.seen}"

    def _read(self) -> bool:
        if not select.select([self._end], [], [], 1)[0]:
            return True
        try:
            data = os.read(self._end, 1 << 16)
        except OSError:  # the other end is closed
            return False
        self.seen += data.decode("utf-8", "replace")
        return bool(data)

    def ends_with(self) -> int:
        """Read the rest; the exit code."""
        end = time.monotonic() + 60
        while self._read():
            assert time.monotonic() < end, self.seen
        _, status = os.waitpid(self._pid, 0)
        self._ended = True
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """Hang up, and end what still runs."""
        if not self._ended:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._end)


@pytest.fixture
def terminal() -> Iterator[Callable[..., _Terminal]]:
    opened: list[_Terminal] = []

    def open_one(*arguments: str | Path) -> _Terminal:
        opened.append(_Terminal(*arguments))
        return opened[-1]

    yield open_one
    for each in opened:
        each.close()


def _endless(source: Path, folder: Path) -> Path:
    """A model whose answers do not end: the logit of the token that ends them is 0."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][AutoTokenizer.from_pretrained(folder).eos_token_id] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_twice_ends_the_chat(
    make_tiny: Callable[..., Path], terminal: Callable[..., _Terminal], tmp_path: Path
) -> None:
    folder = _endless(make_tiny("qwen2", max_position_embeddings=LONG), tmp_path / "endless")
    chat = terminal("chat", folder, "--max-new-tokens", LONG)
    chat.wait_for("> ")
    chat.type("Hello\r")
    chat.wait_for("Hello\r\n", at_least=60)
    chat.type("\x03", after=0)
    chat.wait_for("tokens, stopped")
    chat.wait_for("> ")
    chat.type("\x03")
    chat.wait_for("to end the chat")
    chat.wait_for("> ")
    chat.type("/stats\r")
    chat.wait_for("context: ")
    chat.wait_for("> ")
    chat.type("\x03")
    chat.wait_for("to end the chat")
    chat.wait_for("> ")
    chat.type("\x03")
    assert chat.ends_with() == 0


@pytest.mark.slow
def test_generate_streams_the_same_text_to_a_terminal(
    tiny: Path, terminal: Callable[..., _Terminal]
) -> None:
    asked = ("generate", tiny, "What now?", "--max-new-tokens", "24")
    shown = terminal(*asked)
    assert shown.ends_with() == 0
    assert shown.seen.replace("\r\n", "\n") == printable(_piped(*asked).stdout)
