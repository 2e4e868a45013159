"""A GGUF file as an ordinary Hugging Face folder: config, tokenizer, chat template and weights.

Weights are dequantized to float32, which loses nothing: a value of any GGUF type is a float32
number. The file must have exactly the model's tensors, in the model's sizes, because a further
tensor would change the function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.artifacts.folder import GRID_METHOD
from compose.artifacts.gguf.block_grids import (
    Errors,
    Held,
    Tensors,
    block_weights,
    grid_tensors,
    has_blocks,
    quantization,
    require_blocks_in,
)
from compose.artifacts.gguf.config import ROPE_FACTORS, config_of
from compose.artifacts.gguf.file import GgufFile, GgufTensor, open_gguf
from compose.artifacts.gguf.names import PAIRED, gguf_name, is_shifted, unpaired
from compose.artifacts.gguf.tokenizer import require_tokenizer, save_tokenizer
from compose.artifacts.shards import save_shards
from compose.store import read_json, write_json

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray
    from torch import Tensor

CHUNK = 8192


def check_gguf_source(path: Path, *, keep_blocks: bool = False) -> dict[str, Any]:
    """The config.json that a file's folder will have; quick, and without any library.

    Raises:
        ArtifactError: the file cannot be read as a model; the message says why.
    """
    file = open_gguf(path)
    require_tokenizer(file)
    config = config_of(file)
    if not keep_blocks:
        return config
    require_blocks_in(file)
    return config | {"quantization_config": {"quant_method": GRID_METHOD}}


def keeps_blocks(path: Path) -> bool:
    """Whether layers of the file are quantized, so that their blocks can be kept.

    Raises:
        ArtifactError: the file cannot be read.
    """
    return has_blocks(open_gguf(path))


def write_folder(
    path: Path,
    folder: Path,
    name: str | None = None,
    *,
    keep_blocks: bool = False,
    dtype: str = "float32",
) -> str:
    """Write the model in a GGUF file as a folder, its floating-point weights in `dtype`.

    `name` is the model's hub id, where it is known; it also tells the licence. With `keep_blocks`
    quantized weights stay grids; the text that is returned tells how, and with what errors.

    Raises:
        ArtifactError: the file cannot be read as a model; the message says why.
    """
    file = open_gguf(path)
    require_tokenizer(file)
    config = config_of(file)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = matched(file, config, save_config(file, config, folder, name, dtype))
    grids: dict[str, Held] = {}
    errors = Errors()
    if keep_blocks:
        require_blocks_in(file)
        grids = block_weights(tensors)
        stated = {**(read_json(folder / "config.json") or {})}
        stated["quantization_config"] = quantization(tensors, grids)
        write_json(folder / "config.json", stated)
    save_shards(folder, tensors_of(file, config, tensors, grids, errors, dtype))
    save_tokenizer(file, folder, config["max_position_embeddings"])
    if name is None:
        _save_licence(file, folder)
    return errors.text()


def save_config(
    file: GgufFile, config: dict[str, Any], folder: Path, name: str | None, dtype: str
) -> dict[str, tuple[int, ...]]:
    """Write config.json and generation_config.json; the name and shape of every weight."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    stated = AutoConfig.for_model(**config)
    stated.dtype = getattr(torch, dtype)
    stated._name_or_path = name or ""
    stated.save_pretrained(folder)
    ends = {key: value for key, value in config.items() if key.endswith("_token_id")}
    turn = file.metadata.get("tokenizer.ggml.eot_token_id")
    if turn is not None and turn != ends["eos_token_id"]:
        ends["eos_token_id"] = [ends["eos_token_id"], turn]
    GenerationConfig(**ends).save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(stated)
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    return {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in tied}


def tensors_of(
    file: GgufFile,
    config: dict[str, Any],
    tensors: Tensors,
    grids: dict[str, Held],
    errors: Errors,
    dtype: str = "float32",
) -> Iterator[tuple[str, Tensor]]:
    """The folder's tensors by name, read one after the other: grids for the weights in `grids`,
    whose errors are counted, and `dtype` for all others."""
    import torch

    paired = file.metadata["general.architecture"] in PAIRED
    for name, tensor in tensors:
        if name in grids:
            rows = stored_rows(file, tensor)
            rows = unpaired(name, rows, config) if paired else rows
            yield from grid_tensors(name, rows, tensor.type, grids[name], errors)
        else:
            values = torch.from_numpy(_values(file, tensor, name, config))
            yield name, values.to(getattr(torch, dtype))


def matched(file: GgufFile, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """Pairs of each weight's name in `shapes` and the file's tensor for it.

    Raises:
        ArtifactError: the file lacks a weight, has one in another size, or has a tensor that is not
            a weight of the model.
    """
    architecture, layers = file.metadata["general.architecture"], config["num_hidden_layers"]
    pairs = []
    for name, shape in shapes.items():
        stored_name = gguf_name(name, architecture, layers)
        tensor = file.tensors.get(stored_name)
        if tensor is None:
            file.refuse(f"it has no tensor {stored_name}")
        if tensor.shape != shape:
            file.refuse(f"{stored_name} has the sizes {tensor.shape}, and the model {shape}")
        pairs.append((name, tensor))
    left = sorted(file.tensors.keys() - {tensor.name for _, tensor in pairs} - {ROPE_FACTORS})
    if left:
        file.refuse(f"it has a tensor {left[0]}, which its architecture does not have")
    return pairs


def stored_rows(file: GgufFile, tensor: GgufTensor) -> NDArray[numpy.uint8]:
    """A tensor's bytes, unchanged from the file, [rows, bytes]."""
    import numpy

    shape = (tensor.rows, tensor.row_bytes)
    return numpy.memmap(file.path, numpy.uint8, "r", tensor.start, shape)


def _values(
    file: GgufFile, tensor: GgufTensor, name: str, config: dict[str, Any]
) -> NDArray[numpy.float32]:
    """A weight in float32, in the order and with the meaning that transformers gives it."""
    import numpy

    architecture = file.metadata["general.architecture"]
    values = _dequantized(stored_rows(file, tensor), tensor).reshape(tensor.shape)
    if architecture in PAIRED:
        values = unpaired(name, values, config)
    if is_shifted(name, architecture):
        values = values - 1
    return numpy.require(values, numpy.float32, ["C", "W"])


def _dequantized(rows: NDArray[numpy.uint8], tensor: GgufTensor) -> NDArray[numpy.float32]:
    """Rows of blocks as float32 [rows, k], CHUNK rows at a time: the gguf package alone would hold
    a table of the vocabulary twice."""
    import numpy
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(tensor.type)
    values = numpy.empty((len(rows), tensor.shape[-1]), numpy.float32)
    for start in range(0, len(rows), CHUNK):
        values[start : start + CHUNK] = dequantize(rows[start : start + CHUNK], kind)
    return values


def _save_licence(file: GgufFile, folder: Path) -> None:
    """README.md with the licence that a file states, where exports look for it."""
    licence = file.metadata.get("general.license")
    if isinstance(licence, str):
        text = f"---\nlicense: {licence}\n---\nConverted from `{file.path.name}`.\n"
        (folder / "README.md").write_text(text, encoding="utf-8")


def main_storage(path: Path) -> str:
    """Storage type of most weights of a file: `Q4_K`."""
    counts: Counter[str] = Counter()
    for tensor in open_gguf(path).tensors.values():
        counts[tensor.storage.name] += tensor.rows * tensor.shape[-1]
    return counts.most_common(1)[0][0]
