"""A model folder as one GGUF file, the format of llama.cpp.

It does the same as llama.cpp's converter, through the `gguf` package: metadata from config.json,
the tokenizer, tensors under their GGUF names, and Gemma's norms plus one. A draft network is left
out, because llama.cpp cannot run one. Float weights are stored in the requested type. Integer grids
go into blocks with the same codes, scales and minima (grids.py). The file is loaded back before it
is put in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.artifacts.folder import is_gated, probe_ids, require_model
from compose.artifacts.gguf.file import open_gguf
from compose.artifacts.gguf.grids import PARTS, gptq_blocks, grid_blocks, main_kind, refuse_grids
from compose.artifacts.gguf.metadata import (
    ARCHITECTURES,
    add_metadata,
    family_reasons,
    require_stated,
)
from compose.artifacts.gguf.names import PAIRED, gguf_name, is_shifted, paired
from compose.artifacts.gguf.tokenizer import add_tokenizer
from compose.artifacts.intake import weight_files
from compose.artifacts.packed_folder import GPTQ_METHOD, METHODS, PackedFolder
from compose.artifacts.predictions import kl_of_logits, unfilled
from compose.errors import ArtifactError, StepError, suggest
from compose.store import new_file

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

KINDS: dict[str, str] = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_1": "MOSTLY_Q4_1",
    "q4_0": "MOSTLY_Q4_0",
}
"""Storage types: name -> llama.cpp's name for such a file."""

USUAL = "f16"
BLOCK = 32  # weights of a row that share a scale
OUTER = ("model.embed_tokens.weight", "lm_head.weight")
SAME = 1e-3  # largest difference of two logits, over their range, for equal weights in float32
FLOATS = {"torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16"}


def write_gguf(
    folder: Path, file: Path, kind: str | None, name: str | None = None
) -> dict[str, Any]:
    """Write the model in `folder` to `file`, load it back, compare.

    Without a `kind`, float weights are stored as f16, and integer grids unchanged. `name` is the
    model's name in the file, that of the folder by default. Returns the
    result of `check_gguf`, `bytes`, and the `kind` in which most weights are stored.

    Raises:
        ArtifactError: the folder cannot be written as GGUF, or there is no such kind.
        StepError: the file does not load to the model that was written.
    """
    config = require_model(folder)
    refuse(folder, config)
    grids = packed_by(config) is not None
    if grids and kind is not None:
        raise ArtifactError(
            f"the weights of {folder} are integers, which are written unchanged",
            fix="leave --type out, or name the folder before rounding",
        )
    if not grids and (kind or USUAL) not in KINDS:
        raise ArtifactError(f"there is no GGUF type {kind!r}: {suggest(kind or USUAL, KINDS)}")
    main = main_kind(config) if grids else kind or USUAL
    with new_file(file) as unfinished:
        _write(folder, config, unfinished, main, name or folder.resolve().name)
        require_stated(folder, unfinished)
        differences = check_gguf(folder, unfinished, None if grids else main)
    return {**differences, "bytes": float(file.stat().st_size), "kind": main}


def packed_by(config: dict[str, Any]) -> str | None:
    """How a folder's weights are quantized; None where they are floats."""
    return (config.get("quantization_config") or {}).get("quant_method")


def refuse(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a folder that cannot be written.

    Raises:
        ArtifactError: with every reason.
    """
    packed = packed_by(config)
    reasons = {
        "it has gates, which llama.cpp cannot run": is_gated(folder),
        f"its weights are quantized by {packed!r}, and only integers of this project (int4, int8, "
        "...) and of GPTQ have blocks there": packed not in (None, *METHODS),
        **family_reasons(config),
    }
    refusals = [reason for reason, holds in reasons.items() if holds]
    if packed in METHODS:
        refusals += refuse_grids(config)
    if refusals:
        raise ArtifactError(
            f"{folder} cannot be written as GGUF: {'; '.join(refusals)}",
            fix="name a folder without gates and other quantizers; --type quantizes the file",
        )


def _write(folder: Path, config: dict[str, Any], file: Path, kind: str, title: str) -> None:
    from gguf import GGUFWriter

    layers = config["num_hidden_layers"]
    architecture = ARCHITECTURES[config["model_type"]]
    writer = GGUFWriter(file, architecture, use_temp_file=True)  # tensors need not fit in memory
    writer.add_name(title)
    add_metadata(writer, config, KINDS[kind])
    add_tokenizer(writer, folder, config)
    for name, stored, data in _stored(folder, config, kind):
        data = paired(name, data, config) if architecture in PAIRED else data
        writer.add_tensor(gguf_name(name, architecture, layers), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- Tensors -------------------------------------------------------------------------------------


def _stored(
    folder: Path, config: dict[str, Any], kind: str
) -> Iterator[tuple[str, Any, NDArray[Any]]]:
    """Name, GGML type and data of every weight."""
    from gguf import GGMLQuantizationType as Ggml

    packed = packed_by(config)
    if packed is not None:
        blocks = gptq_blocks(folder) if packed == GPTQ_METHOD else grid_blocks(folder, config)
        for name, block, rows in blocks:
            yield name, Ggml[block], rows
    for name, tensor in _tensors(folder, config):
        storage = kind if packed is None else FLOATS[str(tensor.dtype)]
        shifted = is_shifted(name, ARCHITECTURES[config["model_type"]])
        yield name, *rounded(name, tensor.float() + 1 if shifted else tensor, storage)


def _tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every float weight, one file at a time, without a tied LM head."""
    from safetensors import safe_open

    for shard in weight_files(folder):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tied = name == "lm_head.weight" and config.get("tie_word_embeddings")
                other = name.endswith((*PARTS, "rotary_emb.inv_freq"))
                if not tied and not other:
                    yield name, file.get_tensor(name)


def rounded(name: str, tensor: Tensor, kind: str) -> tuple[Any, NDArray[Any]]:
    """A tensor in its storage type: GGML type and data, rows first.

    Vectors stay in float32, rows that are not a whole number of blocks in float16. With 4-bit
    types, the embedding and the LM head get 8 bits.
    """
    from gguf import GGMLQuantizationType as Ggml
    from gguf import quants

    if name in OUTER and kind.startswith("q4"):
        kind = "q8_0"
    if kind.startswith("q") and tensor.shape[-1] % BLOCK:
        kind = "f16"
    stored = Ggml.F32 if tensor.ndim == 1 else Ggml[kind.upper()]
    return stored, quants.quantize(tensor.float().numpy(), stored)


# --- Loading it back -----------------------------------------------------------------------------


def check_gguf(folder: Path, file: Path, kind: str | None) -> dict[str, float]:
    """Load the file by this project's reader, which tests compare with transformers' and
    llama.cpp's, and compare the logits with those of the folder's weights, rounded in the same way.

    Both are computed in float32, so they must agree for every type: a difference comes from a wrong
    weight, name or size, not from rounding. Without a `kind` nothing was rounded but the minima of
    a folder in the GPTQ format. Returns `max_abs_diff` and `range` of these logits, and `kl` to the
    folder's own predictions, which is the cost of the rounding.

    Raises:
        StepError: they differ.
    """
    import torch

    from gateskip.quantization.folders import load_model

    ids = probe_ids(folder)
    model = load_model(folder, "float32")
    with torch.inference_mode():
        dense = expected = model(ids).logits  # [1, S, V]
        if kind is not None:
            _round_in_place(model, kind)
            expected = model(ids).logits
        del model  # one of them at a time
        if packed_by(require_model(folder)) == GPTQ_METHOD:
            expected = _with_rounded_minima(folder)(ids).logits
        logits = _loaded(folder, file)(ids).logits
    if logits.shape != expected.shape:
        raise StepError(f"the file gives logits of shape {tuple(logits.shape)}")
    difference = float((logits - expected).abs().max())
    span = float(expected.max() - expected.min())
    if not difference <= SAME * span:
        raise StepError(
            "the GGUF file does not load to the model that was written: its logits differ by"
            f" {difference:.3g} over a range of {span:.3g}"
        )
    return {"max_abs_diff": difference, "range": span, "kl": kl_of_logits(dense, logits)}


def _with_rounded_minima(folder: Path) -> Any:
    """The model of a folder in the GPTQ format, with minima as blocks hold them."""
    model, weights, _ = unfilled(folder)
    source = PackedFolder(folder)
    for name in (*source.layers, *source.embeddings):
        layer = source.layer(name)
        value = layer.weight().unflatten(1, (-1, layer.group))
        if layer.zeros is not None:
            lowest = layer.zeros.float() * layer.scale.float()
            value += (lowest - lowest.half().float()).unsqueeze(2)
        weights[f"{name}.weight"].copy_(value.flatten(1))
    for name, value in source.others():
        if name in weights:
            weights[name].copy_(value)
    return model


def _loaded(folder: Path, file: Path) -> Any:
    """The folder's architecture with the file's weights in float32, read one after the other."""
    from compose.artifacts.gguf.block_grids import Errors
    from compose.artifacts.gguf.read import matched, tensors_of

    model, weights, stated = unfilled(folder)
    gguf = open_gguf(file)
    tensors = matched(gguf, stated, {name: tuple(value.shape) for name, value in weights.items()})
    for name, value in tensors_of(gguf, stated, tensors, {}, Errors()):
        weights[name].copy_(value)
    return model


def _round_in_place(model: Any, kind: str) -> None:
    """Replace every weight by the value that its storage type rounds it to."""
    import torch
    from gguf import quants

    for name, parameter in model.named_parameters():
        stored, data = rounded(name, parameter.detach(), kind)
        value = torch.from_numpy(quants.dequantize(data, stored).copy())
        parameter.copy_(value.view(parameter.shape))
