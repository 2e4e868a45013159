"""GGUF files for tests: broken ones byte by byte, and tiny models as llama.cpp's converter does.

What the converter does to each architecture (names, order of rows, norms plus one) is written anew
here, so that a test of the reader does not read what the reader's own tables wrote; that llama.cpp
runs such files as transformers runs the folder is a test in test_peers.py.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy
from gguf import GGMLQuantizationType as Ggml
from safetensors.numpy import load_file

from compose.artifacts.gguf.tokenizer import add_tokenizer

STRING, ARRAY = 8, 9
Tensors = Sequence[tuple[str, tuple[int, ...], int, bytes]]
"""Name, sizes with rows first, GGML type, bytes."""


def raw_gguf(metadata: Mapping[str, Any], tensors: Tensors = (), version: int = 3) -> bytes:
    """A file's bytes: texts, whole numbers, floats, and lists of texts as metadata."""
    head = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head += [_text(key), _typed(value)]
    data = b""
    for name, shape, kind, content in tensors:
        sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        place = struct.pack("<IQ", kind, len(data))
        head += [_text(name), struct.pack("<I", len(shape)), sizes, place]
        data += content + bytes(-len(content) % 32)
    start = b"".join(head)
    return start + bytes(-len(start) % 32) + data


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _typed(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, list):
        texts = b"".join(map(_text, value))
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + texts
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<II", 4, value)


ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
"""transformers' name of a family -> llama.cpp's."""

SIX_LAYERS = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
}
"""Of Gemma 3: a file has only the pattern of all its models, one full layer in six."""

UNSAID = ("transformers_version", "_name_or_path", "initializer_range", "max_window_layers")
"""Entries of a config.json that no file has, and that do not change the function."""


def converted(
    folder: Path, file: Path, kind: str = "F32", kinds: Mapping[str, str] | None = None
) -> Path:
    """The tiny model in `folder` as llama.cpp's converter writes it, matrices stored as `kind`, or
    as `kinds` says for modules of some names."""
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    arch = gguf.MODEL_ARCH[architecture.upper()]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(file, architecture)
    _add_sizes(writer, config, architecture)
    add_tokenizer(writer, folder, config)
    for name, value in load_file(folder / "model.safetensors").items():
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert own is not None, name
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            value = _pairs(value, heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        module = name.split(".")[-2]
        stored = Ggml.F32 if value.ndim == 1 else Ggml[(kinds or {}).get(module, kind)]
        writer.add_tensor(own, _stored(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


SPREADS = {"Q4_K": (0, 1 / 2700), "Q5_K": (0, 1 / 5700), "Q6_K": (208, 1 / 27000)}
"""K type -> where its blocks have a float16 scale, and that scale of weights around 0.05."""


def _stored(value: Any, stored: Ggml) -> Any:
    """A matrix in blocks. The gguf package cannot round to K types, so theirs are random."""
    if stored.name not in SPREADS:
        return gguf.quantize(value, stored)
    weights, size = gguf.GGML_QUANT_SIZES[stored]
    place, scale = SPREADS[stored.name]
    n, blocks = len(value), value.shape[1] // weights
    random = numpy.random.default_rng(value.size)
    rows = random.integers(0, 256, (n, blocks, size), dtype=numpy.uint8)
    heads = [scale] if place else [scale, scale * (2 ** int(stored.name[1]) - 1) / 2]
    for i, number in enumerate(heads):
        start = place + 2 * i
        rows[:, :, start : start + 2] = numpy.array([number], "<f2").view(numpy.uint8)
    return rows.reshape(n, -1)


def _pairs(value: Any, heads: int) -> Any:
    """Channel i of a head and channel i + D / 2 side by side."""
    rows = numpy.arange(len(value)).reshape(heads, 2, -1).transpose(0, 2, 1).ravel()
    return value[rows]


def _add_sizes(writer: Any, config: dict[str, Any], architecture: str) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture in ("llama", "phi3"):
        writer.add_rope_dimension_count(head_dim)
    if architecture == "llama":
        writer.add_vocab_size(config["vocab_size"])
    if architecture in ("qwen3", "gemma2", "gemma3"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture in ("phi3", "gemma2", "gemma3"):
        writer.add_sliding_window(config["sliding_window"])
    if architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
