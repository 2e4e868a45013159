"""An attention module in parts, in any family: its shape, queries, keys, values and output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Turn = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]
"""What `rotate` does, done in another way."""


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
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=_head_dim(attention),
        scaling=attention.scaling,
        softcap=getattr(attention, "attn_logit_softcapping", None),
        window=_window(config, attention),
    )


def _head_dim(attention: Any) -> int:
    size: int = attention.head_dim if hasattr(attention, "head_dim") else attention.head_size
    return size


def _window(config: Any, attention: Any) -> int | None:
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[no-any-return]
    if config.model_type in ("mistral", "phi3"):  # one window for all layers, in the config alone
        return config.sliding_window  # type: ignore[no-any-return]
    return None


def project_queries(
    attention: Any, x: Tensor, rope: tuple[Tensor, Tensor], turn: Turn | None = None
) -> Tensor:
    """Rotated queries. x [..., H], rope two of [..., D] -> [..., heads, head_dim].

    `turn` may stand in for `rotate`.
    """
    queries = _heads(attention, _project(attention, x, 0), getattr(attention, "q_norm", None))
    return _rotated(attention, queries, rope, turn)


def project_keys_values(
    attention: Any, x: Tensor, rope: tuple[Tensor, Tensor], turn: Turn | None = None
) -> tuple[Tensor, Tensor]:
    """Rotated keys, and values. x [..., H], rope two of [..., D] -> two of [..., kv_heads, D].

    `turn` may stand in for `rotate`.
    """
    keys = _heads(attention, _project(attention, x, 1), getattr(attention, "k_norm", None))
    values = _heads(attention, _project(attention, x, 2), None)
    return _rotated(attention, keys, rope, turn), values


def project_out(attention: Any, mixed: Tensor) -> Tensor:
    """The output projection: what the heads attended to [..., heads * head_dim] -> [..., H]."""
    module = attention.o_proj if hasattr(attention, "o_proj") else attention.dense
    output: Tensor = module(mixed)
    return output


def _project(attention: Any, x: Tensor, part: int) -> Tensor:
    """Queries (0), keys (1) or values (2) of x [..., H], not yet cut into heads."""
    if hasattr(attention, "q_proj"):
        module = (attention.q_proj, attention.k_proj, attention.v_proj)[part]
        return module(x)  # type: ignore[no-any-return]
    if hasattr(attention, "qkv_proj"):  # Phi3: queries, keys, values, one below the other
        fused, head_dim = attention.qkv_proj, attention.head_dim
        width = attention.num_key_value_heads * head_dim
        ends = (fused.out_features - 2 * width, fused.out_features - width, fused.out_features)
        rows = slice(ends[part - 1] if part else 0, ends[part])
        if _is_plain(fused):
            return F.linear(x, fused.weight[rows], _rows(fused.bias, rows))
        return fused(x)[..., rows]  # type: ignore[no-any-return]
    return _interleaved(attention, x, part)


def _interleaved(attention: Any, x: Tensor, part: int) -> Tensor:
    """GPT-NeoX: each head has its queries, keys and values side by side in one matrix."""
    fused, head_dim = attention.query_key_value, attention.head_size
    cut = slice(part * head_dim, (part + 1) * head_dim)
    if not _is_plain(fused):
        part_of_all: Tensor = fused(x).unflatten(-1, (-1, 3 * head_dim))[..., cut].flatten(-2)
        return part_of_all
    weight = fused.weight.view(-1, 3 * head_dim, x.shape[-1])[:, cut]  # [heads, D, H]
    flat = x.reshape(-1, x.shape[-1])
    found: Tensor = (flat @ weight.transpose(1, 2)).transpose(0, 1)  # [N, heads, D]
    if fused.bias is not None:
        found = found + fused.bias.view(-1, 3 * head_dim)[:, cut]
    return found.reshape(*x.shape[:-1], -1)


def _is_plain(linear: Any) -> bool:
    """Whether rows of its weight are all there is to it; peft's wrappers have a weight and more."""
    if not isinstance(linear, nn.Linear):
        return False
    return linear.weight.is_floating_point() and linear.weight.ndim == 2


def _rows(bias: Tensor | None, rows: slice) -> Tensor | None:
    return None if bias is None else bias[rows]


def _heads(attention: Any, x: Tensor, norm: Any | None) -> Tensor:
    """[..., heads * D] -> [..., heads, D], normed by head (Qwen3) or before the cut (OLMo2)."""
    head_dim = _head_dim(attention)
    if norm is not None and norm.weight.shape[-1] != head_dim:
        x, norm = norm(x), None
    cut: Tensor = x.unflatten(-1, (-1, head_dim))
    return cut if norm is None else norm(cut)


def _rotated(attention: Any, x: Tensor, rope: tuple[Tensor, Tensor], turn: Turn | None) -> Tensor:
    return (turn or rotate)(x, rope) if getattr(attention, "use_rope", True) else x


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), of the first D channels, rotated as two halves.

    x [..., heads, head_dim], rope two of [..., D]; channels beyond D stay as they are.
    """
    cos, sin = rope[0].unsqueeze(-2), rope[1].unsqueeze(-2)
    width = cos.shape[-1]
    turned, still = (x, None) if width == x.shape[-1] else (x[..., :width], x[..., width:])
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if still is None else torch.cat((turned, still), dim=-1)
