"""A model folder's config.json as a GGUF file's metadata, architecture by architecture.

Some entries of a config have no metadata (which layers have a window, how queries are scaled):
llama.cpp has them in its code. So config.py reads the written metadata back, and the result must
equal the folder's config.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from compose.artifacts.gguf.config import FAMILIES, LOCAL_THETA, SPECIALS, config_of
from compose.artifacts.gguf.file import open_gguf
from compose.errors import ArtifactError

WRITTEN = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text")
"""Families, by transformers' names, that can be written as GGUF."""

ARCHITECTURES = {family.model_type: name for name, family in FAMILIES.items()}
"""transformers' name of a family -> llama.cpp's."""

SILENT = ("architectures", *(f"{name}_token_id" for name in SPECIALS))
"""Entries of a config that do not change the model's function."""


def family_reasons(config: dict[str, Any]) -> dict[str, bool]:
    """Why a config's family cannot be written: reason -> whether it applies."""
    family = str(config.get("model_type"))
    if family not in WRITTEN:
        supported = ", ".join(WRITTEN)
        return {f"its architecture is {family!r}, and only these are supported: {supported}": True}
    types = {rope.get("rope_type", "default") for rope in _ropes(config)}
    expected, name = ("gelu_pytorch_tanh", "GELU") if "gemma" in family else ("silu", "SiLU")
    activation = config.get("hidden_activation") or config.get("hidden_act") or expected
    return {
        f"its positions are scaled ({', '.join(sorted(types - {'default'}))})": types
        != {"default"},
        f"its activation is not {name}": activation != expected,
    }


def _ropes(config: dict[str, Any]) -> list[dict[str, Any]]:
    """How positions are rotated: the same for all layers, or by kind of layer."""
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    by_kind = [rope for rope in stated.values() if isinstance(rope, dict)]
    return by_kind or [stated]


def add_metadata(writer: Any, config: dict[str, Any], file_type: str) -> None:
    """Give a GGUFWriter the sizes of a model."""
    import gguf

    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    stated = config.get("rope_parameters") or {}
    rope = stated.get("full_attention", stated)
    writer.add_file_type(getattr(gguf.LlamaFileType, file_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "gemma" in config["model_type"]:
        _add_gemma(writer, config, stated)


def _add_gemma(writer: Any, config: dict[str, Any], rope: dict[str, Any]) -> None:
    writer.add_sliding_window(config["sliding_window"])
    local = rope.get("sliding_attention", {}).get("rope_theta", 10000.0)
    if local != 10000.0:
        writer.add_float32(f"{ARCHITECTURES[config['model_type']]}.{LOCAL_THETA}", local)
    if (cap := config.get("attn_logit_softcapping")) is not None:
        writer.add_attn_logit_softcapping(cap)
    if (cap := config.get("final_logit_softcapping")) is not None:
        writer.add_final_logit_softcapping(cap)


def require_stated(folder: Path, file: Path) -> None:
    """Refuse a model whose config cannot be read back from its file.

    Raises:
        ArtifactError: with the entry of config.json that differs when it is read back.
    """
    from transformers import AutoConfig

    stated = config_of(open_gguf(file))
    ours = AutoConfig.from_pretrained(folder).to_dict()
    read = AutoConfig.for_model(**stated).to_dict()
    for key in sorted(stated.keys() - set(SILENT)):
        if not _same(ours.get(key), read.get(key)):
            raise ArtifactError(
                f"{folder} cannot be written as GGUF: its {key} is {ours.get(key)}, but a file of "
                f"this architecture implies {read.get(key)}",
                fix="convert the folder with llama.cpp's own convert_hf_to_gguf.py",
            )


def _same(one: Any, other: Any) -> bool:
    """Whether two entries are equal, floats after rounding to float32."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)
