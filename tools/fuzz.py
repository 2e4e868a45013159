"""Fuzzing what reads files of others: `make fuzz SECONDS=60`, or this file with --target NAME.

Each target is fed mutated copies of good inputs. It may take an input or refuse it by its own
exception, in a second. Anything else, another exception or a long time, is a finding: the input and
the traceback are kept in build/fuzz, and the exit code is 1. One seed gives one sequence of inputs.

    pipeline      YAML to a plan                     compose.language, compose.planning
    gates         gates.safetensors to gates         gateskip.checkpoint.read_gates
    gates-meta    gateskip.json beside them          gateskip.checkpoint.load_gates
    safetensors   the header of a weight file        compose.artifacts.safetensors_header
    gguf          the header of a GGUF file          compose.artifacts.gguf.file
    results       results.json of a run              compose.results.io
    texts         lines of JSON to rows of text      compose.assets.texts
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from compose.errors import UserError  # noqa: E402
from gateskip.errors import FormatError  # noqa: E402

LIMIT_S = 1.0
"""Processor time that one input may take."""
HANG_S = 20.0
"""Seconds of processor time after which an input is broken off."""
MEMORY_BYTES = 3 << 30
LONGEST = 1 << 16
"""Bytes of an input: a mutation that doubles ends here."""


@dataclass(frozen=True)
class Target:
    """Something that reads a file."""

    name: str
    read: Callable[[Path], object]
    """Takes the file, or raises UserError or FormatError."""
    file: str
    """What the file is called."""
    seeds: Sequence[bytes]
    """Good inputs."""
    words: Sequence[bytes] = ()
    """What a mutation may insert: the grammar's own signs."""
    beside: dict[str, bytes] = field(default_factory=dict)
    """Other files of the folder."""


@dataclass
class Tally:
    """What came of a target."""

    inputs: int = 0
    taken: int = 0
    findings: int = 0
    slowest_s: float = 0.0


# --- Targets -------------------------------------------------------------------------------------

YAML_WORDS = (
    *(b"&a ", b"*a", b"<<: ", b"!!int ", b"!!float ", b"!!null ", b"!!binary ", b"!x "),
    *(b"[", b"]", b"{", b"}", b"- ", b": ", b"? ", b"|\n", b">-\n", b",", b"#", b"'", b'"'),
    *(b"%YAML 1.1\n", b"---\n", b"...\n", b".nan", b".inf", b"-.inf", b"1e999", b"~", b"null"),
    *(b'"\\0"', b'"\\ud800"', b'"\\e"', b"\t", b"\r", b"\r\n", b"\xef\xbb\xbf", b"0x1", b"0o7"),
    *(b"9" * 50, b"use: ", b"none", b"dense", b"default", b"self-written", b"../", b"\n  "),
)
JSON_WORDS = (
    *(b"{", b"}", b"[", b"]", b":", b",", b'"', b"null", b"true", b"NaN", b"Infinity", b"1e999"),
    *(b"-1", b"0", b"9" * 50, b'"\\ud800"', b'"\\u0000"', b"{}", b"[]", b'""', b"0.5", b"\xff"),
)
NUMBERS = (0, 1, 2, 3, 8, 9, 13, 127, 255, 256, 1 << 15, (1 << 31) - 1, 1 << 31, 1 << 32)
NUMBERS += ((1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def _pipeline(file: Path) -> object:
    from compose.language.parse import load_pipeline
    from compose.planning.planner import make_plan

    return make_plan(load_pipeline(file))


def _gates(file: Path) -> object:
    from gateskip.checkpoint import read_gates

    return read_gates(file)


def _gates_meta(file: Path) -> object:
    from gateskip.checkpoint import load_gates, stored_decode

    return load_gates(file.parent), stored_decode(file.parent)


def _safetensors(file: Path) -> object:
    from compose.artifacts.safetensors_header import stored_tensors

    return stored_tensors(file)


def _gguf(file: Path) -> object:
    from compose.artifacts.gguf.file import open_gguf
    from compose.artifacts.gguf.read import check_gguf_source
    from compose.errors import ArtifactError

    header = open_gguf(file)
    with contextlib.suppress(ArtifactError):  # a whole file of no known model
        check_gguf_source(file)
    return header


def _results(file: Path) -> object:
    from compose.results.io import load_results

    return load_results(file)


def _texts(file: Path) -> object:
    from compose.assets import load_texts

    return load_texts(str(file))


def _gate_files() -> tuple[bytes, bytes]:
    """gates.safetensors and gateskip.json of small gates with shortcuts."""
    from gateskip.checkpoint import GATES_FILE, META_FILE, GateFile, save_gates
    from gateskip.gates.kinds import make_gates
    from gateskip.gates.shortcuts import Shortcuts

    gates = make_gates("scalar", 4, 8)
    gates.shortcuts = Shortcuts(4, 8, 2)
    with tempfile.TemporaryDirectory() as folder:
        file = GateFile(gates, "project", {0.8: [0.5] * 4, 0.5: [float("inf")] * 4}, {0.8: 0.81})
        save_gates(Path(folder), file)
        return (Path(folder) / GATES_FILE).read_bytes(), (Path(folder) / META_FILE).read_bytes()


def _gguf_file() -> bytes:
    """A file with text, numbers, lists and two tensors, by the package that llama.cpp uses."""
    import numpy as np
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.gguf"
        writer = GGUFWriter(file, "llama")
        writer.add_name("small")
        writer.add_block_count(2)
        writer.add_context_length(8)
        writer.add_embedding_length(32)
        writer.add_feed_forward_length(8)
        writer.add_head_count(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["a", "b", "cd"])
        writer.add_array("scores", [0.5, 1.0])
        writer.add_tensor("token_embd.weight", np.ones((3, 32), dtype=np.float32))
        writer.add_tensor("blk.0.ffn_up.weight", np.ones((2, 32), dtype=np.float32))
        writer.add_tensor("output_norm.weight", np.ones(8, dtype=np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file.read_bytes()


def _small_results() -> bytes:
    """Two cells of a published run, short enough to be mutated everywhere."""
    file = min(
        (ROOT / "reports" / "published").glob("*/results.json"), key=lambda f: f.stat().st_size
    )
    run = json.loads(file.read_text(encoding="utf-8"))
    run["cells"] = run["cells"][:2]
    return json.dumps(run).encode()


def targets() -> dict[str, Target]:
    """All targets by name."""
    folder = ROOT / "pipelines"
    pipelines = [  # a study names the files beside its folder
        file.read_bytes().replace(b"../", b"") for file in sorted(folder.rglob("*.yaml"))
    ]
    named = {file.relative_to(folder).as_posix(): b"" for file in folder.glob("*/*.safetensors")}
    anchors = (
        b"name: x\nmodel: &m {source: a}\nstages:\n  a: &a {use: heal}\n  b: {<<: *a, steps: 3}\n"
        b"pipelines: {b: [b]}\n"
    )
    gates, meta = _gate_files()
    rows = [
        {"text": "a"},
        {"prompt": "b", "response": "c"},
        {"messages": [{"role": "user", "content": "d"}]},
    ]
    lines = "\n".join(map(json.dumps, rows)).encode()
    made = (
        Target("pipeline", _pipeline, "p.yaml", [*pipelines, anchors], YAML_WORDS, named),
        Target("gates", _gates, "gates.safetensors", [gates], JSON_WORDS),
        Target(
            "gates-meta",
            _gates_meta,
            "gateskip.json",
            [meta],
            JSON_WORDS,
            {"gates.safetensors": gates},
        ),
        Target("safetensors", _safetensors, "model.safetensors", [gates], JSON_WORDS),
        Target("gguf", _gguf, "m.gguf", [_gguf_file()]),
        Target("results", _results, "results.json", [_small_results()], JSON_WORDS),
        Target("texts", _texts, "a.jsonl", [lines], JSON_WORDS),
    )
    return {target.name: target for target in made}


# --- Mutations -----------------------------------------------------------------------------------


def mutated(data: bytes, draw: random.Random, target: Target) -> bytes:
    """A copy with one to eight mutations, at most LONGEST bytes long."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        draw.choice(MUTATIONS)(changed, draw, target)
        if not changed:
            changed = bytearray(b"\0")
    return bytes(changed[:LONGEST])


def _flip(data: bytearray, draw: random.Random, target: Target) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _byte(data: bytearray, draw: random.Random, target: Target) -> None:
    data[draw.randrange(len(data))] = draw.choice(
        (0, 1, 10, 32, 127, 128, 255, draw.randrange(256))
    )


def _number(data: bytearray, draw: random.Random, target: Target) -> None:
    width = draw.choice((1, 2, 4, 8))
    at = draw.randrange(len(data))
    number = draw.choice(NUMBERS) % (1 << 8 * width)
    data[at : at + width] = number.to_bytes(width, "little")


def _cut(data: bytearray, draw: random.Random, target: Target) -> None:
    at = draw.randrange(len(data))
    del data[at : at + draw.choice((1, 2, 8, 64, len(data)))]


def _double(data: bytearray, draw: random.Random, target: Target) -> None:
    at = draw.randrange(len(data))
    part = data[at : at + draw.choice((1, 4, 16, 64))]
    data[at:at] = part * draw.choice((1, 1, 2, 10, 1000))


def _word(data: bytearray, draw: random.Random, target: Target) -> None:
    at = draw.randrange(len(data) + 1)
    word = draw.choice(target.words) if target.words else draw.randbytes(4)
    data[at:at] = word * draw.choice((1, 1, 1, 2, 100))


def _splice(data: bytearray, draw: random.Random, target: Target) -> None:
    other = draw.choice(target.seeds)
    begin = draw.randrange(len(other))
    at = draw.randrange(len(data))
    data[at:at] = other[begin : begin + draw.choice((8, 64, 512))]


def _swap(data: bytearray, draw: random.Random, target: Target) -> None:
    lines = bytes(data).split(b"\n")
    one, two = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[one], lines[two] = lines[two], lines[one]
    data[:] = b"\n".join(lines)


MUTATIONS = (_flip, _byte, _number, _cut, _double, _word, _word, _splice, _swap)


# --- Running -------------------------------------------------------------------------------------


class Hung(BaseException):
    """An input that took too long; no `except Exception` of a reader catches it."""


def _break_off(*_: object) -> None:
    raise Hung(f"nothing after {HANG_S} s")


def inputs(target: Target, seed: int) -> Iterator[bytes]:
    """The good inputs, and then mutations of them without end."""
    draw = random.Random(f"{target.name} {seed}")
    yield from target.seeds
    while True:
        yield mutated(draw.choice(target.seeds), draw, target)


def _lay_out(target: Target, data: bytes, folder: Path) -> Path:
    """Write an input, and the files beside it that it names."""
    file = folder / target.file
    file.write_bytes(data)
    for name, content in target.beside.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return file


def attempt(target: Target, data: bytes, folder: Path) -> tuple[bool, float]:
    """Whether a target took an input, and its thread's processor time; raises what is a finding."""
    file = _lay_out(target, data, folder)
    started = time.thread_time()
    signal.setitimer(signal.ITIMER_PROF, HANG_S)
    try:
        target.read(file)
        taken = True
    except (UserError, FormatError) as error:
        taken = False
        str(error).encode("utf-8")  # a message that no terminal can print is a finding, too
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.thread_time() - started
    if seconds > LIMIT_S:
        raise TimeoutError(f"it took {seconds:.1f} s")
    return taken, seconds


def fuzz(target: Target, seconds: float, seed: int, kept: Path, most: int | None = None) -> Tally:
    """Feed a target for some seconds, or with `most` inputs; findings are kept in a folder."""
    tally, end = Tally(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="gateskip-fuzz-") as folder:
        with contextlib.suppress(Exception):  # what is imported at first use is not timed
            target.read(_lay_out(target, target.seeds[0], Path(folder)))
        gc.collect()
        gc.freeze()  # nor are collections of what a long process holds already
        for data in inputs(target, seed):
            if time.monotonic() >= end or tally.inputs == most:
                return tally
            tally.inputs += 1
            try:
                taken, took = attempt(target, data, Path(folder))
            except (Exception, Hung):
                tally.findings += 1
                _keep(target, data, kept)
            else:
                tally.taken += taken
                tally.slowest_s = max(tally.slowest_s, took)
    return tally


def _keep(target: Target, data: bytes, kept: Path) -> None:
    kept.mkdir(parents=True, exist_ok=True)
    name = f"{target.name}-{hashlib.sha256(data).hexdigest()[:12]}"
    (kept / name).write_bytes(data)
    (kept / f"{name}.txt").write_text(traceback.format_exc(), encoding="utf-8", errors="replace")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz all targets, or some; 1 where there is a finding."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="one of those above; all by default")
    parser.add_argument("--kept", type=Path, default=ROOT / "build" / "fuzz")
    asked: Any = parser.parse_args(arguments)
    signal.signal(signal.SIGPROF, _break_off)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    known, found = targets(), 0
    for name in asked.target or known:
        tally = fuzz(known[name], asked.seconds, asked.seed, asked.kept)
        found += tally.findings
        print(
            f"{name}: {tally.inputs} inputs, {tally.taken} taken, {tally.findings} findings, "
            f"slowest {tally.slowest_s:.3f} s",
            flush=True,
        )
    if not found:
        shutil.rmtree(asked.kept, ignore_errors=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
