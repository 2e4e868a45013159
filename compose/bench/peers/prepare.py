"""Prepares a peer: its environment, and the model folder in the engine's own format.

cache/peers/models/FOLDER-ENGINE-OPTION        the input of an engine; FOLDER is a content hash
cache/peers/models/FOLDER-ENGINE-OPTION-TEXT   the same, fitted to a text, of which TEXT is a hash
cache/peers/models/FOLDER-ENGINE-imatrix-TEXT  llama.cpp's importance matrix on that text

Converted models are made once for each folder and text, and stay in the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.artifacts.folder import dtype_of, hash_folder, require_model
from compose.artifacts.gguf.file import open_gguf
from compose.artifacts.gguf.write import packed_by, write_gguf
from compose.artifacts.packed_folder import METHODS
from compose.assets.fetch import build_once
from compose.bench.peers.environment import environment_folder, python_of, versions_of
from compose.bench.peers.process import PreparedPeer, converted, write_importance
from compose.bench.peers.table import PeerName, parse_peer
from compose.errors import UserError
from compose.units import Progress

__all__ = ["CalibrationText", "PreparedPeer", "prepare"]

GGUF = "model.gguf"
IMPORTANCE = "importance.npz"


@dataclass(frozen=True)
class CalibrationText:
    """The text that a calibrated peer is fitted to."""

    sources: tuple[str, ...]
    rows: Sequence[Sequence[int]]
    """Token ids [N][S]."""

    def settings(self) -> str:
        """One sentence."""
        size = f"{len(self.rows)} rows of {len(self.rows[0])} tokens"
        return f"Calibrated on {size} of {' and '.join(self.sources)}."

    def digest(self) -> str:
        """12 hex digits over the token ids."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()[:12]


def prepare(
    option_name: str,
    folder: Path,
    cache: Path,
    progress: Progress | None = None,
    text: CalibrationText | None = None,
) -> PreparedPeer:
    """Make a peer ready for the model in `folder`: environment and conversion, each made once.

    A calibrated option is fitted to `text`; the others do not see it.

    Raises:
        UserError: there is no such peer, it cannot be installed on this machine, or it cannot run
        this model.
    """
    name = parse_peer(option_name)
    if not name.reads_text:
        text = None
    assert text is not None or not name.reads_text, "a calibrated peer is given its text"
    config = require_model(folder)
    engine = name.engine
    python = python_of(engine, cache, progress)
    model = _model(name, folder, cache, python, text, progress)
    return PreparedPeer(
        name=name.text,
        engine=engine.name,
        option=name.text.partition(":")[2],
        python=python,
        script=engine.script_path,
        model=model,
        vocabulary=int(config["vocab_size"]),
        disk_bytes=_disk_bytes(model),
        versions=versions_of(engine, python),
        settings=name.settings() if text is None else f"{name.settings()} {text.settings()}",
        flash=name.flash,
    )


def _model(
    name: PeerName,
    folder: Path,
    cache: Path,
    python: Path,
    text: CalibrationText | None,
    progress: Progress | None,
) -> Path:
    """The folder or file that the engine reads."""
    if name.engine.name == "transformers":
        return folder
    if name.file is not None:
        if not name.file.is_file():
            raise UserError(f"peer {name.text}: there is no file {name.file}", fix="name a .gguf")
        return name.file
    models = cache / "peers" / "models"
    content = hash_folder(folder)[:16]
    source = folder
    if name.engine.name == "llama.cpp":
        source = _gguf(folder, models, content, name.option, progress)
        if name.option == "bf16":
            return source
    made_by = f"{content}-{environment_folder(name.engine, cache).name}"
    fitted: dict[str, Any] = {}
    if text is not None and name.engine.name == "llama.cpp":
        place = models / f"{made_by}-imatrix-{text.digest()}"
        fitted = {"importance": str(_importance(name, python, source, place, text, progress))}
    elif text is not None:
        fitted = {"rows": text.rows}
    ending = "" if text is None else f"-{text.digest()}"
    target = models / f"{made_by}-{name.option}{ending}"

    def build(unfinished: Path) -> dict[str, Any]:
        if progress is not None:
            progress(0, 1, f"converting to {name.text}")
        output = unfinished / GGUF if name.engine.name == "llama.cpp" else unfinished
        converted(name, python, source, output, **fitted)
        return {"peer": name.text}

    build_once(target, build, note=f"the model of {name.text}")
    return target / GGUF if name.engine.name == "llama.cpp" else target


def _importance(
    name: PeerName,
    python: Path,
    source: Path,
    place: Path,
    text: CalibrationText,
    progress: Progress | None,
) -> Path:
    """llama.cpp's importance matrix of a GGUF file on a text; all file types share it."""

    def build(unfinished: Path) -> dict[str, Any]:
        if progress is not None:
            progress(0, 1, "importance matrix of llama.cpp")
        write_importance(name, python, source, unfinished / IMPORTANCE, text.rows)
        return {"text": text.settings()}

    build_once(place, build, note="the importance matrix of llama.cpp")
    return place / IMPORTANCE


def _gguf(folder: Path, models: Path, content: str, option: str, progress: Progress | None) -> Path:
    """The folder as a GGUF file in its float type, or as bf16 where the option asks for it."""
    if packed_by(require_model(folder)) in METHODS:
        raise UserError(
            f"llama.cpp:{option} quantizes float weights, but those of {folder} are integers",
            fix="write them with `gateskip export FOLDER --format gguf --to F.gguf`, and name"
            " llama.cpp:F.gguf",
        )
    kind = "bf16" if option == "bf16" or dtype_of(folder) == "bfloat16" else "f32"
    target = models / f"{content}-gguf-{kind}"

    def build(unfinished: Path) -> dict[str, Any]:
        if progress is not None:
            progress(0, 1, f"writing a GGUF file ({kind})")
        return write_gguf(folder, unfinished / GGUF, kind)

    build_once(target, build, note="the GGUF file")
    return target / GGUF


def _disk_bytes(model: Path) -> int:
    """Bytes of weights and graph. The vocabulary is not counted: only a GGUF file holds one beside
    its weights."""
    if model.is_file():
        return open_gguf(model).weight_bytes
    endings = (".safetensors", ".bin", ".xml", ".onnx", ".onnx.data", ".data")
    files = (file for file in model.iterdir() if file.is_file())
    graph = (file for file in files if file.name.endswith(endings))
    return sum(file.stat().st_size for file in graph if "tokenizer" not in file.name)
