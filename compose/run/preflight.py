"""Before the first step: all that a plan needs and this machine lacks, in one list with fixes.

    texts, tasks, model   on this machine, or fetched before the first step
    other engines         on this machine, or installed and compiled before the first step
    libraries             of stages, tasks, the report
    disk, memory          by estimates of the plan, with a margin (`room`)

Only work that is left counts: a run that is finished needs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from compose.artifacts.folder import GRID_METHOD, require_model
from compose.assets import (
    Presence,
    first_available,
    first_presence,
    load_texts,
    model_presence,
    resolve_model,
    task_presence,
    text_file,
)
from compose.assets.fetch import read_record
from compose.bench.peers.environment import environment_folder
from compose.bench.peers.table import PeerName, parse_peer
from compose.contract import FetchJob
from compose.errors import ComposeError, UserError
from compose.extras import EXTRAS, not_installed
from compose.outputs.run_folder import RunFolder, is_measured, learns_from
from compose.planning.plan import Cell, Plan, Step, speculates
from compose.planning.prepare import model_shape
from compose.processes.endings import first_line
from compose.processes.worker_process import remove_scratch
from compose.run.failures import attempted
from compose.run.room import missing_room
from compose.run.state import Missing, RunState, Settings
from compose.run.steps import needed_steps
from compose.stages.base import ModelShape
from gateskip.kernels.build import compilers

RUNNING_TEXT = "heldout-text"
"""Read in timed rounds where the file names no prompts."""
LARGEST_READ = 100_000_000
"""Bytes of a text file that is read to see whether it can be."""


@dataclass(frozen=True)
class Readiness:
    """What a plan lacks on this machine."""

    missing: tuple[Missing, ...]
    to_fetch: FetchJob
    """What is fetched or installed before the first step."""

    def fetched(self) -> list[str]:
        """What is to be fetched, in words."""
        job = self.to_fetch
        model = [] if job.model is None else [f"model {job.model}"]
        texts = [f"text {' or '.join(sources)}" for sources in job.texts]
        engines = {peer.engine.name: peer.engine for peer in map(parse_peer, job.peers)}
        built = [
            f"{name} ({'compiled' if engine.compiled else 'installed'}, some minutes)"
            for name, engine in engines.items()
        ]
        model += [f"draft model {source}" for source in job.draft_models]
        return [*model, *texts, *(f"task {name}" for name in job.tasks), *built]


def require_ready(run: RunState, cells: list[Cell]) -> None:
    """Fetch what the cells need and this machine lacks, before anything is computed.

    Raises:
        UserError: with all that is missing, and a fix for each.
    """
    found = look(run.plan, run.folder, run.settings, cells, local=run.workers.executor.local)
    missing = list(found.missing)
    if missing:  # what takes minutes is left out: the run cannot start anyway
        lighter = replace(found.to_fetch, model=None, draft_models=(), peers=())
        found = replace(found, to_fetch=lighter)
    if found.fetched():
        missing += _fetch(run, found)
    if missing:
        raise not_ready(missing)


def not_ready(missing: list[Missing]) -> UserError:
    """The error that lists all that is missing."""
    if len(missing) == 1:
        return UserError(f"the run cannot start: {missing[0].what}", fix=missing[0].fix)
    lines = [f"  {line}" for each in missing for line in str(each).split("\n")]
    return UserError(
        "\n".join([f"the run cannot start, {len(missing)} things are missing:", *lines])
    )


def _fetch(run: RunState, found: Readiness) -> list[Missing]:
    """Have a worker fetch; return the parts that are not available."""
    line = run.board.line(f"fetch {', '.join(found.fetched())}")
    call = partial(run.workers.call, "fetch", found.to_fetch, line)
    try:
        answer: Any = attempted(run, "fetch", line, call)
    except ComposeError as error:
        line.failed(first_line(error))
        raise
    finally:
        remove_scratch(run.folder.log("fetch"))
    lacking = [Missing(what, fix) for what, fix in answer]
    if lacking:
        line.failed(f"{len(lacking)} not available")
    else:
        line.done()
    return lacking


def look(
    plan: Plan, folder: RunFolder, settings: Settings, cells: list[Cell], *, local: bool = True
) -> Readiness:
    """What making and measuring these cells lacks. Nothing is fetched, and torch is imported only
    for a device other than the CPU.

    `local` tells whether all work is done on this machine, so that its memory counts.
    """
    cache = settings.asset_cache
    steps = [step for step in needed_steps(plan, cells) if not folder.store.has(step.key)]
    left = [cell for cell in cells if settings.again or not is_measured(folder, plan, cell)]
    made = [] if settings.mirror else steps  # else the mirror may have them
    tasks = _tasks(plan, left)
    texts = list(dict.fromkeys(_texts(plan, made, left)))
    peers = [parse_peer(cell.peer) for cell in left if cell.peer is not None]
    presence = _presence_of_model(plan, made, cache)
    drafts = {source: model_presence(source, cache) for source in _draft_models(left)}
    missing = [
        *_without_device(plan, cells, steps, left, cache, local),
        *(_without_model(plan, cache) if presence == "absent" else ()),
        *_without_drafts([name for name in drafts if drafts[name] == "absent"], cache),
        *_without_texts(texts, cache),
        *_without_peers(peers, cache),
        *_without_libraries(steps, tasks, settings),
        *(missing_room(plan, folder, settings, steps, left, local=local) if settings.room else ()),
    ]
    job = FetchJob(
        cache=cache.absolute(),
        model=plan.pipeline.model.source if presence == "to fetch" else None,
        keep_blocks=plan.pipeline.model.keep_blocks,
        texts=tuple(each for each in texts if first_presence(each, cache) == "to fetch"),
        tasks=tuple(name for name in tasks if task_presence(name, cache) == "to fetch"),
        peers=tuple(peer.text for peer in peers if not _is_installed(peer, cache)),
        draft_models=tuple(name for name in drafts if drafts[name] == "to fetch"),
    )
    return Readiness(tuple(missing), job)


# ---------------------------------------------------------------- what is needed


def _texts(plan: Plan, steps: list[Step], cells: list[Cell]) -> Iterator[tuple[str, ...]]:
    """Sources of every text that is read; those of one text in the order in which they count."""
    for step in steps:
        for split in () if step.stage is None else step.stage.reads_data:
            yield from ((source,) for source in getattr(plan.pipeline.data, split).weights)
    if plan.cells[0] in cells:
        yield from ((source,) for source, _ in learns_from(plan))
    benchmark = plan.pipeline.benchmark
    quality, prompts = benchmark.quality, benchmark.speed.prompts
    for cell in cells:
        if cell.calibrates_peer:
            yield from ((source,) for source in plan.pipeline.data.calibration.weights)
        if speculates(cell.decode):
            yield (benchmark.lossless.source,)
        else:
            yield from [quality.perplexity] if quality.perplexity else ()
            yield from [(quality.own_answers.source,)] if quality.own_answers else ()
        if cell.repeats is None:
            yield (RUNNING_TEXT if prompts is None else prompts,)


def _draft_models(cells: list[Cell]) -> list[str]:
    """Models that only draft, each once."""
    named = (getattr(cell.decode, "draft_model", None) for cell in cells)
    return list(dict.fromkeys(source for source in named if source is not None))


def _tasks(plan: Plan, cells: list[Cell]) -> tuple[str, ...]:
    scored = any(not speculates(cell.decode) for cell in cells)
    return plan.pipeline.benchmark.quality.tasks if scored else ()


def _presence_of_model(plan: Plan, steps: list[Step], cache: Path) -> Presence:
    """Where the source model is; here, too, where no step reads it. It may ask the hub."""
    model = plan.pipeline.model
    if all(step.stage is not None for step in steps):
        return "here"
    return model_presence(model.source, cache, keep_blocks=model.keep_blocks)


def _is_installed(peer: PeerName, cache: Path) -> bool:
    """Whether an engine's environment is there; one without requirements runs in ours."""
    folder = environment_folder(peer.engine, cache)
    return not peer.engine.requirements or read_record(folder) is not None


# ---------------------------------------------------------------- what is missing


def _refused(work: Callable[[], object]) -> Iterator[Missing]:
    """What `work` raises, as what is missing."""
    try:
        work()
    except ComposeError as error:
        yield Missing(error.text(), error.fix)


ON_CPU = "set device: cpu in the model section"
UNKNOWN = ModelShape("unknown", 1, 1, 1, 1, 1, 1, 1, tie_embeddings=False)
"""Of a model that is not here yet."""
COPIES = ("int4", "int3", "int2", "nf4", "int4-head")
"""Draft copies that only the compiled kernels of a CPU multiply."""


def _without_device(
    plan: Plan, cells: list[Cell], steps: list[Step], left: list[Cell], cache: Path, local: bool
) -> Iterator[Missing]:
    """The parts of a plan that have no path on its device, and a device that is not here."""
    device = plan.pipeline.model.device
    if device == "cpu" or not (steps or left):
        return
    if local and not _has_cuda():
        yield Missing(
            f"device: {device}: torch finds no CUDA device on this machine",
            f"{ON_CPU}, or install the device's driver and a CUDA build of torch",
        )
    source = model_shape(plan.pipeline, cache) or UNKNOWN
    for cell in cells:
        packed = _packed(plan, cell, source)
        if packed == GRID_METHOD:
            yield from (Missing(each.message, each.fix) for each in not_installed(["triton"]))
        if (why := _has_no_path(plan, cell, packed)) is not None:
            yield Missing(
                f"{cell.name} has no path on {device}: {why}", f"{ON_CPU}, or leave it out"
            )


def _has_no_path(plan: Plan, cell: Cell, packed: str | None) -> str | None:
    """Why a cell, whose weights have the format `packed`, cannot run on another device than the
    CPU; None where it can."""
    from gateskip.quantization.folders import ON_CUDA

    draft = getattr(cell.decode, "draft_weights", None)
    if cell.peer is not None:
        return "other engines are measured on the CPU"
    if cell.backend == "native":
        return "the native backend runs on a CPU"
    if any(plan.pipeline.stages[name].role == "head" for name in cell.chain):
        return "an LM head that is packed by itself is decoded on a CPU"
    if packed not in (None, *ON_CUDA):
        return f"{packed} weights are decoded on a CPU"
    if plan.pipeline.model.keep_blocks:
        return "blocks of a GGUF file are decoded on a CPU"
    if draft in COPIES:
        return f"draft_weights: {draft} needs the compiled kernels of a CPU"
    return None


def _packed(plan: Plan, cell: Cell, source: ModelShape) -> str | None:
    """The format of a cell's packed weights, made from a model of the shape `source`."""
    if cell.folder is not None:
        return ModelShape.from_config(require_model(Path(cell.folder))).quantized
    stages = [plan.pipeline.stages[name] for name in cell.chain]
    formats = [stage.reshape(source).quantized for stage in stages if stage.role == "quantize"]
    return (formats or [source.quantized])[-1]


def _has_cuda() -> bool:
    """Whether torch, which is imported for this question alone, finds a CUDA device."""
    import torch

    return bool(torch.cuda.is_available())


def _without_model(plan: Plan, cache: Path) -> Iterator[Missing]:
    """Why a model that is absent is not available: nothing is fetched by asking."""
    model = plan.pipeline.model
    keep = model.keep_blocks
    yield from _refused(partial(resolve_model, model.source, cache, keep_blocks=keep))


def _without_drafts(sources: list[str], cache: Path) -> Iterator[Missing]:
    """Why models that only draft are not available."""
    for source in sources:
        yield from _refused(partial(resolve_model, source, cache))


def _without_texts(texts: list[tuple[str, ...]], cache: Path) -> Iterator[Missing]:
    """Texts without an available source, and files that cannot be read."""
    for sources in texts:
        if first_presence(sources, cache) == "absent" or _is_small_file(sources[0]):
            alone = partial(load_texts, sources[0], None, cache)  # whose error names the line
            several = partial(first_available, sources, None, cache)
            yield from _refused(alone if len(sources) == 1 else several)


def _is_small_file(source: str) -> bool:
    file = text_file(source)
    try:
        return file is not None and file.stat().st_size <= LARGEST_READ
    except OSError:
        return True  # which reading tells


def _without_peers(peers: list[PeerName], cache: Path) -> Iterator[Missing]:
    """Other engines whose file is not there, or that cannot be compiled here."""
    for peer in peers:
        if peer.file is not None and not peer.file.is_file():
            yield Missing(f"peer {peer.text}: there is no file {peer.file}", "name a .gguf file")
    compiled = [p.engine for p in peers if p.engine.compiled and not _is_installed(p, cache)]
    if compiled and not compilers():
        yield Missing(
            f"{compiled[0].name} is compiled on this machine, which has no C++ compiler",
            "install g++ or clang, or leave this engine out",
        )


def _without_libraries(
    steps: list[Step], tasks: tuple[str, ...], settings: Settings
) -> Iterator[Missing]:
    names = [name for step in steps if step.stage is not None for name in step.stage.libraries]
    names += EXTRAS["eval"] if tasks else ()
    names += EXTRAS["report"] if settings.draw is not None else ()
    names += EXTRAS["tensorboard"] if settings.tensorboard else ()
    yield from (Missing(error.message, error.fix) for error in not_installed(names))
