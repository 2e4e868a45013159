"""The code that an export carries: gateskip modules, rewritten to work in one folder.

With `trust_remote_code=True` transformers loads `custom_generate/generate.py` of a folder and the
modules that it imports from the same folder, and also the model class that `auto_map` in
config.json names. The modules that decoding, or loading integer grids, needs are copied there with
relative imports, so that the export runs the same implementation.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path

from compose.artifacts.folder import GRID_METHOD, require_model
from compose.store import write_json

ROOTS = (
    "checkpoint",
    "decoding.decoder",
    "decoding.hf_generate",
    "kernels.build",
    "runtime.skipping",
)
ENTRY = "custom_generate/generate.py"
LOADER_ROOTS = ("quantization.hf_quantizer",)
LOADER = "modeling_grid.py"
_IMPORT = re.compile(r"^(\s*)from gateskip(?:\.([\w.]+))? import (\(|.+$)", re.MULTILINE)


def write_bundle(folder: Path) -> list[Path]:
    """Put `custom_generate/` into a model folder; returns the files written."""
    return _carry(folder / ENTRY, "custom_generate.py.txt", ROOTS)


def write_loader(folder: Path) -> list[Path]:
    """Put the code that loads integer grids into a model folder, and name it in the folder's
    config."""
    written = _carry(folder / LOADER, "modeling_grid.py.txt", LOADER_ROOTS)
    config = require_model(folder)
    named = {"AutoModelForCausalLM": f"{LOADER.removesuffix('.py')}.GridCausalLM"}
    write_json(folder / "config.json", {**config, "auto_map": named})
    return written


def needs_loader(folder: Path) -> bool:
    """Whether transformers needs code from the folder to load its weights."""
    packed = require_model(folder).get("quantization_config") or {}
    return bool(packed.get("quant_method") == GRID_METHOD)


def _carry(target: Path, template: str, roots: Sequence[str]) -> list[Path]:
    """Write an entry file and, beside it, the modules `roots` and all modules that they import."""
    target.parent.mkdir(exist_ok=True)
    entry = importlib.resources.files("compose") / "templates" / template
    text = entry.read_text(encoding="utf-8")
    carried = sorted(sources(roots).items())
    lines = [f"from .{flat_name(name)} import __name__ as _  # noqa: F401" for name, _ in carried]
    text = text.replace("VERSION", metadata.version("gateskip-compose"))
    target.write_text(text.replace("# CARRIED", "\n".join(lines)), "utf-8")
    written = [target]
    for name, source in carried:
        path = target.parent / f"{flat_name(name)}.py"
        path.write_text(_relative(source), encoding="utf-8")
        written.append(path)
    return written


def sources(roots: Sequence[str] | None = None) -> dict[str, str]:
    """Dotted module name below gateskip -> source, for `roots` (by default the modules that
    decoding needs) and all modules that they import from gateskip."""
    waiting, texts = list(ROOTS if roots is None else roots), dict[str, str]()
    while waiting:
        name = waiting.pop()
        if name not in texts:
            texts[name] = _file(name).read_text(encoding="utf-8")
            waiting += [part for match in _IMPORT.finditer(texts[name]) for part in _modules(match)]
    return texts


def flat_name(module: str) -> str:
    """File name, without its ending, of a gateskip module in the export's folder of code."""
    return "gateskip_" + module.replace(".", "_")


def _package() -> Path:
    spec = util.find_spec("gateskip")
    assert spec is not None and spec.submodule_search_locations, "gateskip is installed"
    return Path(spec.submodule_search_locations[0])


def _file(module: str) -> Path:
    return _package().joinpath(*module.split(".")).with_suffix(".py")


def _modules(match: re.Match[str]) -> list[str]:
    """The modules that an import statement names: the one that it imports from, or those that it
    imports."""
    _, base, names = match.groups()
    if base is not None and _file(base).is_file():
        return [base]
    return [f"{base}.{name}" if base else name for name, _ in _aliased(names)]


def _aliased(names: str) -> list[tuple[str, str]]:
    """(name, alias) of each part of `a, b as c`."""
    parts = [re.split(r"\s+as\s+", part) for part in re.split(r",\s*", names)]
    return [(part[0], part[-1]) for part in parts]


def _relative(source: str) -> str:
    """The source with relative imports in place of those from gateskip."""

    def rewrite(match: re.Match[str]) -> str:
        space, base, names = match.groups()
        modules = _modules(match)
        if modules == [base]:
            return f"{space}from .{flat_name(base)} import {names}"
        called = [alias for _, alias in _aliased(names)]
        lines = [
            f"from . import {flat_name(module)} as {alias}"
            for module, alias in zip(modules, called, strict=True)
        ]
        return space + f"\n{space}".join(lines)

    return _IMPORT.sub(rewrite, source)
