"""`gateskip bench` as a plan: model folders that are there, ways to decode them, and peers.

The plan has no steps. Its cells are measured by what measures the cells of a pipeline, so a number
of `gateskip bench` and one of `gateskip run` are one kind of number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compose.artifacts.folder import dtype_of, require_model
from compose.bench.peers.table import is_peer, parse_peer
from compose.bench.speed.systems import System, parse_system
from compose.contract import Device
from compose.errors import UserError
from compose.language.schema import Benchmark, Model, Pipeline, in_name
from compose.planning.keys import cell_key, digest, listing
from compose.planning.plan import Cell, Plan, why_no_baseline
from compose.planning.prepare import require_inputs
from compose.stages.decode import DecodeStage, Plain, Skip, Speculate

PLAIN = "plain"
WITH_DRAFT_MODEL = "draft:1+model+lookup"
OPTIONS = {
    "name": "--name",
    "batch_sizes": "--batch",
    "contexts": "--prompt-tokens",
    "tasks": "--task",
    "perplexity": "--text",
    "quality": "--task",
}
"""Setting of a pipeline -> the option that gives it, where these are called differently."""


def bench_plan(
    name: str,
    folders: Sequence[Path],
    systems: Sequence[str],
    against: Sequence[str],
    benchmark: dict[str, Any],
    device: Device = "cpu",
    draft_model: Path | None = None,
) -> Plan:
    """A cell for every folder and system, then the peers on the first folder.

    The first folder with the first system is the baseline. `benchmark` are the settings of a
    pipeline's `benchmark` section; `device` is where the cells run. `draft_model` drafts where a
    system names `model`, and is one of the drafts of `auto`.

    Raises:
        UserError: a folder is no model, a system, a peer, a text or a task is not known, something
            is named twice, or quality is to be compared with a cell that skips or drafts.
    """
    for folder in folders:
        require_model(folder)
    ways = _ways(systems, draft_model)
    peers = [*(system for system in systems if is_peer(system)), *against]
    for peer in peers:
        parse_peer(peer)
    if peers and benchmark["speed"].get("sampling"):
        raise UserError(
            "other engines are timed greedily, so they cannot be compared with folders that sample",
            fix=f"leave out --temperature, or {peers[0]}",
        )
    places = [folder.absolute() for folder in folders]
    cells = [
        _cell(place, label, way, ways, device)
        for place, label in zip(places, _labels(places), strict=True)
        for way in ways
    ]
    weights = _content_key(places[0])
    cells += [
        Cell(
            name=peer,
            chain=(),
            key=cell_key(weights, None, peer),
            weights=weights,
            decode=None,
            plain=None,
            origin="peer",
            peer=peer,
            folder=str(places[0]),
        )
        for peer in peers
    ]
    twice = [label for label, count in Counter(cell.name for cell in cells).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]} is named twice", fix="name each system and folder once")
    stages = {way.name: stage for way in ways if (stage := decode_stage(way)) is not None}
    drafts = [stage.draft_model for stage in stages.values() if isinstance(stage, Speculate)]
    if draft_model is not None and not any(drafts):
        raise UserError(
            "--draft-model: no way of decoding uses it",
            fix=f"add --system {WITH_DRAFT_MODEL}",
        )
    settings = {**benchmark, "baseline": cells[0].name}
    pipeline = _pipeline(name, places[0], settings, device)
    pipeline = pipeline.model_copy(update={"stages": stages, "matrix": None})
    require_inputs(pipeline)
    if (why := why_no_baseline(cells[0], pipeline.benchmark.quality)) is not None:
        raise UserError(f"the first system {why}", fix="name plain first, or leave out --quality")
    return Plan(pipeline, (), tuple(cells), ())


def default_name(folder: Path) -> str:
    """The name of a run that is given none, from its first folder.

    >>> default_name(Path("/models/My Model"))
    'bench-My-Model'
    """
    return "bench-" + in_name(folder.absolute().name)


def _pipeline(name: str, folder: Path, benchmark: dict[str, Any], device: Device) -> Pipeline:
    """The settings as a pipeline. Raises UserError, with the option, where one is not valid."""
    model = Model(source=str(folder), dtype=_known_dtype(folder), device=device)
    try:
        checked = Benchmark.model_validate(benchmark)
        return Pipeline(name=name, model=model, benchmark=checked)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        setting = [part for part in first["loc"] if isinstance(part, str)][-1]
        message = str(first.get("ctx", {}).get("error") or first["msg"])
        raise UserError(f"{OPTIONS.get(setting, setting)}: {message}") from None


def _ways(systems: Sequence[str], draft_model: Path | None) -> list[System]:
    """The systems that are no peers. Without any, plain decoding, and beside it drafts of the draft
    model where there is one."""
    names = [name for name in systems if not is_peer(name)]
    if not names:
        names = [PLAIN] if draft_model is None else [PLAIN, WITH_DRAFT_MODEL]
    ways = [parse_system(name) for name in names]
    if draft_model is not None:
        require_model(draft_model)
        given = {"draft_model": str(draft_model.absolute())}
        ways = [
            replace(way, settings=way.settings | given)
            if way.settings.get("draft_weights") in ("auto", "model")
            else way
            for way in ways
        ]
    return ways


def decode_stage(system: System) -> DecodeStage | None:
    """The decode stage that a pipeline file would name; None for plain decoding.

    Raises UserError where a setting is out of its range.
    """
    mode = system.settings["mode"]
    settings = {name: value for name, value in system.settings.items() if name != "mode"}
    try:
        if mode == "skip":
            return Skip.model_validate(settings)
        if mode == "speculate":
            return Speculate.model_validate(settings)
        return Plain.model_validate(settings) if settings else None
    except ValueError as error:
        raise UserError(f"system {system.name!r}: {error}", fix="as in draft:0.8+nf4+4") from error


def _cell(folder: Path, label: str, way: System, ways: Sequence[System], device: Device) -> Cell:
    """A folder decoded in one way; it is compared with the same folder in the same backend."""
    weights, decode = _content_key(folder), decode_stage(way)
    draft = way.settings.get("draft_model")
    pins = None if draft is None else {draft: _content_key(Path(draft))}
    other = None if decode is None else decode.compared_with()
    plain = [base for base in ways if decode_stage(base) == other and base.backend == way.backend]
    backend = way.backend or "auto"
    return Cell(
        name=label + way.name,
        chain=() if decode is None else (way.name,),
        key=digest(
            {
                "cell": cell_key(weights, decode, draft_sha256=pins, device=device),
                "backend": backend,
            }
        ),
        weights=weights,
        decode=decode,
        plain=label + plain[0].name if decode is not None and plain else None,
        origin="bench",
        folder=str(folder),
        dtype="auto",
        backend=backend,
    )


def _labels(folders: Sequence[Path]) -> list[str]:
    """What tells cells of several folders apart: their names, with parents where those are one."""
    if len(folders) == 1:
        return [""]
    names = [folder.name for folder in folders]
    return [
        f"{folder.name if names.count(folder.name) == 1 else '/'.join(folder.parts[-2:])}:"
        for folder in folders
    ]


def _content_key(folder: Path) -> str:
    """A key that changes with the folder's files, without reading weights."""
    return digest({"folder": str(folder), "files": listing(folder)})


def _known_dtype(folder: Path) -> Any:
    """The float type of a folder, for the record; cells are loaded in what their folders say."""
    dtype = dtype_of(folder)
    return dtype if dtype in ("float32", "bfloat16", "float16") else "float32"
