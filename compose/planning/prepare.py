"""A pipeline file -> its plan, from the sizes of its model and the pinned hashes of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from compose.artifacts.gguf.file import is_gguf
from compose.artifacts.intake import require_source
from compose.artifacts.vocabulary import read_vocabulary
from compose.assets import (
    SELF_WRITTEN,
    data_pin,
    model_config,
    model_pin,
    require_task_name,
    require_text_name,
)
from compose.errors import ArtifactError, AssetError, PlanError, context
from compose.language.parse import load_pipeline
from compose.language.positions import Loc
from compose.language.schema import Pipeline
from compose.planning.keys import InputHashes, text_hashes
from compose.planning.plan import Plan
from compose.planning.planner import make_plan
from compose.stages.base import ModelShape
from compose.stages.decode import Speculate
from gateskip.decoding.vocabulary import vocabulary_difference


def load_plan(file: Path, asset_cache: Path) -> Plan:
    """Read a pipeline file and plan it. Nothing heavy is imported, no weights are fetched.

    Raises:
        PipelineError: the file is not valid.
        PlanError: its chains do not make a plan.
        AssetError: the file names a model, a text or a task that does not exist.
    """
    pipeline = load_pipeline(file)
    with context(file=file):
        require_inputs(pipeline)
        shape = model_shape(pipeline, asset_cache)
        refuse_longer(pipeline, shape)
        refuse_other_vocabularies(pipeline, shape, asset_cache)
        return make_plan(pipeline, shape, input_hashes(pipeline, asset_cache))


def require_inputs(pipeline: Pipeline) -> None:
    """Refuse the first model, text or task that does not exist or cannot be read, at its line.

    A name `owner/name` of the hub is not refused: the hub may have it when it is read.

    Raises:
        AssetError: there is no text or task of that name, or the model's folder is not whole.
    """
    for loc, check in _inputs(pipeline):
        try:
            check()
        except AssetError as error:
            raise pipeline.locate(error, loc) from None


def _inputs(pipeline: Pipeline) -> Iterator[tuple[Loc, Callable[[], None]]]:
    """Every name of a model, a text or a task: its place in the file, and what refuses it."""
    folder = Path(pipeline.model.source)
    if folder.is_absolute() and not is_gguf(folder):  # a file's header is read for its sizes
        yield ("model", "source"), partial(require_source, folder)
    for loc, source in draft_models(pipeline):
        if Path(source).is_absolute() and not is_gguf(source):
            yield loc, partial(require_source, Path(source))
    for split in ("train", "calibration"):
        spec = getattr(pipeline.data, split)
        for source in spec.weights:
            place: Loc = ("data", split, "mix", source) if spec.mix else ("data", split, "source")
            if source != SELF_WRITTEN:
                yield place, partial(require_text_name, source)
    quality = pipeline.benchmark.quality
    place = ("benchmark", "quality")
    for index, source in enumerate(quality.perplexity):
        yield (*place, "perplexity", index), partial(require_text_name, source)
    for index, name in enumerate(quality.tasks):
        yield (*place, "tasks", index), partial(require_task_name, name)
    if (answers := quality.own_answers) is not None:
        yield (*place, "own_answers", "source"), partial(require_text_name, answers.source)
    lossless = pipeline.benchmark.lossless.source
    yield ("benchmark", "lossless", "source"), partial(require_text_name, lossless)
    if (prompts := pipeline.benchmark.speed.prompts) is not None:
        yield ("benchmark", "speed", "prompts"), partial(require_text_name, prompts)


def refuse_longer(pipeline: Pipeline, shape: ModelShape | None) -> None:
    """Refuse text longer than the context that the model was made for, at its line.

    Raises:
        PlanError: with the length, and the model's.
    """
    positions = None if shape is None else shape.positions
    if positions is None:
        return
    for loc, length in _lengths(pipeline):
        if length > positions:
            error = PlanError(
                f"{length} tokens are more than the {positions} positions of this model",
                fix="take a shorter length",
            )
            raise pipeline.locate(error, loc)


def draft_models(pipeline: Pipeline) -> list[tuple[Loc, str]]:
    """Every model that only drafts: its place in the file, and its source."""
    return [
        (("stages", name, "draft_model"), stage.draft_model)
        for name, stage in pipeline.stages.items()
        if isinstance(stage, Speculate) and stage.draft_model is not None
    ]


def refuse_other_vocabularies(
    pipeline: Pipeline, shape: ModelShape | None, asset_cache: Path
) -> None:
    """Refuse a draft model with another vocabulary than the pipeline's model, at its line.

    Sizes are compared where they are known, and tokens where both models are folders. All is
    compared again when the draft model is loaded.

    Raises:
        AssetError: there is no such model.
        PlanError: it cannot draft for the pipeline's model.
    """
    for loc, source in draft_models(pipeline):
        try:
            config = model_config(source, asset_cache)
            draft = None if config is None else ModelShape.from_config(config)
        except (PlanError, AssetError, ArtifactError) as error:
            raise pipeline.locate(error, loc) from None
        ours, drafts = (read_vocabulary(Path(name)) for name in (pipeline.model.source, source))
        reason = None
        if ours is not None and drafts is not None:
            reason = vocabulary_difference(ours, drafts)
        if shape is not None and draft is not None and draft.vocab_size != shape.vocab_size:
            reason = f"{draft.vocab_size} tokens, and the model has {shape.vocab_size}"
        if reason is not None:
            fix = "name a model with the same tokenizer, of the same family"
            raise pipeline.locate(PlanError(f"draft_model: it has {reason}", fix=fix), loc)


def _lengths(pipeline: Pipeline) -> Iterator[tuple[Loc, int]]:
    """Every length of text that the file asks for, and its place."""
    stages = pipeline.stages.items()
    for split in sorted({split for _, stage in stages for split in stage.reads_data}):
        yield ("data", split, "length"), getattr(pipeline.data, split).length
    for name, stage in stages:
        if isinstance(length := getattr(stage, "length", None), int):
            yield ("stages", name, "length"), length
    speed = pipeline.benchmark.speed
    if speed.prompts is None:
        yield ("benchmark", "speed", "prompt_tokens"), speed.prompt_tokens + speed.new_tokens
    for index, length in enumerate(speed.contexts):
        yield ("benchmark", "speed", "contexts", index), length + speed.new_tokens


def model_shape(pipeline: Pipeline, asset_cache: Path) -> ModelShape | None:
    """The sizes of the source model; None if its config is not available."""
    model = pipeline.model
    try:
        config = model_config(model.source, asset_cache, keep_blocks=model.keep_blocks)
        return None if config is None else ModelShape.from_config(config)
    except (PlanError, AssetError, ArtifactError) as error:
        raise pipeline.locate(error, ("model", "source")) from None


def input_hashes(pipeline: Pipeline, asset_cache: Path | None = None) -> InputHashes:
    """The pinned hashes of model and data, where they have one: part of the steps' keys."""
    hashes = InputHashes()
    model = pipeline.model
    pin = model_pin(model.source, asset_cache, keep_blocks=model.keep_blocks)
    if pin is not None:
        hashes["model_sha256"] = pin
    sources = {*pipeline.data.train.weights, *pipeline.data.calibration.weights}
    pins = {source: data_pin(source) for source in sources}
    named = {source: pin for source, pin in pins.items() if pin is not None}
    hashes["data_sha256"] = named | text_hashes(sources)
    models = {source: model_pin(source, asset_cache) for _, source in draft_models(pipeline)}
    hashes["draft_sha256"] = {source: pin for source, pin in models.items() if pin is not None}
    return hashes
