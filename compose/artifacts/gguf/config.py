"""A GGUF file's metadata as the config.json of transformers, architecture by architecture.

Some entries of a transformers config are in llama.cpp's code instead: which layers have a window,
how queries are scaled. An unknown key might change the function, so a file that has one is refused
by the key's name; so is an architecture that is not in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compose.artifacts.gguf.file import GgufFile
from compose.errors import ArtifactError, shortened, suggest

SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
NORM = "attention.layer_norm_rms_epsilon"
KV_HEADS = "attention.head_count_kv"
KEYS, VALUES = "attention.key_length", "attention.value_length"
ROTATED, THETA, LOCAL_THETA = "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa"
SCALING, FACTOR = "rope.scaling.type", "rope.scaling.factor"
TRAINED = "rope.scaling.original_context_length"
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
ATTENTION_CAP, FINAL_CAP = "attn_logit_softcapping", "final_logit_softcapping"
EXPERTS = ("expert_count", "expert_used_count")
READ_KEYS = (*SIZES, NORM, KV_HEADS, KEYS, VALUES, ROTATED, THETA, SCALING, FACTOR, TRAINED)
SILENT = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", *EXPERTS)
"""Keys that add nothing: the embedding has as many rows as there are tokens."""

SPECIALS = {"bos": "bos", "eos": "eos", "pad": "padding"}
ROPE_FACTORS = "rope_freqs.weight"
MOST_SIZE = 1 << 20  # of layers, heads and widths; far beyond what there is
MOST_CONTEXT = 1 << 40
LLAMA3_FACTORS = (8.0, 32.0)  # Llama 3.1 and 3.3, and the small ones of 3.2
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Family:
    """How transformers names an architecture, and the entries of its config beyond sizes."""

    model_type: str
    model_class: str
    more: Callable[[_Reading], dict[str, Any]]
    """Entries of config.json that other families do not have."""
    keys: tuple[str, ...] = ()
    """Further keys that `more` reads."""


@dataclass(frozen=True)
class _Reading:
    """The metadata of a file under one architecture's prefix."""

    file: GgufFile
    prefix: str

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `PREFIX.key`; a float as the shortest number that float32 rounds to it."""
        value = self.file.metadata.get(f"{self.prefix}.{key}", default)
        return float(f"{value:.7g}") if isinstance(value, float) else value

    def need(self, key: str) -> Any:
        """The value of a required key, the same for all layers."""
        value = self.get(key)
        if value is None:
            self.file.refuse(f"it does not state {self.prefix}.{key}")
        if isinstance(value, list):
            if len(set(value)) > 1:
                self.file.refuse(f"its layers differ in {self.prefix}.{key}")
            return value[0]
        return value

    @property
    def heads(self) -> int:
        return int(self.need("attention.head_count"))

    @property
    def head_dim(self) -> int:
        default = self.need("embedding_length") // self.heads
        return int(self.get(KEYS) or self.get(ROTATED) or default)

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors


def config_of(file: GgufFile) -> dict[str, Any]:
    """The config.json of the model in a file, as transformers would write it.

    Raises:
        ArtifactError: its architecture is not supported, or its metadata does not make a config.
    """
    try:
        return _config_of(file)
    except ArtifactError:
        raise
    except (ArithmeticError, IndexError, TypeError, ValueError) as error:  # a text for a number
        file.refuse(f"its metadata does not make a config ({shortened(str(error))})")


def _config_of(file: GgufFile) -> dict[str, Any]:
    prefix = file.metadata.get("general.architecture")
    if not isinstance(prefix, str):
        file.refuse("it does not state its architecture")
    family = FAMILIES.get(prefix)
    if family is None:
        file.refuse(f"its architecture is {shortened(repr(prefix))}: {suggest(prefix, FAMILIES)}")
    reading = _Reading(file, prefix)
    _refuse_unknown(reading, family)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        file.refuse("it has no tensor token_embd.weight: it is a part of a model, or an adapter")
    _refuse_sizes(reading)
    config: dict[str, Any] = {name: reading.need(key) for key, name in SIZES.items()}
    config |= {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        "num_key_value_heads": reading.need(KV_HEADS) if reading.get(KV_HEADS) else reading.heads,
        "rms_norm_eps": reading.need(NORM),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": not reading.has("output.weight"),
    }
    for name, key in SPECIALS.items():
        config[f"{name}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    return config | family.more(reading)


def _refuse_sizes(reading: _Reading) -> None:
    """Refuse sizes that are not counts, or larger than any model's: these would fill the memory."""
    sizes = {key: reading.need(key) for key in SIZES} | {KEYS: reading.head_dim}
    for key, size in sizes.items():
        most = MOST_CONTEXT if key == "context_length" else MOST_SIZE
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= most:
            reading.file.refuse(f"{reading.prefix}.{key} is {shortened(repr(size))}")


def _refuse_unknown(reading: _Reading, family: Family) -> None:
    """Refuse a file with a key of its architecture that this module does not read."""
    start = f"{reading.prefix}."
    keys = [key.removeprefix(start) for key in reading.file.metadata if key.startswith(start)]
    unknown = sorted(set(keys) - {*READ_KEYS, *SILENT, *family.keys})
    if unknown:
        reading.file.refuse(f"it states {start}{shortened(unknown[0])}, which is not supported")
    if any(reading.get(key) for key in EXPERTS):
        reading.file.refuse("it is a mixture of experts")
    values = reading.get(VALUES, reading.head_dim)
    if values != reading.head_dim:
        reading.file.refuse(f"keys have {reading.head_dim} channels a head, and values {values}")


# --- Positions -----------------------------------------------------------------------------------


def _rope(reading: _Reading, *, partial: bool = False) -> dict[str, Any]:
    """rope_parameters; `partial` where only some channels of a head may rotate."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": reading.get(THETA, 10000.0)}
    rotated = reading.get(ROTATED, reading.head_dim)
    if partial:
        rope["partial_rotary_factor"] = rotated / reading.head_dim
    elif rotated != reading.head_dim:
        reading.file.refuse(f"{rotated} of a head's {reading.head_dim} channels rotate")
    scaled = reading.get(SCALING, "none")
    if scaled == "linear":
        rope |= {"rope_type": "linear", "factor": reading.need(FACTOR)}
    elif scaled != "none":
        reading.file.refuse(
            f"its positions are scaled by {shortened(repr(scaled))} (supported: none and linear)"
        )
    if any(reading.has(f"rope_factors_{kind}.weight") for kind in ("long", "short")):
        reading.file.refuse("it has factors for long contexts (rope_factors_long.weight)")
    return rope


def _llama_rope(reading: _Reading) -> dict[str, Any]:
    """The rope settings of Llama. A file stores Llama 3.1's scaling as a tensor, a config as four
    numbers."""
    rope = _rope(reading)
    if not reading.has(ROPE_FACTORS):
        return rope
    stored = reading.file.floats(ROPE_FACTORS)
    for factor in LLAMA3_FACTORS:
        expected = llama3_factors(reading.head_dim, rope["rope_theta"], factor)
        pairs = zip(stored, expected, strict=False)
        if len(stored) == len(expected) and all(abs(a - b) <= 1e-3 * b for a, b in pairs):
            return {**LLAMA3, "rope_type": "llama3", "rope_theta": rope["rope_theta"]} | {
                "factor": factor
            }
    reading.file.refuse(f"its {ROPE_FACTORS} is not that of Llama 3.1 or 3.2")


def llama3_factors(head_dim: int, theta: float, factor: float) -> list[float]:
    """Divisors of the rotary frequencies [head_dim / 2]: llama.cpp's form of `llama3`."""
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    trained = LLAMA3["original_max_position_embeddings"]
    factors = []
    for channel in range(0, head_dim, 2):
        length = 2 * math.pi * theta ** (channel / head_dim)
        if length < trained / high:
            factors.append(1.0)
        elif length > trained / low:
            factors.append(factor)
        else:
            smooth = (trained / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


# --- Families ------------------------------------------------------------------------------------


def _llama(reading: _Reading) -> dict[str, Any]:
    return {
        "head_dim": reading.head_dim,
        "rope_parameters": _llama_rope(reading),
        "hidden_act": "silu",
        "attention_bias": reading.has("blk.0.attn_q.bias"),
        "mlp_bias": reading.has("blk.0.ffn_up.bias"),
    }


def _qwen2(reading: _Reading) -> dict[str, Any]:
    return {"rope_parameters": _rope(reading), "hidden_act": "silu"}


def _qwen3(reading: _Reading) -> dict[str, Any]:
    bias = reading.has("blk.0.attn_q.bias")
    return _qwen2(reading) | {"head_dim": reading.head_dim, "attention_bias": bias}


def _phi3(reading: _Reading) -> dict[str, Any]:
    rope = _rope(reading, partial=True)
    if rope["rope_type"] != "default":
        reading.file.refuse("its positions are scaled, which transformers' Phi3 does not support")
    trained = reading.get(TRAINED, reading.need("context_length"))
    return {
        "rope_parameters": rope,
        "hidden_act": "silu",
        "original_max_position_embeddings": trained,
        "sliding_window": reading.get(WINDOW) or None,
    }


def _gemma(reading: _Reading, pattern: int, scaled_by_width: int) -> dict[str, Any]:
    """The entries that Gemma 2 and 3 share: of each `pattern` layers, all but one have a window.

    The largest models, those with `scaled_by_width` layers, scale queries by hidden size over
    heads; llama.cpp recognizes them in the same way.
    """
    layers, width = reading.need("block_count"), reading.need("embedding_length")
    by_width = layers == scaled_by_width
    return {
        "head_dim": reading.head_dim,
        "query_pre_attn_scalar": width // reading.heads if by_width else reading.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": reading.need(WINDOW),
        "layer_types": [
            "sliding_attention" if (layer + 1) % pattern else "full_attention"
            for layer in range(layers)
        ],
        "attn_logit_softcapping": reading.get(ATTENTION_CAP),
        "final_logit_softcapping": reading.get(FINAL_CAP),
    }


def _gemma2(reading: _Reading) -> dict[str, Any]:
    rope = {"rope_parameters": _rope(reading)}
    return _gemma(reading, reading.get(PATTERN, 2), scaled_by_width=46) | rope


def _gemma3(reading: _Reading) -> dict[str, Any]:
    """Layers with a window have another RoPE base, which is in llama.cpp's code."""
    local = {"rope_type": "default", "rope_theta": reading.get(LOCAL_THETA, 10000.0)}
    rope = {"full_attention": _rope(reading), "sliding_attention": local}
    return _gemma(reading, reading.get(PATTERN, 6), scaled_by_width=62) | {"rope_parameters": rope}


CAPS = (WINDOW, PATTERN, ATTENTION_CAP, FINAL_CAP)
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", _llama),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _qwen2),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _qwen3),
    "phi3": Family("phi3", "Phi3ForCausalLM", _phi3, (WINDOW,)),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", _gemma2, CAPS),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", _gemma3, (*CAPS, LOCAL_THETA)),
}
"""llama.cpp's name of an architecture -> its family. Mistral and SmolLM2 are `llama` there."""
