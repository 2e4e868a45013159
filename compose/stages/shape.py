"""The sizes of a model from its config.json; stages are checked against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compose.errors import PlanError

FUSED_QKV = ("phi3", "gpt_neox")
"""Model types whose queries, keys and values are one linear layer."""


def is_value(name: str) -> bool:
    """Whether a layer's name is that of a value projection."""
    return name.rpartition(".")[2] == "v_proj"


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only model, as its config.json states them."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_embeddings: bool
    quantized: str | None = None
    """The quantizer that made the weights (`bitsandbytes`, `gptq`, ...), or None."""
    packed_bits: int | None = None
    """Bits of the largest packed weights, where the source model's config states them; value
    projections with more bits than the rest are not counted."""
    long_rope: bool = False
    """Whether each rotary frequency has its own factor, as in the long-context Phi3."""
    positions: int | None = None
    """Longest text in tokens, where the config states it."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read a config.json (its `text_config`, where it has one).

        Raises:
            PlanError: the config names no size that a decoder of the Llama family has.
        """
        text = _mapping(config.get("text_config")) or config
        required = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        )
        absent = [key for key in required if _count(text, key) is None]
        if absent:
            kind = text.get("model_type", "unknown")
            raise PlanError(
                f"the config of this model (type {kind!r}) does not state {', '.join(absent)}",
                fix="take a decoder-only model of the Llama family",
            )
        hidden, heads = text["hidden_size"], text["num_attention_heads"]
        rope = _mapping(text.get("rope_parameters")) or _mapping(text.get("rope_scaling"))
        quantization = _mapping(config.get("quantization_config"))
        quantization = quantization or _mapping(text.get("quantization_config"))
        return cls(
            model_type=str(text.get("model_type", "unknown")),
            hidden_size=hidden,
            intermediate_size=text["intermediate_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=_count(text, "num_key_value_heads") or heads,
            head_dim=_count(text, "head_dim") or hidden // heads,
            vocab_size=text["vocab_size"],
            tie_embeddings=bool(
                config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
            ),
            quantized=str(quantization.get("quant_method", "unknown")) if quantization else None,
            packed_bits=_packed_bits(quantization),
            long_rope="short_factor" in rope,
            positions=_count(text, "max_position_embeddings"),
        )

    @property
    def weights(self) -> int:
        """How many weights the model has, norms and biases left out."""
        outer = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return outer + self.num_layers * self.layer_weights

    @property
    def layer_weights(self) -> int:
        """How many weights a decoder layer has."""
        heads = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return heads + 3 * self.hidden_size * self.intermediate_size

    @property
    def value_share(self) -> float:
        """Share of the value projections in the layers' weights; 0 where they are fused with
        others."""
        if self.model_type in FUSED_QKV:
            return 0.0
        outer = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        values = self.num_layers * self.hidden_size * self.num_kv_heads * self.head_dim
        return values / (self.weights - outer)

    @property
    def tapped(self) -> int:
        """Numbers that the linear layers of all decoder layers read and write for one token; an
        input that several layers read counts once."""
        queries, values = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = 2 * queries + 2 * values + 2 * self.hidden_size
        return self.num_layers * (attention + 3 * self.intermediate_size + 2 * self.hidden_size)

    def linear_in_features(self, skip: Sequence[str] = ()) -> dict[str, int]:
        """Input width of each kind of linear layer in a decoder layer, without the LM head.

        Kinds whose name ends in an entry of `skip` are left out.
        """
        widths = {
            "q_proj": self.hidden_size,
            "k_proj": self.hidden_size,
            "v_proj": self.hidden_size,
            "o_proj": self.num_heads * self.head_dim,
            "gate_proj": self.hidden_size,
            "up_proj": self.hidden_size,
            "down_proj": self.intermediate_size,
        }
        return {
            name: n for name, n in widths.items() if not any(end.endswith(name) for end in skip)
        }


def _mapping(value: object) -> Mapping[str, Any]:
    """A mapping in a config; empty where the config has something else there."""
    return value if isinstance(value, Mapping) else {}


def _count(text: Mapping[str, Any], key: str) -> int | None:
    """A positive whole number in a config; None where the config has something else there."""
    value = text.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _packed_bits(quantization: Mapping[str, Any]) -> int | None:
    """The most bits that a quantization config gives a layer, value projections left out; None
    where it does not say."""
    if quantization.get("load_in_8bit") or quantization.get("load_in_4bit"):
        return 8 if quantization.get("load_in_8bit") else 4
    layers = [_mapping(quantization.get(key)) for key in ("dynamic", "layers")]
    entries = [
        _mapping(value) for named in layers for name, value in named.items() if not is_value(name)
    ]
    stated = [_count(entry, "bits") for entry in (quantization, *entries)]
    return max((bits for bits in stated if bits is not None), default=None)


@dataclass(frozen=True)
class StoredBits:
    """Bits of a weight in a folder of packed weights, scales and offsets included."""

    layers: float
    """Of the linear layers in the decoder layers."""
    outer: float | None = None
    """Of embedding and LM head; None where these are not packed."""
