"""A pipeline file to start from: the template with the name of a run and a model."""

from __future__ import annotations

import importlib.resources
import json
import os
from pathlib import Path
from string import Template

from compose.artifacts.intake import require_source
from compose.assets import MODELS, is_local, model_config
from compose.errors import PipelineError, UserError
from compose.language.parse import read_yaml
from compose.language.schema import in_name
from compose.stages.base import ModelShape
from compose.store import require_writable

TEMPLATE = "pipeline.yaml.txt"


def write_new_file(file: Path, model: str) -> None:
    """Write a commented pipeline for `model`: an alias, a hub id, a folder or a GGUF file.

    Raises:
        UserError: the file exists, or its folder may not be written to.
        AssetError: there is no such model, or its folder is not whole.
        ArtifactError: the GGUF file cannot be read.
        PlanError: the model is no decoder of a kind that is known here.
    """
    if file.exists():
        raise UserError(
            f"{file} exists already, and is not overwritten",
            fix="give another name, or remove the file first",
        )
    require_writable(file)
    _require_model(model)
    text = pipeline_text(_run_name(file), _source_beside(model, file.absolute().parent))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("x", encoding="utf-8") as stream:
        stream.write(text)


def pipeline_text(name: str, source: str) -> str:
    """The template for a run `name` of the model `source`, as a file in its folder names it."""
    template = importlib.resources.files("compose") / "templates" / TEMPLATE
    words = {"name": name, "source": source, "target": f"exports/{name}"}
    quoted = {key: _yaml_text(text) for key, text in words.items()}
    return Template(template.read_text(encoding="utf-8")).substitute(quoted)


def _require_model(source: str) -> None:
    config = model_config(source)
    if config is not None:
        ModelShape.from_config(config)
    folder = Path(source).expanduser()
    if source not in MODELS and folder.is_dir():
        require_source(folder)


def _run_name(file: Path) -> str:
    """The file's stem in the characters that a name may have."""
    return in_name(file.stem).lstrip("_.-") or "first"


def _source_beside(source: str, folder: Path) -> str:
    """The model as a file in `folder` names it: a relative path starts there."""
    if not is_local(source) or Path(source).is_absolute() or source.startswith("~"):
        return source
    return os.path.relpath(source, folder)


def _yaml_text(text: str) -> str:
    """Text as a value of a YAML file, in quotes where it would be read as something else."""
    try:
        same = read_yaml(f"a: {text}  #", "")[0]["a"] == text
    except PipelineError:
        same = False
    return text if same else json.dumps(text, ensure_ascii=False)
