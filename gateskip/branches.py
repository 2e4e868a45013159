"""Where the attention and MLP branches of each architecture are.

One table row an architecture. Everything else in the package speaks of a `Branch`: a residual
update `h' = h + norm_out(module(norm_in(h)))` that can be entered or skipped, token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

BranchKind = Literal["attention", "mlp"]


class UnsupportedModel(ValueError):
    """The model's architecture has no row in `FAMILIES`."""


@dataclass(frozen=True)
class Family:
    """Attribute names, inside one decoder layer, of what a branch is made of."""

    attention_in: str | None = "input_layernorm"
    attention_out: str | None = None
    mlp_in: str | None = "post_attention_layernorm"
    mlp_out: str | None = None


PRE_NORM = Family()
SANDWICH = Family(
    attention_out="post_attention_layernorm",
    mlp_in="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
)

FAMILIES: dict[str, Family] = {
    "llama": PRE_NORM,
    "mistral": PRE_NORM,
    "qwen2": PRE_NORM,
    "qwen3": PRE_NORM,
    "gemma2": SANDWICH,
}


@dataclass(frozen=True)
class Branch:
    """One residual update. `index` counts attention and MLP branches in the order they run."""

    index: int
    layer: int
    kind: BranchKind
    module: nn.Module
    norm_in: nn.Module | None
    norm_out: nn.Module | None

    def enter(self, hidden: Tensor) -> Tensor:
        """The branch's own view of the residual stream, which is also what its gate sees."""
        return hidden if self.norm_in is None else self.norm_in(hidden)

    def leave(self, output: Tensor) -> Tensor:
        """What the branch adds to the residual stream (after the post-norm, where there is one)."""
        return output if self.norm_out is None else self.norm_out(output)


def find_branches(model: Any) -> list[Branch]:
    """Branches of a causal LM in execution order: attention 0, MLP 0, attention 1, ...

    Raises `UnsupportedModel` for an architecture that has no row.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModel(
            f"model type {model.config.model_type!r} is not supported; supported: {known}"
        )
    return list(_walk(model.model.layers, family))


def _walk(layers: Any, family: Family) -> Iterator[Branch]:
    for number, layer in enumerate(layers):
        yield Branch(
            2 * number,
            number,
            "attention",
            layer.self_attn,
            _named(layer, family.attention_in),
            _named(layer, family.attention_out),
        )
        yield Branch(
            2 * number + 1,
            number,
            "mlp",
            layer.mlp,
            _named(layer, family.mlp_in),
            _named(layer, family.mlp_out),
        )


def _named(layer: nn.Module, name: str | None) -> nn.Module | None:
    return None if name is None else getattr(layer, name)


@dataclass(frozen=True)
class AttentionShape:
    """Numbers of one attention module that its projections do not tell."""

    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    softcap: float | None
    window: int | None


def attention_shape(model: Any, attention: Any) -> AttentionShape:
    """Read the shape off the module first, and off the config where the module is silent."""
    config = model.config
    return AttentionShape(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        scaling=attention.scaling,
        softcap=getattr(attention, "attn_logit_softcapping", None),
        window=_window(config, attention),
    )


def _window(config: Any, attention: Any) -> int | None:
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[no-any-return]
    if config.model_type == "mistral":  # one window for all layers, kept in the config alone
        return config.sliding_window  # type: ignore[no-any-return]
    return None


def project_queries(attention: Any, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotated queries. x [..., H], rope two of [..., D] -> [..., heads, D]."""
    queries = attention.q_proj(x).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, "q_norm"):
        queries = attention.q_norm(queries)
    return rotate(queries, rope)


def project_keys_values(
    attention: Any, x: Tensor, rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Rotated keys, and values. x [..., H], rope two of [..., D] -> two of [..., kv_heads, D]."""
    keys = attention.k_proj(x).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    values = attention.v_proj(x).unflatten(-1, (-1, attention.head_dim))
    return rotate(keys, rope), values


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), halves layout. x [..., heads, D]."""
    cos, sin = rope[0].unsqueeze(-2), rope[1].unsqueeze(-2)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rope_at(model: Any, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin for integer positions [B, S] -> two of [B, S, D], in `dtype`."""
    like = torch.empty(0, dtype=dtype, device=positions.device)
    cos, sin = model.model.rotary_emb(like, positions)
    return cos, sin


def head(model: Any, hidden: Tensor) -> Tensor:
    """Final hidden states [..., H] (already normed) -> logits [..., V]."""
    logits: Tensor = model.lm_head(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
