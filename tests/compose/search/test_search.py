"""The search: spaces, bounds with intervals, proposals, halving, resuming, and the file it ends in.

Most tests replace workers by scripted ones whose numbers follow from the names of a chain's stages,
so that whole searches take milliseconds. The test at the end searches a tiny model for real.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from compose.analysis.pick import pick
from compose.artifacts.folder import write_lineage
from compose.cli import app
from compose.contract import CellJob, Job, read_job
from compose.errors import PipelineError, PlanError, StepError, UserError
from compose.language.parse import load_pipeline
from compose.language.schema import Pipeline
from compose.planning.plan import Plan
from compose.planning.prepare import load_plan
from compose.processes.executors import TimedHere
from compose.run import runner as runner_module
from compose.run.state import Settings
from compose.search.halving import cheap_rungs, halve, survivor_count
from compose.search.output import front, to_yaml
from compose.search.predict import Effects
from compose.search.probes import Probe
from compose.search.propose import Proposer
from compose.search.search import SearchResult, search
from compose.search.space import Space, build_space, predicted_bytes
from compose.search.target import Target, make_target
from compose.stages.base import ModelShape
from compose.stages.registry import STAGES
from compose.terminal.live.progress import Board
from compose.terminal.search import print_found
from compose.workers.main import ROLES, _Cell
from compose.workers.protocol import answer

Answer = dict[str, Any]

STAGES_OF_FILE = """\
stages:
  narrow: {use: prune-width, ratio: 0.1}
  drop:   {use: drop-layers, count: 1}
  nf4:    {use: bnb, format: nf4}
  gptq:   {use: gptq, bits: 4}
  draft:  {use: speculate, draft_budget: 1, lookup: true}
"""
SEARCH = """\
search:
  axes:
    width:    [none, narrow]
    depth:    [none, drop]
    quantize: [none, nf4, gptq]
  vary:
    narrow: {ratio: [0.1, 0.2, 0.3]}
    drop:   {count: [1, 2]}
    gptq:   {group_size: [32, 64]}
"""
HEAD = """\
schema: 1
name: small
model: {source: %s, dtype: bfloat16}
"""
BENCHMARK = """\
benchmark:
  threads: 1
  speed: {repeats: 3, min_seconds: 0}
  quality: {perplexity: heldout-text, perplexity_tokens: 16384, own_answers: null}
"""
FILE = HEAD % "smollm2-135m-instruct" + STAGES_OF_FILE + SEARCH + BENCHMARK


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(FILE)
    return path


@pytest.fixture
def pipeline(file: Path) -> Pipeline:
    return load_pipeline(file)


@pytest.fixture
def space(pipeline: Pipeline) -> Space:
    return build_space(pipeline, smollm2_shape())


def smollm2_shape(**changes: Any) -> ModelShape:
    sizes: Answer = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "tie_embeddings": True,
    }
    return ModelShape(**{**sizes, **changes})


def decode_within(kl: float) -> Target:
    return make_target(at_most_kl=kl, maximize="decode")


def probe(name: str, kl: float, width: float, decode: float, **more: Any) -> Probe:
    """A probe whose KL is known to `width` on either side."""
    numbers = {"kl": kl, "decode-ratio": decode}
    ends = {"kl": (kl - width, kl + width)}
    return Probe(tuple(name.split("+")), numbers, ends, **more)


# --- The language --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("width:    [none, narrow]", "width: [none, narow]", 12, "did you mean 'narrow'"),
        ("narrow: {ratio: [0.1", "narow: {ratio: [0.1", 16, "did you mean 'narrow'"),
        ("drop:   {count: [1", "drop:   {counts: [1", 17, "did you mean 'count'"),
        ("{group_size: [32, 64]}", "{group_size: [32, 33]}", 18, "group_size: 33"),
        ("{count: [1, 2]}", "{count: []}", 17, "count lists no value"),
        ("{count: [1, 2]}", "{count: [2, 2]}", 17, "listed twice"),
        ("  axes:", "  axis:", 11, "did you mean 'axes'"),
    ],
)
def test_a_mistake_has_its_line(file: Path, old: str, new: str, line: int, message: str) -> None:
    assert old in FILE
    file.write_text(FILE.replace(old, new))
    with pytest.raises(PipelineError, match=message) as caught:
        load_pipeline(file)
    assert caught.value.line == line, str(caught.value)


def test_run_passes_a_search_over(file: Path, tmp_path: Path) -> None:
    plan = load_plan(file, tmp_path / "cache")
    assert [cell.name for cell in plan.cells] == ["dense"]


def test_values_of_a_stage_are_stages_with_names_that_say_so(space: Space) -> None:
    stages = space.pipeline.stages
    assert stages["narrow-ratio0.2"].model_dump()["ratio"] == 0.2
    assert stages["gptq-group_size32"].model_dump()["group_size"] == 32
    assert space.bases["narrow-ratio0.2"] == "narrow"


# --- Space and predictions -----------------------------------------------------------------------


def test_every_choice_of_every_axis_that_no_rule_forbids(space: Space) -> None:
    chains = {each.chain for each in space.candidates}
    assert len(chains) == len(space.candidates)
    assert ("narrow-ratio0.2", "drop-count1", "gptq-group_size32") in chains
    assert () not in chains
    # 4 x 3 x 4 without the empty chain; nf4 takes widths in multiples of 64, which all of these are
    assert len(chains) + space.left_out == 47


def test_rules_leave_chains_out(file: Path) -> None:
    text = FILE.replace("quantize: [none, nf4, gptq]", "quantize: [none, nf4, gptq]\n    b: [nf4]")
    file.write_text(text)
    space = build_space(load_pipeline(file), smollm2_shape())
    assert space.left_out > 0
    assert all(each.chain.count("nf4") == 1 for each in space.candidates)


def test_without_a_section_the_matrix_is_the_space(file: Path) -> None:
    matrix = "matrix:\n  prune: [none, narrow, drop]\n  quantize: [none, nf4]\n"
    matrix += "  exclude:\n    - {prune: drop, quantize: nf4}\n"
    file.write_text(FILE.replace(SEARCH, matrix))
    chains = {each.chain for each in build_space(load_pipeline(file)).candidates}
    assert ("narrow-ratio0.05",) in chains and ("narrow-ratio0.15", "nf4") in chains
    assert ("drop-count1",) in chains
    assert ("drop-count1", "nf4") not in chains


def test_without_a_matrix_the_stages_are_the_space(file: Path) -> None:
    file.write_text(FILE.replace(SEARCH, "pipelines: {both: [narrow, nf4]}\n"))
    chains = {each.chain for each in build_space(load_pipeline(file)).candidates}
    assert {("narrow-ratio0.1", "nf4"), ("drop-count2", "gptq", "draft")} <= chains
    assert ("narrow", "nf4") not in chains, "the same under another name"
    assert ("narrow-ratio0.1", "drop-count1") not in chains, "one of each kind"


def test_a_space_has_an_end(file: Path) -> None:
    values = ", ".join(str(number / 10000) for number in range(1, 1200))
    file.write_text(FILE.replace("ratio: [0.1, 0.2, 0.3]", f"ratio: [{values}]"))
    with pytest.raises(PlanError, match="14400 chains"):
        build_space(load_pipeline(file))


def test_a_space_without_stages_is_refused(file: Path) -> None:
    file.write_text(HEAD % "smollm2-135m-instruct" + "search: {}\n" + BENCHMARK)
    with pytest.raises(PlanError, match="no chain to search among"):
        build_space(load_pipeline(file))


@pytest.mark.parametrize(
    ("chain", "megabytes"),
    [
        ([], 269),  # as measured; see evidence of formats: nf4 117, gptq 115 and 119, int8 164 MB
        ([{"use": "bnb", "format": "nf4"}], 117),
        ([{"use": "bnb", "format": "int8"}], 164),
        ([{"use": "gptq", "group_size": 64}], 115),
        ([{"use": "gptq", "group_size": 32}], 119),
        ([{"use": "int4", "values": None}], 89.8),  # 4.5 bits a weight of the layers, 8.5 outside
        ([{"use": "int3", "group_size": 64, "embedding": None}], 101),  # 3.25 and 16 bits
    ],
)
def test_bytes_are_known_from_the_plan(chain: list[Answer], megabytes: float) -> None:
    stages = [STAGES[each["use"]].model_validate(each) for each in chain]
    predicted = predicted_bytes(smollm2_shape(), stages, "bfloat16")
    assert predicted is not None
    assert predicted == pytest.approx(megabytes * 1e6, rel=0.02)


def test_values_in_more_bits_are_in_the_plan() -> None:
    """8.5 bits for 4.5: 30 layers of 576 times 192 weights."""
    four, values = (
        predicted_bytes(smollm2_shape(), [STAGES["int4"].model_validate(each)], "bfloat16")
        for each in ({"use": "int4", "values": None}, {"use": "int4"})
    )
    assert four is not None and values == four + 30 * 576 * 192 * 4 / 8


def test_bytes_that_the_plan_cannot_tell() -> None:
    for use in ("gptq", "int4"):
        mixed = STAGES[use].model_validate({"use": use, "mixed": {"down_proj": 8}})
        assert predicted_bytes(smollm2_shape(), [mixed], "bfloat16") is None
    branches = STAGES["prune-branches"].model_validate({"use": "prune-branches", "budget": 0.8})
    assert predicted_bytes(smollm2_shape(), [branches], "bfloat16") is None
    assert predicted_bytes(smollm2_shape(quantized="gptq"), [], "bfloat16") is None


def test_effects_of_choices_add_up(space: Space) -> None:
    def measured(*chain: str) -> tuple[tuple[str, ...], Probe]:
        return chain, Probe(chain, {"kl": _kl(chain), "decode-ratio": _speed(chain)})

    probes = dict(
        [
            measured("narrow-ratio0.1"),
            measured("narrow-ratio0.3"),
            measured("drop-count1"),
            measured("nf4"),
        ]
    )
    both = space.candidate(("narrow-ratio0.3", "nf4"))
    middle = space.candidate(("narrow-ratio0.2",))
    unknown = space.candidate(("gptq-group_size32",))
    assert both and middle and unknown
    kl, speed = (Effects(space, name, probes) for name in ("kl", "decode-ratio"))
    assert kl.predict(both) == pytest.approx(_kl(both.chain), rel=0.02)
    assert speed.predict(both) == pytest.approx(_speed(both.chain), rel=0.02)
    assert kl.predict(middle) == pytest.approx((_kl(["narrow-ratio0.1"]) + 0.09) / 2, rel=0.02)
    assert kl.predict(unknown) is None


# --- Bounds --------------------------------------------------------------------------------------


def test_a_bound_tells_three_things_of_an_interval() -> None:
    (bound,) = decode_within(0.05).bounds
    standings = [bound.standing(probe("a", kl, 0.01, 1.0)) for kl in (0.03, 0.045, 0.055, 0.07)]
    assert standings == ["met", "open", "open", "missed"]
    assert bound.standing(Probe(("a",), {"kl": 9.0})) == "open", "no interval, no evidence"
    (least,) = make_target(min_retained=0.95, maximize="decode").bounds
    ends = [(0.96, 0.99), (0.9, 0.96), (0.8, 0.94)]
    found = [least.standing(Probe(("a",), {}, {"retained": each})) for each in ends]
    assert found == ["met", "open", "missed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maximize": "decode"}, "needs a bound"),
        ({"at_most_kl": 0.1}, "needs one aim"),
        ({"at_most_kl": 0.1, "maximize": "decode", "minimize": "kl"}, "needs one aim"),
        ({"at_most_kl": 0.1, "maximize": "kl"}, "cannot maximize 'kl'"),
        ({"at_most_mb": 90.0, "minimize": "decode"}, "cannot minimize 'decode'"),
    ],
)
def test_a_target_has_bounds_and_one_aim(options: Answer, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_target(**options)


def test_the_old_name_of_size_is_the_same_target() -> None:
    target = make_target(at_most_kl=0.1, minimize="size_mb")
    assert target == make_target(at_most_kl=0.1, minimize="size")
    assert (target.metric, target.to_json()["aim"]) == ("size", "size")


def test_what_reaches_the_bound_is_never_dropped_for_it() -> None:
    target = decode_within(0.05)
    probes = [
        probe("beyond", 0.2, 0.05, 3.0),
        probe("open-fast", 0.06, 0.02, 2.5),
        probe("sure-fast", 0.03, 0.01, 2.0),
        probe("open", 0.06, 0.02, 1.9),
        probe("sure", 0.02, 0.01, 1.8),
        probe("open-slow", 0.05, 0.02, 1.2),
        probe("sure-slow", 0.01, 0.005, 1.1),
        Probe(("broken",), failure="out of memory"),
    ]
    halved = halve(probes, target, keep=2)
    assert [each.name for each in halved.survivors] == ["open-fast", "sure-fast", "open", "sure"]
    assert "misses" in halved.dropped[("beyond",)]
    assert "0.2 (0.15 to 0.25)" in halved.dropped[("beyond",)]
    assert "2 better sequences surely meet the limits" in halved.dropped[("open-slow",)]
    assert halved.dropped[("broken",)] == "failed: out of memory"


def test_open_chains_drop_no_other() -> None:
    probes = [probe(f"open{number}", 0.06, 0.02, 3.0) for number in range(9)]
    halved = halve([*probes, probe("sure", 0.01, 0.001, 1.0)], decode_within(0.05), keep=2)
    assert len(halved.survivors) == 10 and not halved.dropped


def test_where_all_miss_the_nearest_stay() -> None:
    probes = [probe(f"p{number}", 0.1 * number, 0.01, number) for number in range(1, 6)]
    halved = halve(probes, decode_within(0.05), keep=2)
    assert [each.name for each in halved.survivors] == ["p1", "p2"]
    assert len(halved.dropped) == 3


def test_speculation_that_changes_tokens_misses() -> None:
    lossy = probe("draft", 0.0, 0.0, 3.0, lossless=False)
    halved = halve([lossy, probe("sure", 0.01, 0.001, 1.0)], decode_within(0.05), keep=2)
    assert halved.dropped == {("draft",): "its speculation changes tokens"}


def test_rungs_grow_to_the_files_own_benchmark(pipeline: Pipeline) -> None:
    rungs = cheap_rungs(pipeline.benchmark, 1024, decode_within(0.05))
    assert [each.benchmark.quality.perplexity_tokens for each in rungs] == [1024, 4096]
    assert all(each.benchmark.speed.repeats == 2 for each in rungs)
    assert len(cheap_rungs(pipeline.benchmark, 99999, decode_within(0.05))) == 1
    assert (survivor_count(40, 6, is_last=False), survivor_count(40, 6, is_last=True)) == (10, 6)


# --- Proposals -----------------------------------------------------------------------------------


def proposals(space: Space, target: Target, most: int, batch: int = 4) -> Iterator[str]:
    """The names of all that is proposed until the end, with numbers by the names of stages."""
    proposer = Proposer(space, target, most=most, seed=3, best=2)
    probes: dict[tuple[str, ...], Probe] = {}
    while chosen := proposer.propose(probes, batch):
        assert len(chosen) <= batch
        for each in chosen:
            assert each.chain not in probes
            kl = _kl(each.chain)
            numbers = {"kl": kl, "decode-ratio": _speed(each.chain), "size": _size(each.chain)}
            ends = {"kl": (kl * 0.9, kl * 1.1), "size": (numbers["size"], numbers["size"])}
            probes[each.chain] = Probe(each.chain, numbers, ends)
            yield each.name


def test_each_choice_is_seen_before_what_is_predicted(space: Space) -> None:
    names = list(proposals(space, decode_within(0.05), most=24))
    alone = ["narrow-ratio0.1", "narrow-ratio0.2", "narrow-ratio0.3", "drop-count1"]
    alone += ["drop-count2", "nf4", "gptq-group_size32", "gptq-group_size64"]
    assert set(names[:8]) == set(alone)
    assert {name.split("-")[0] for name in names[:4]} == {"narrow", "drop", "nf4", "gptq"}
    assert names == list(proposals(space, decode_within(0.05), most=24)), "the seed decides"


def test_a_part_of_a_large_space_holds_the_best(space: Space) -> None:
    target = decode_within(0.05)
    names = list(proposals(space, target, most=24))
    assert len(names) <= 24
    able = [each for each in space.candidates if _kl(each.chain) * 1.1 <= 0.05]
    best = max(able, key=lambda each: _speed(each.chain))
    assert best.name in names


def test_a_space_that_is_small_enough_is_measured_whole(space: Space) -> None:
    names = list(proposals(space, decode_within(0.05), most=100))
    assert sorted(names) == sorted(each.name for each in space.candidates)


def test_what_is_too_large_by_its_plan_is_not_proposed(space: Space) -> None:
    target = make_target(at_most_mb=125, minimize="kl")
    names = set(proposals(space, target, most=100))
    assert "narrow-ratio0.1" not in names and "nf4" in names
    assert names == {each.name for each in space.candidates if (each.predicted_bytes or 0) < 131e6}


# --- Whole searches with scripted workers --------------------------------------------------------


def _kl(chain: Any) -> float:
    """KL by the names of stages."""
    effects = {"narrow": 0.3, "drop": 0.02, "nf4": 0.04, "gptq": 0.03, "draft": 0.0}
    total = 0.0
    for name in chain:
        base, _, value = name.partition("-")
        factor = 1.0
        if base == "narrow":
            factor = float(value.removeprefix("ratio") or 0.1)
        elif base == "drop":
            factor = float(value.removeprefix("count") or 1)
        elif value == "group_size32":
            factor = 0.5
        total += effects[base] * factor
    return total


def _speed(chain: Any) -> float:
    gains = {"narrow": 1.5, "drop": 1.05, "nf4": 1.9, "gptq": 1.7, "draft": 1.3}
    total = 1.0
    for name in chain:
        base, _, value = name.partition("-")
        gain = gains[base]
        if base == "narrow":
            gain = 1 + float(value.removeprefix("ratio") or 0.1)
        elif base == "drop":
            gain = 1 + 0.04 * float(value.removeprefix("count") or 1)
        elif value == "group_size32":
            gain = 1.6
        total *= gain
    return total


def _size(chain: Any) -> float:
    packed = any(name.startswith(("nf4", "gptq")) for name in chain)
    return 117e6 if packed else 269e6


class Script(TimedHere):
    """A scripted executor: numbers by the names of a cell's stages, and a log of what was asked."""

    slots = 1
    local = False
    timed_threads = 1
    attempts = 1

    def __init__(self) -> None:
        self.log: list[tuple[str, ...]] = []
        self.closed = 0
        self.end_after: int | None = None
        """Quality measurements after which Ctrl-C comes."""
        self.broken: set[str] = set()
        """Names of stages whose step fails."""

    def start(self, role: str, job: Path, log: Path, needs: Any = None) -> Scripted:
        return Scripted(self, role, json.loads(job.read_text()))

    def close(self) -> None:
        self.closed += 1

    def count(self, kind: str) -> int:
        return sum(event[0] == kind for event in self.log)

    def note(self, *event: str) -> None:
        self.log.append(event)
        most = self.end_after
        if event[0] == "quality" and most is not None and self.count("quality") > most:
            raise KeyboardInterrupt
        if event[0] == "step" and event[1] in self.broken:
            raise StepError("it broke")


class Scripted:
    def __init__(self, script: Script, role: str, job: Answer) -> None:
        self.script, self.role, self.job = script, role, job
        self.commands: list[Answer] = []

    def send(self, message: Answer) -> None:
        self.commands.append(message)

    def receive(self) -> Answer:
        if self.role == "step":
            self.script.note("step", self.job["name"])
            target = Path(self.job["target"])
            target.mkdir(parents=True)
            (target / "config.json").write_text('{"model_type": "llama"}')
            write_lineage(target, {"name": self.job["name"], "record": {}})
            Path(self.job["check"]).write_text("logits")
            return {"ok": True, "result": {"wall_s": 1.0, "record": {}}}
        if self.role == "fetch":
            return {"ok": True, "result": []}
        if self.role == "check":
            return {"ok": True, "result": {}}
        return {"ok": True, "result": self.measure(self.commands.pop(0))}

    def measure(self, command: Answer) -> Answer:
        name, do = self.job["name"], command["do"]
        self.script.note(do, name)
        chain = () if name == "dense" else tuple(name.split("+"))
        if do == "load":
            return {"size": {"disk_bytes": int(_size(chain)), "resident_bytes": 1}}
        if do == "roofline":
            return {"memory_gb_per_s": 20.0}
        if do == "lossless":
            return {"lossless": True}
        if do in ("warm", "speed"):
            return {
                **{"prompt_tokens": 100, "prefill_s": 1.0, "ttft_s": 1.0, "digest": "a"},
                **{"tokens": round(1000 * _speed(chain)), "decode_s": 10.0},
            }
        return self.quality(chain, Path(command["reference"]))

    def quality(self, chain: tuple[str, ...], reference: Path) -> Answer:
        tokens = self.job["benchmark"]["quality"]["perplexity_tokens"]
        blocks, kl = max(1, tokens // 512), _kl(chain)
        spread = [1 + 0.2 * (-1) ** block for block in range(blocks)]
        nll = [2.0 + kl * each for each in spread]
        value = math.exp(sum(nll) / blocks)
        text = {"dataset": "heldout-text", "value": value, "tokens": tokens, "block_nll": nll}
        if self.job["folder"] == self.job["baseline_folder"]:
            reference.write_text("hidden")
            return {"perplexity": text}
        return {
            "perplexity": text,
            "kl_to_baseline": kl,
            "block_kl": [kl * each for each in spread],
        }

    def stop(self) -> None:
        pass


def go(file: Path, target: Target, script: Script, **more: Any) -> SearchResult:
    out = file.parent / "runs"
    console = Console(file=io.StringIO(), width=200)
    settings = Settings(out, out / "cache", "gateskip search")
    found = search(file, target, settings, script, Board(console), **more)  # type: ignore[arg-type]
    assert script.closed == 1
    return found


def run_again(plan: Plan, out: Path, script: Script) -> None:
    """`gateskip run` of a plan."""
    settings = Settings(out, out / "cache", "gateskip run")
    runner_module.run(plan, settings, script, Board(Console(file=io.StringIO())))


def best_of(file: Path, target: Target) -> str:
    """The best chain of the whole space by the numbers that the script gives, within the bound."""
    space = build_space(load_pipeline(file))
    able = [each for each in space.candidates if _kl(each.chain) <= 0.95 * target.bounds[0].limit]
    return max(able, key=lambda each: _speed(each.chain)).name


def test_a_search_ends_in_a_pipeline_file_that_is_the_run(file: Path, tmp_path: Path) -> None:
    target = decode_within(0.06)
    found = go(file, target, Script())
    assert found.winner is not None
    assert found.winner.name == best_of(file, target)
    assert found.why_none is None
    assert found.winner.name in {cell.name for cell in found.front}
    plan = load_plan(found.file, tmp_path / "runs" / "cache")
    assert plan.pipeline.name == "small-found"
    assert plan.cells[1].name == found.winner.name, "the winner comes first"
    assert plan.pipeline.benchmark == load_pipeline(file).benchmark
    assert str(tmp_path) not in found.file.read_text()
    again = Script()
    run_again(plan, tmp_path / "runs", again)
    assert again.log == [], "the file's run is the last rung, measured already"
    assert found.run.folder.root == tmp_path / "runs" / "small-found"
    picked = pick(found.run.results, max_kl=0.06)
    assert picked.name == found.winner.name


def test_a_search_again_measures_nothing_and_another_target_little(short: Path) -> None:
    first, second, third = Script(), Script(), Script()
    one = go(short, decode_within(0.06), first)
    two = go(short, decode_within(0.06), second)
    assert first.count("quality") > 11
    assert second.log == []
    assert two.winner == one.winner
    target = decode_within(0.03)
    found = go(short, target, third)
    assert found.winner is not None and found.winner.name == best_of(short, target)
    assert third.count("step") == 0
    asked = {event[1] for event in third.log if event[0] == "quality"}
    assert len(asked) < 8, "only what comes to a later rung for the first time"


def test_the_baseline_is_scored_once_a_rung(short: Path) -> None:
    """And so is a plain cell, whichever batches its drafting chains fall into."""
    script = Script()
    go(short, decode_within(0.06), script)
    scored = [event[1] for event in script.log if event[0] == "quality"]
    rungs = len(list((short.parent / "runs" / "small-search" / "probes").iterdir()))
    assert scored.count("dense") == rungs + 1, "and once in the last rung"
    assert all(scored.count(name) <= rungs + 1 for name in scored)


@pytest.fixture
def short(file: Path) -> Path:
    """The file with a space of eleven chains in batches of four."""
    text = FILE.replace("    width:    [none, narrow]\n", "").replace(
        "  axes:", "  batch: 4\n  axes:"
    )
    file.write_text(text)
    return file


@pytest.mark.parametrize("quality", [2, 8, 20])
def test_a_search_that_is_ended_goes_on(short: Path, quality: int) -> None:
    file, whole = short, Script()
    expected = go(file, decode_within(0.06), whole)
    (file.parent / "runs").rename(file.parent / "other-runs")
    ended, again = Script(), Script()
    ended.end_after = quality
    with pytest.raises(KeyboardInterrupt):
        go(file, decode_within(0.06), ended)
    found = go(file, decode_within(0.06), again)
    assert found.winner is not None and expected.winner is not None
    assert found.winner.name == expected.winner.name
    assert [cell.name for cell in found.front] == [cell.name for cell in expected.front]
    assert ended.count("step") + again.count("step") == whole.count("step")
    assert ended.count("quality") + again.count("quality") == whole.count("quality") + 1


def test_when_the_time_is_over_the_best_found_is_finished(file: Path) -> None:
    ticks = iter(range(0, 10_000, 60))
    found = go(file, decode_within(0.06), Script(), budget_s=180.0, clock=lambda: next(ticks))
    assert found.winner is not None
    assert 8 <= found.probed < 47
    assert "not measured: the time was over" in found.fates.values()


def test_what_no_chain_meets_names_the_nearest(short: Path) -> None:
    found = go(short, make_target(at_most_mb=50, minimize="kl"), Script())
    assert found.winner is None and found.why_none is not None
    message = str(found.why_none)
    assert "no variant meets disk <= 50.0 MB" in message
    assert "the nearest is '" in message
    assert "loosen --at-most-mb" in message
    assert "come nearest" in found.file.read_text()
    assert found.probed == 6, "the smallest by their plans tell how near it is"


def test_where_every_chain_loses_too_much_the_baseline_wins(short: Path) -> None:
    found = go(short, decode_within(0.001), Script())
    assert found.winner is not None and found.winner.name == "dense"
    assert len(found.last.measured) == 7, "the nearest were measured beside it"


def test_several_bounds_hold_together(short: Path) -> None:
    target = make_target(at_most_kl=0.06, at_most_mb=120, minimize="kl")
    found = go(short, target, Script())
    assert found.winner is not None
    assert found.winner.name == "gptq-group_size32"
    assert any("too large" in why for why in found.fates.values())
    assert found.to_json()["target"] == {"bounds": {"kl": 0.06, "size": 120e6}, "aim": "kl"}


def test_a_stage_that_fails_costs_its_chains_alone(short: Path) -> None:
    script = Script()
    script.broken = {"nf4"}
    found = go(short, decode_within(0.06), script)
    assert found.winner is not None and "nf4" not in found.winner.chain
    assert any(why.startswith("rung 1: failed: ") for why in found.fates.values())


def test_where_nothing_can_be_measured_the_reason_is_told(short: Path) -> None:
    script = Script()
    script.broken = set(build_space(load_pipeline(short)).pipeline.stages)
    with pytest.raises(StepError, match="no chain could be measured: it broke"):
        go(short, decode_within(0.06), script)


def test_a_target_needs_what_it_bounds_to_be_measured(file: Path) -> None:
    file.write_text(FILE.replace("perplexity: heldout-text", "perplexity: null"))
    with pytest.raises(UserError, match="needs a text to score"):
        go(file, decode_within(0.06), Script())


def test_a_baseline_of_its_own_is_in_every_rung(short: Path) -> None:
    file = short
    file.write_text(file.read_text().replace("benchmark:\n", "benchmark:\n  baseline: nf4\n"))
    space = build_space(load_pipeline(file))
    assert all(each.chain != ("nf4",) for each in space.candidates)
    found = go(file, make_target(at_most_perplexity_ratio=1.01, maximize="decode"), Script())
    assert found.last.baseline == "nf4"
    assert load_pipeline(found.file).benchmark.baseline == "nf4"
    again = Script()
    run_again(load_plan(found.file, file.parent / "cache"), file.parent / "runs", again)
    assert again.log == []


# --- The end of it -------------------------------------------------------------------------------


def test_the_front_and_the_table(short: Path) -> None:
    found = go(short, decode_within(0.06), Script())
    cells = {cell.name: cell for cell in found.last.measured}
    best = [cell.name for cell in front(found.last, found.target)]
    for name in best:
        chain = cells[name].chain
        assert not any(
            _kl(other.chain) < _kl(chain) and _speed(other.chain) > _speed(chain)
            for other in cells.values()
        )
    assert "dense" in best, "nothing has a KL as low"
    console = Console(file=io.StringIO(), width=200)
    print_found(console, found)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert found.winner is not None
    rows = [line.split() for line in text.splitlines()]
    assert ["*", found.winner.name] in [row[:2] for row in rows]
    assert ["+", "dense"] in [row[:2] for row in rows]
    assert "small-found.yaml" in text


def test_a_pipeline_is_the_same_after_it_was_written(file: Path, tmp_path: Path) -> None:
    text = FILE.replace("schema: 1", "schema: 1\nseed: 7\nmore_seeds: [1]")
    data = "{calibration: {mix: {./own.txt: 2, sums: 1}, answered: [./own.txt]}}"
    text = text.replace("benchmark:\n", f"data: {data}\nbenchmark:\n")
    text += "limits: {step: {seconds: 600}}\n"
    (tmp_path / "own.txt").write_text("Some text.")
    file.write_text(text)
    pipeline = load_pipeline(file)
    kept = pipeline.model.model_copy(update={"keep_blocks": True})
    pipeline = pipeline.model_copy(update={"model": kept})
    (tmp_path / "deep" / "er").mkdir(parents=True)
    again = tmp_path / "deep" / "er" / "again.yaml"
    changes = {"search": None, "pipelines": {"one": ("narrow", "gptq")}}
    again.write_text(to_yaml(pipeline.model_copy(update=changes), again.parent, ["a remark"]))
    assert str(tmp_path) not in again.read_text()
    assert again.read_text().startswith("# a remark\nschema: 1\n")
    read = load_pipeline(again)
    for part in set(Pipeline.model_fields) - {"search", "pipelines", "matrix", "export"}:
        assert getattr(read, part) == getattr(pipeline, part), part
    assert read.pipelines == {"one": ("narrow", "gptq")}


# --- The command, on a tiny model ----------------------------------------------------------------

TINY = """\
data: {calibration: {source: heldout-text, limit: 4, length: 64}}
stages:
  narrow: {use: prune-width, ratio: 0.5}
  nf4:    {use: bnb, format: nf4}
search:
  axes: {prune: [none, narrow], quantize: [none, nf4]}
  tokens: 1024
benchmark:
  threads: 1
  speed: {prompt_tokens: 16, new_tokens: 8, repeats: 2, min_seconds: 0}
  quality: {perplexity: heldout-text, perplexity_tokens: 2048, own_answers: null}
"""


class Here(TimedHere):
    """An executor whose workers do their work in this process: torch is imported once."""

    slots, local, timed_threads, attempts = 1, True, 1, 1

    def start(self, role: str, job: Path, log: Path, needs: Any = None) -> WorkerHere:
        return WorkerHere(role, read_job(role, job))  # type: ignore[arg-type]

    def close(self) -> None:
        pass


class WorkerHere:
    """A worker's own code, called where it is asked."""

    def __init__(self, role: str, job: Job) -> None:
        self.answers: list[Answer] = []
        if isinstance(job, CellJob):
            self.cell = _Cell(job, self.progress)
        else:
            self.answers = [answer(lambda: ROLES[role](job, self))]  # type: ignore[index,arg-type]

    def progress(self, *_: Any, **__: Any) -> None:
        pass

    def send(self, message: Answer) -> None:
        told = answer(lambda: self.cell.measure(message))  # type: ignore[arg-type]
        self.answers.append(json.loads(json.dumps(told)))

    def receive(self) -> Answer:
        return self.answers.pop(0)

    def stop(self) -> None:
        pass


@pytest.mark.real  # texts come from the user's own cache
def test_a_tiny_model_is_searched(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least as good as the whole matrix, in a file that validates and runs."""

    def call(*words: str | Path) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words])

    monkeypatch.setattr("compose.processes.executors.make_executor", lambda *_: Here())
    file, runs = tmp_path / "tiny.yaml", tmp_path / "runs"
    file.write_text(f"schema: 1\nname: tiny\nmodel: {{source: {tiny_llama}}}\n{TINY}")
    words = ["search", file, "--minimize", "kl", "--out", runs, "--at-most-mb"]
    done = call(*words, "0.6")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["probed"] == 3
    assert call("validate", told["file"]).exit_code == 0
    again = call("run", told["file"], "--out", runs)
    assert again.exit_code == 0
    assert "Nothing to do" in again.stdout

    matrix = "matrix: {prune: [none, narrow], quantize: [none, nf4]}\n"
    section = TINY[TINY.index("search:") : TINY.index("benchmark:")]
    whole = tmp_path / "whole.yaml"
    text = file.read_text().replace(section, matrix)
    whole.write_text(text.replace("name: tiny", "name: whole"))
    assert call("run", whole, "--out", runs).exit_code == 0
    options = ["--at-most-mb", "0.6", "--minimize", "kl", "--json"]
    best = json.loads(call("pick", runs / "whole", *options).stdout)
    assert told["winner"] == best["cell"]["name"]
    found = next(each for each in told["front"] if each["cell"] == told["winner"])
    assert found["kl"] == pytest.approx(best["metrics"]["kl"], rel=1e-6)
    assert found["size"] <= 0.6e6

    nothing = call(*words, "0.1")
    assert nothing.exit_code == 2
    assert "the nearest is" in nothing.stderr and "--at-most-mb" in nothing.stderr
