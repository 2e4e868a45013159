"""Prefixes on disk: reused after a restart, by other processes, and never wrong."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prefix_process import PIECE
from served import LIMITS, SETTINGS, Listener, expected, ids
from tiny_models import save_gated

import gateskip
from gateskip.decoding import prefill
from gateskip.decoding.decoder import Decoder
from gateskip.kernels import ops
from gateskip.serving import slots
from gateskip.serving.identity import identity_of
from gateskip.serving.prefix_files import DIGEST, UNFINISHED_NS, PrefixFiles
from gateskip.serving.requests import Receipt, Request
from gateskip.serving.scheduler import Scheduler

pytestmark = pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here")
ROOT = Path(__file__).resolve().parents[3]
Serve = Callable[..., Scheduler]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "PIECE", PIECE)
    monkeypatch.setattr(slots, "PIECE", PIECE)


def answered(decoder: Decoder, scheduler: Scheduler, prompt: Any, **settings: Any) -> Receipt:
    """The receipt of an answer, whose tokens are those of `generate`."""
    request, heard = Request(prompt=prompt, max_new_tokens=8, **settings), Listener()
    scheduler.submit(request, heard)
    assert heard.end.reason == "length" and heard.tokens == expected(decoder, request)
    return heard.end.receipt


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv"))


@pytest.mark.parametrize("name", [name for name in SETTINGS if "sampled" not in name])
@pytest.mark.parametrize("kind", ["llama-int8", "llama-float32"])
def test_after_a_restart(
    make_decoder: Callable[[str], Decoder], serve: Serve, tmp_path: Path, kind: str, name: str
) -> None:
    """Whole blocks come from disk, up to the last token; prompts that begin alike share them."""
    decoder, limits = make_decoder(kind), replace(LIMITS, prefix_dir=tmp_path)
    system = ids(150, 1)
    texts = [system, system + ids(9, 2), system[:100] + ids(50, 3), ids(40, 4)]
    first = serve(decoder, limits)
    assert answered(decoder, first, system, **SETTINGS[name]).reused_tokens == 0
    first.close()
    assert len(files(tmp_path)) == 2
    reused = []
    for text in texts:
        again = serve(decoder, limits)
        reused.append(answered(decoder, again, text, **SETTINGS[name]).reused_tokens)
        again.close()
    assert reused == [128, 128, 64, 0]


def test_a_prompt_of_whole_blocks_keeps_its_last_token(
    make_decoder: Callable[[str], Decoder], serve: Serve, tmp_path: Path
) -> None:
    """It is read anew, because the answer begins with its state. `skip more` reads prompts at full
    compute, as `plain` does."""
    decoder, limits = make_decoder("llama-int8"), replace(LIMITS, prefix_dir=tmp_path)
    reused = []
    for name in ("plain", "plain", "skip more", "skip", "skip"):
        scheduler = serve(decoder, limits)
        reused.append(answered(decoder, scheduler, ids(128, 7), **SETTINGS[name]).reused_tokens)
        scheduler.close()
    assert reused == [0, 64, 64, 0, 64]


def test_memory_comes_first_and_disk_goes_on(
    make_decoder: Callable[[str], Decoder], serve: Serve, tmp_path: Path
) -> None:
    """A row has the beginning, not in whole blocks; the rest comes from disk."""
    decoder, limits = make_decoder("llama-int8"), replace(LIMITS, prefix_dir=tmp_path)
    if not decoder.skipping.any_pieces:
        pytest.skip("this processor reuses whole pieces only")
    system = ids(180, 1)
    scheduler = serve(decoder, limits)
    answered(decoder, scheduler, system)
    scheduler.close()
    again = serve(decoder, limits)
    assert answered(decoder, again, system[:40]).reused_tokens == 0
    assert answered(decoder, again, system).reused_tokens == 128
    assert answered(decoder, again, system).reused_tokens == 179


@pytest.mark.parametrize("kind", ["gemma2-int8", "gemma2-float32"])
def test_layers_with_a_window(
    make_decoder: Callable[[str], Decoder], serve: Serve, tmp_path: Path, kind: str
) -> None:
    """Their slots are overwritten, so only texts that fit the window are kept."""
    decoder, limits = make_decoder(kind), replace(LIMITS, prefix_dir=tmp_path)
    for size, reused in ((150, 0), (90, 64)):
        for expect in (0, reused):
            scheduler = serve(decoder, limits)
            assert answered(decoder, scheduler, ids(size, 1)).reused_tokens == expect
            scheduler.close()


def test_keys_and_values_in_8_bits(
    make_decoder: Callable[[str], Decoder], serve: Serve, tmp_path: Path
) -> None:
    """They come back, and are not those of the other format."""
    decoder, limits = make_decoder("llama-int8"), replace(LIMITS, prefix_dir=tmp_path)
    reused = []
    for kind in ("model", "int8", "int8"):
        with decoder.skipping.keeping(kind):
            scheduler = serve(decoder, limits)
            reused.append(answered(decoder, scheduler, ids(150, 1)).reused_tokens)
            scheduler.close()
    assert reused == [0, 0, 128]


def test_a_damaged_file(
    make_decoder: Callable[[str], Decoder],
    serve: Serve,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A bit, a missing end, the content of another file: each is noted, and written again."""
    decoder, limits = make_decoder("llama-int8"), replace(LIMITS, prefix_dir=tmp_path)
    prompt = ids(150, 1)
    scheduler = serve(decoder, limits)
    answered(decoder, scheduler, prompt)
    scheduler.close()
    whole = {path: path.read_bytes() for path in files(tmp_path)}
    (one, content), (other, _) = whole.items()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    damages = {one: bytes(flipped)}, {one: content[:-1]}, {one: b""}, {other: content, one: b"x"}
    for damage in damages:
        for path, damaged in damage.items():
            path.write_bytes(damaged)
        caplog.clear()
        scheduler = serve(decoder, limits)
        with caplog.at_level(logging.WARNING):
            assert answered(decoder, scheduler, prompt).reused_tokens < 128
        scheduler.close()
        assert "is damaged" in caplog.text
        scheduler = serve(decoder, limits)
        answered(decoder, scheduler, prompt)
        scheduler.close()
        assert {path: path.read_bytes() for path in files(tmp_path)} == whole


def test_another_model_in_the_same_folder(
    tiny_llama: Path, make_tiny: Callable[..., Path], serve: Serve, tmp_path: Path
) -> None:
    """Other weights, other gates, another type of the same weights."""
    made = [
        gateskip.load(tiny_llama, "float32", "native"),
        gateskip.load(make_tiny("llama", seed=1), "float32", "native"),
        gateskip.load(tiny_llama, "bfloat16", "native"),
    ]
    for budgets in ((0.5,), (0.6,)):
        folder = save_gated(tiny_llama, tmp_path / str(budgets[0]), budgets)
        made.append(gateskip.load(folder, "float32", "native"))
    limits, prompt = replace(LIMITS, prefix_dir=tmp_path / "prefixes"), ids(150, 1)
    for expect in (0, 128):
        for decoder in made:
            scheduler = serve(decoder, limits)
            assert answered(decoder, scheduler, prompt).reused_tokens == expect
            scheduler.close()


def test_one_weight_changes_the_identity_and_its_folder_does_not(
    tiny_llama: Path, tmp_path: Path
) -> None:
    def identity(folder: Path, change: float = 0.0) -> bytes:
        decoder = gateskip.load(folder, "float32", "native")
        with torch.no_grad():
            decoder.skipping.model.model.layers[3].mlp.up_proj.weight[1, 2] += change
        cache = decoder.skipping.new_cache(1, 64)
        return identity_of(decoder, cache)  # type: ignore[arg-type]

    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    assert identity(tiny_llama) == identity(copy) != identity(tiny_llama, 0.001)


@pytest.mark.slow
def test_two_processes(tiny_llama: Path, tmp_path: Path) -> None:
    """They write and read the same files at the same time; a third one reads them later."""
    system = ids(100, 1)
    prompts = [system + ids(60, seed) for seed in (2, 3, 4, 3, 2)] + [ids(150, 5), ids(150, 5)]
    decoder = gateskip.load(tiny_llama, backend="native")
    wanted = [expected(decoder, Request(prompt=p, max_new_tokens=8)) for p in prompts]
    job = {"model": str(tiny_llama), "prefixes": str(tmp_path), "prompts": prompts}
    job["threads"] = torch.get_num_threads()
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "helpers")))
    environment = {**os.environ, "PYTHONPATH": paths}

    def begin() -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "tests" / "helpers" / "prefix_process.py")]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen(command, **pipes, text=True, env=environment)
        assert process.stdin is not None
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        process.stdin = None
        return process

    def end(process: subprocess.Popen[str]) -> list[int]:
        out, _ = process.communicate(timeout=300)
        answers = json.loads(out)
        assert [tokens for tokens, _ in answers] == wanted
        return [reused for _, reused in answers]

    for process in [begin(), begin()]:
        end(process)
    assert end(begin())[-2:] == [128, 128]  # the last rows are written before a process ends


def test_no_request_waits_for_the_disk(
    make_decoder: Callable[[str], Decoder],
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers end while nothing can be written; the copy of a row that others took is dropped."""
    decoder = make_decoder("llama-int8")
    limits = replace(LIMITS, rows=1, prefix_dir=tmp_path)
    free, begun, store = threading.Event(), threading.Event(), PrefixFiles.store

    def late(self: PrefixFiles, *args: Any) -> None:
        begun.set()
        assert free.wait(60)
        store(self, *args)

    monkeypatch.setattr(PrefixFiles, "store", late)
    scheduler = serve(decoder, limits)
    answered(decoder, scheduler, ids(150, 1))
    assert begun.wait(60)
    answered(decoder, scheduler, ids(150, 2))
    answered(decoder, scheduler, ids(150, 3))
    free.set()
    scheduler.close()
    assert len(files(tmp_path)) == 2
    for seed, reused in ((1, 0), (2, 0), (3, 128)):
        scheduler = serve(decoder, limits)
        assert answered(decoder, scheduler, ids(150, seed)).reused_tokens == reused
        scheduler.close()


def test_a_full_disk(
    make_decoder: Callable[[str], Decoder],
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    decoder, limits = make_decoder("llama-int8"), replace(LIMITS, prefix_dir=tmp_path)

    def full(self: PrefixFiles, name: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PrefixFiles, "_write", full)
    scheduler = serve(decoder, limits)
    with caplog.at_level(logging.WARNING):
        answered(decoder, scheduler, ids(150, 1))
        scheduler.close()
    assert "No space left" in caplog.text and not files(tmp_path)


# --- the folder -----------------------------------------------------------------------------------


def names(*numbers: int) -> list[str]:
    return [f"{number:064x}" for number in numbers]


def test_the_oldest_go_first(tmp_path: Path) -> None:
    """Beginnings last longer than what follows them; other files stay."""
    (tmp_path / "notes.txt").write_text("mine")
    stored = PrefixFiles(tmp_path, 4 * (10 + DIGEST))

    def kept() -> set[int]:
        return {int(path.stem, 16) for path in files(tmp_path)}

    def store(*numbers: int) -> None:
        stored.store(names(*numbers), 10, lambda i: bytes([numbers[i]]) * 10)

    store(1, 2, 3)
    assert kept() == {1, 2, 3}
    store(4, 5)
    assert kept() == {1, 2, 4, 5}
    store(1)  # only used
    store(6)
    assert kept() == {1, 4, 5, 6}
    store(7, 8, 9, 10, 11, 12)
    assert kept() == {7, 8, 9, 10}
    assert bytes(stored.read(names(7)[0], 10) or b"") == bytes([7]) * 10
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_unfinished_files_are_removed(tmp_path: Path) -> None:
    """Those of a process that was killed; one that is being written now stays."""
    old, new = (tmp_path / f"{names(1)[0]}.kv-{word}" for word in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    before = new.stat().st_mtime_ns - 2 * UNFINISHED_NS
    os.utime(old, ns=(before, before))
    PrefixFiles(tmp_path, 1000).store(names(1), 10, lambda i: bytes(10))
    assert {path.name for path in tmp_path.iterdir()} == {new.name, f"{names(1)[0]}.kv"}


def test_files_are_private(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    PrefixFiles(folder).store(names(1), 10, lambda i: bytes(10))
    assert folder.stat().st_mode & 0o077 == 0
    assert files(folder)[0].stat().st_mode & 0o077 == 0
