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
Rope = dict[str, tuple[Tensor, Tensor]]
"""cos and sin by the key a branch asks for: "" where all layers rotate alike."""


class UnsupportedModel(ValueError):
    """The model's architecture has no row in `FAMILIES`."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Attribute names, inside one decoder layer, of what a branch is made of."""

    attention: str = "self_attn"
    attention_in: str | None = "input_layernorm"
    attention_out: str | None = None
    mlp_in: str | None = "post_attention_layernorm"
    mlp_out: str | None = None
    rope_by_layer_type: bool = False
    """Whether layers of different types (sliding, full) rotate differently."""
    may_be_parallel: bool = False
    """Whether `config.use_parallel_residual` decides that the MLP reads what attention read."""


PRE_NORM = Family()
SANDWICH: dict[str, Any] = {
    "attention_out": "post_attention_layernorm",
    "mlp_in": "pre_feedforward_layernorm",
    "mlp_out": "post_feedforward_layernorm",
}

FAMILIES: dict[str, Family] = {
    "llama": PRE_NORM,
    "mistral": PRE_NORM,
    "qwen2": PRE_NORM,
    "qwen3": PRE_NORM,
    "phi3": PRE_NORM,
    "smollm3": PRE_NORM,
    "gemma2": Family(**SANDWICH),
    "gemma3_text": Family(**SANDWICH, rope_by_layer_type=True),
    "olmo2": Family(
        attention_in=None,
        attention_out="post_attention_layernorm",
        mlp_in=None,
        mlp_out="post_feedforward_layernorm",
    ),
    "gpt_neox": Family(attention="attention", may_be_parallel=True),
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
    rope: str = ""
    """Which entry of a `Rope` its attention rotates by."""
    parallel: bool = False
    """Whether it reads what its layer's attention read, not what that attention made of it."""

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
    return list(_walk(model, family))


def _walk(model: Any, family: Family) -> Iterator[Branch]:
    config = model.config
    parallel = family.may_be_parallel and config.use_parallel_residual
    for number, layer in enumerate(backbone(model).layers):
        yield Branch(
            2 * number,
            number,
            "attention",
            getattr(layer, family.attention),
            _named(layer, family.attention_in),
            _named(layer, family.attention_out),
            config.layer_types[number] if family.rope_by_layer_type else "",
        )
        yield Branch(
            2 * number + 1,
            number,
            "mlp",
            layer.mlp,
            _named(layer, family.mlp_in),
            _named(layer, family.mlp_out),
            parallel=parallel,
        )


def _named(layer: nn.Module, name: str | None) -> nn.Module | None:
    return None if name is None else getattr(layer, name)


# -- what stands around the branches ----------------------------------------------------------


def backbone(model: Any) -> Any:
    """The decoder below the LM head: its layers, embedding, final norm and rotary table."""
    return getattr(model, model.base_model_prefix)


def final_norm(model: Any) -> Any:
    """The norm between the last layer and the LM head."""
    body = backbone(model)
    return body.final_layer_norm if hasattr(body, "final_layer_norm") else body.norm


def embed(model: Any, input_ids: Tensor) -> Tensor:
    """Token ids [...] -> the residual stream [..., H] before the first layer."""
    embedded: Tensor = model.get_input_embeddings()(input_ids)
    return embedded


def head(model: Any, hidden: Tensor) -> Tensor:
    """Final hidden states [..., H] (already normed) -> logits [..., V]."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def rope_at(model: Any, positions: Tensor, dtype: torch.dtype) -> Rope:
    """cos and sin for integer positions [B, S], two of [B, S, D] a kind of layer, in `dtype`.

    D is smaller than a head where only a part of it is rotated.
    """
    like = torch.empty(0, dtype=dtype, device=positions.device)
    rotary = backbone(model).rotary_emb
    if FAMILIES[model.config.model_type].rope_by_layer_type:
        kinds = sorted(set(model.config.layer_types))
        return {kind: _cast(rotary(like, positions, kind), dtype) for kind in kinds}
    return {"": _cast(rotary(like, positions), dtype)}


def _cast(rope: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return rope[0].to(dtype), rope[1].to(dtype)
