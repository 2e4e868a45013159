"""`gateskip bench`: ways of decoding one folder, timed against each other in one process.

All contenders get the same prompts, and each repeat runs every contender once, so that a machine's
moods hit all alike. Beside tokens a second stands what the machine could do: how fast it reads
memory, which bounds decoding, and how fast it multiplies, which bounds prefill.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gateskip
from compose import memory
from compose.artifacts.gguf import KINDS as GGUF_KINDS
from compose.artifacts.gguf import write_gguf
from compose.assets import load_texts, token_blocks
from compose.bench.cell import resident_bytes
from compose.bench.generate import end_tokens, prompt_ids
from compose.bench.peers import LlamaCpp, Rival, Rows, Run, Transformers
from compose.errors import UserError, suggest
from gateskip.decoding.decoder import Decoder, slots

KINDS = ("plain", "skip", "draft", "eager", "transformers", "llama.cpp")
READ_BYTES, GEMM_SIZE = 1 << 28, 1024  # of the machine's own measure
WARM = 16  # tokens that bring weights into memory before what a text adds is measured
Progress = Callable[[int, int, str], None]
Courses = dict[str, list[Rows]]
"""Name -> batches of prompts, as token ids."""


@dataclass(frozen=True)
class Contender:
    """One way of decoding, by the words that name it."""

    name: str
    settings: dict[str, Any]
    """Arguments of Decoder.generate; empty for a rival."""
    rival: str = ""
    """What follows the colon of a rival's name."""
    eager: bool = False
    """Whether torch does everything: the reference for tokens."""


def contender(text: str) -> Contender:
    """`plain`, `skip:BUDGET`, `draft:BUDGET` with `+int4`, `+nf4` or `+int4-head`, `+lookup`,
    `+LENGTH`; any of these after `eager:`, which leaves all to torch, the reference for tokens; and
    the rivals `transformers`, also with `:compiled`, `:lookup` or `:early-exit-LAYERS`, and
    `llama.cpp:FILE` or `llama.cpp:TYPE`, which writes the folder as a GGUF file of that type.

    Raises UserError for anything else.
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise UserError(f"contender {text!r}: {suggest(kind, KINDS)}", fix=contender.__doc__)
    if kind in ("transformers", "llama.cpp"):
        return Contender(text, {}, rest)
    if kind == "eager":
        way = contender(rest or "plain")
        if way.name.startswith(("eager", "transformers", "llama.cpp")):
            raise UserError(f"contender {text!r}: {rest} is no way of ours", fix=contender.__doc__)
        return replace(way, name=text, eager=True)
    if kind == "plain":
        return Contender(text, {"mode": "plain"})
    words = rest.split("+")
    try:
        budget = float(words[0])
        if kind == "skip":
            return Contender(text, {"mode": "skip", "budget": budget})
        settings: dict[str, Any] = {"mode": "speculate", "draft_budget": budget}
        for word in words[1:]:
            if word in ("int4-head", "nf4", "int4"):
                settings["draft_weights"] = word
            elif word == "lookup":
                settings["lookup"] = True
            else:
                settings["draft_length"] = int(word)
    except ValueError as error:
        raise UserError(f"contender {text!r}: {error}", fix="as in draft:0.8+nf4+4") from error
    return Contender(text, settings)


@dataclass
class Lap:
    """Repeats of one contender on one set of prompts."""

    contender: str
    course: str
    """What the prompts are: batch and context, or a category."""
    prefill: list[float] = field(default_factory=list)
    """Prompt tokens a second, a repeat each."""
    decode: list[float] = field(default_factory=list)
    """New tokens a second after the first of each row."""
    acceptance: float | None = None
    split: dict[str, float] = field(default_factory=dict)
    """Shares of the decoding time in parts of the native work, and in Python around it."""
    saved: float = 0.0
    """Share of the model's multiply-adds that skipping saved, the LM head counted."""
    skipped: float = 0.0
    """Share of branch-tokens, the prompts' among them, that were skipped."""
    equal: bool = True
    """Whether its tokens were the first contender's."""

    def add(self, runs: Sequence[Run], equal: bool) -> None:
        """One repeat: the runs of the course's batches."""
        self.equal &= equal
        self.prefill.append(_rate(runs, "prompt_tokens", "prefill_s"))
        self.decode.append(_rate(runs, "decoded", "decode_s"))
        drafted = sum(run.drafted for run in runs)
        self.acceptance = sum(run.accepted for run in runs) / drafted if drafted else None
        self.split = _split(runs)
        self.saved = statistics.mean(run.saved for run in runs)
        self.skipped = statistics.mean(run.skipped for run in runs)

    def to_json(self) -> dict[str, Any]:
        """Medians and extremes, and the repeats themselves."""
        return {
            "contender": self.contender,
            "course": self.course,
            "prefill_tokens_per_s": _summary(self.prefill),
            "decode_tokens_per_s": _summary(self.decode),
            "acceptance_rate": self.acceptance,
            "time_split": self.split,
            "promised_by_multiply_adds": 1 / (1 - self.saved),
            "skipped_branch_tokens": self.skipped,
            "equal_to_first": self.equal,
        }


def _split(runs: Sequence[Run]) -> dict[str, float]:
    whole = sum(run.decode_s for run in runs)
    names = runs[0].spent
    shares = {name: sum(run.spent[name] for run in runs) / whole for name in names}
    return shares | {"python": 1 - sum(shares.values())} if shares else {}


def _summary(values: Sequence[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "repeats": list(values),
    }


def race(
    folder: Path,
    contenders: Sequence[str],
    batches: Sequence[int],
    contexts: Sequence[int],
    new_tokens: int,
    repeats: int,
    prompts: str | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Time the contenders on running text of each batch and context, or on `prompts` by category.

    Returns `laps`, the machine's `roofline`, and in bytes the folder's `weights`, the largest
    `cache`, and the memory `beside` both at its peak; without the latter where a rival or the
    reference, which take memory of their own, run in the same process.

    Raises:
        UserError: a contender is not known, or the folder cannot decode so.
    """
    decoder: Decoder = gateskip.load(folder)
    courses = (
        courses_of(decoder, prompts, limit, cache)
        if prompts
        else _running_text(decoder, batches, contexts, cache)
    )
    runners = runners_of(decoder, folder, contenders, courses, new_tokens)
    batches_of = [rows for groups in courses.values() for rows in groups]
    cache_bytes = max(
        decoder.skipping.cache_bytes(len(rows), slots(max(map(len, rows)), new_tokens))
        for rows in batches_of
    )
    alone = all(way.settings and not way.eager for way in map(contender, contenders))
    if alone:
        for run in runners.values():
            run([batches_of[0][0][:WARM]], 2)
    memory.reset_peak()
    held = memory.resident_bytes()
    laps = run_laps(runners, courses, new_tokens, repeats, progress)
    return {
        "cache": cache_bytes,
        "beside": memory.peak_bytes() - held - cache_bytes if alone else None,
        "laps": [lap.to_json() for lap in laps],
        "roofline": roofline(),
        "weights": resident_bytes(decoder.skipping.model),
        "threads": torch.get_num_threads(),
        "new_tokens": new_tokens,
    }


def runners_of(
    decoder: Decoder, folder: Path, contenders: Sequence[str], courses: Courses, new_tokens: int
) -> dict[str, Rival]:
    """What runs each contender on texts as long as those of the courses.

    Raises UserError for a contender that is not known, or that the folder cannot run.
    """
    longest = max(len(row) for groups in courses.values() for rows in groups for row in rows)
    ways = [contender(text) for text in contenders]
    eager = gateskip.load(folder, native=False) if any(way.eager for way in ways) else decoder
    return {
        way.name: _runner(eager if way.eager else decoder, folder, way, longest + new_tokens)
        for way in ways
    }


def run_laps(
    runners: Mapping[str, Rival],
    courses: Courses,
    new_tokens: int,
    repeats: int,
    progress: Progress | None = None,
) -> list[Lap]:
    """Each repeat runs every contender on every batch of every course once; the first's tokens are
    the model. They take turns on each batch, since a machine's moods last for seconds."""
    laps = {(way, name): Lap(way, name) for way in runners for name in courses}
    done, total = 0, repeats * sum(map(len, courses.values()))
    for run in runners.values():  # what is built on first use is built before anything is timed
        run(next(iter(courses.values()))[0], new_tokens)
    for _ in range(repeats):
        for name, groups in courses.items():
            runs: dict[str, list[Run]] = {way: [] for way in runners}
            for rows in groups:
                for way, run in runners.items():
                    runs[way].append(run(rows, new_tokens))
                done += 1
                if progress is not None:
                    progress(done, total, name)
            first = [each.tokens for each in next(iter(runs.values()))]
            for way, own in runs.items():
                laps[way, name].add(own, first == [each.tokens for each in own])
    return list(laps.values())


def _runner(decoder: Decoder, folder: Path, way: Contender, context: int) -> Rival:
    """What runs a contender, for texts of at most `context` tokens."""
    ends = end_tokens(decoder)
    if way.name.startswith("transformers"):
        return Transformers(folder, decoder.skipping.dtype, way.rival, ends)
    if way.name.startswith("llama.cpp"):
        return _llama_cpp(folder, way.rival, context, ends)
    _check(decoder, way)
    return partial(_run, decoder, way)


def _llama_cpp(folder: Path, told: str, context: int, ends: Sequence[int]) -> LlamaCpp:
    """llama.cpp on a file, or on the folder itself where `told` is a GGUF type."""
    if told not in GGUF_KINDS:
        return LlamaCpp(Path(told).expanduser(), context, ends)
    with tempfile.TemporaryDirectory(prefix="gateskip-") as made:  # mapped, it outlives its name
        file = Path(made) / f"{told}.gguf"
        write_gguf(folder, file, told)
        return LlamaCpp(file, context, ends)


def _rate(runs: Sequence[Run], tokens: str, seconds: str) -> float:
    spent: float = sum(getattr(run, seconds) for run in runs)
    return float(sum(getattr(run, tokens) for run in runs) / max(spent, 1e-9))


def _check(decoder: Decoder, way: Contender) -> None:
    budget = way.settings.get("budget", way.settings.get("draft_budget", 1.0))
    try:
        decoder.thresholds(budget)
        decoder.drafter(way.settings.get("draft_weights", "own"))
    except ValueError as error:
        raise UserError(f"contender {way.name}: {error}", fix="choose another contender") from error


def _run(decoder: Decoder, way: Contender, rows: Rows, new_tokens: int) -> Run:
    engines = [each.engine for each in decoder.models() if each.engine is not None]
    before = [engine.spent() for engine in engines]
    usage, saved, skipped = decoder.skipping.usage, 0.0, 0.0
    usage.clear()
    found = decoder.generate(rows, new_tokens, eos=end_tokens(decoder), **way.settings)
    stats = found.stats
    spent: dict[str, float] = {}
    for engine, was in zip(engines, before, strict=True):
        for name, seconds in engine.spent().items():
            spent[name] = spent.get(name, 0.0) + seconds - was[name]
    if way.settings.get("mode") == "skip":
        saved = decoder.saved(usage, way.settings["budget"]).model
        skipped = 1 - statistics.mean(usage.shares())
    decoded = stats.new_tokens - len(rows)  # the first token of a row comes out of prefill
    return Run(
        found.tokens,
        stats.prompt_tokens,
        stats.prefill_s,
        decoded,
        stats.decode_s,
        stats.drafted,
        stats.accepted,
        spent,
        saved,
        skipped,
    )


def _running_text(
    decoder: Decoder, batches: Sequence[int], contexts: Sequence[int], cache: Path | None
) -> Courses:
    """Course -> its one batch of prompts, cut from heldout-text."""
    text = load_texts("heldout-text", None, cache)
    return {
        f"{batch} x {context}": [token_blocks(text, decoder.tokenizer, context, batch).tolist()]
        for batch in batches
        for context in contexts
    }


def courses_of(decoder: Decoder, source: str, limit: int | None, cache: Path | None) -> Courses:
    """Category -> its prompts, each a batch of one; `limit` of each category.

    Raises AssetError where `source` cannot be had.
    """
    data = load_texts(source, None, cache)
    texts = data.prompts or data.rows
    names = data.categories or ["prompts"] * len(texts)
    courses: Courses = {}
    for name, text in zip(names, texts, strict=True):
        group = courses.setdefault(name, [])
        if limit is None or len(group) < limit:
            group.append([prompt_ids(decoder.tokenizer, text)])
    return courses


def roofline() -> dict[str, float]:
    """What the machine reads from memory (GB/s) and multiplies (GFLOP/s), best of a few tries."""
    data = torch.ones(READ_BYTES // 4)
    read = min(_seconds(data.sum) for _ in range(5))
    found = {"memory_gb_per_s": READ_BYTES / read / 1e9}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=dtype)
        spent = min(_seconds(partial(torch.matmul, a, a)) for _ in range(3))
        found[f"gemm_{name}_gflop_per_s"] = 2 * GEMM_SIZE**3 / spent / 1e9
    return found


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
