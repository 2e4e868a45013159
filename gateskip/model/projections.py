"""An attention module in parts, in any family: its shape, queries, keys, values and output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gateskip.model.families import Branch

Turn = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]
"""The signature of `rotate`."""
Multiply = Callable[[Branch, Sequence[str], Tensor], Sequence[Tensor]]
"""The signature of `by_modules`."""
NormHeads = Callable[[Branch, str, Tensor], Tensor]
"""The signature of `norm_heads`."""


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention module that its projections do not store."""

    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    softcap: float | None
    window: int | None


def attention_shape(model: Any, branch: Branch) -> AttentionShape:
    """An attention branch's shape, from its module, or from the config where the module lacks
    it."""
    config = model.config
    attention: Any = branch.module
    own_window = None if branch.family.one_window else getattr(attention, "sliding_window", None)
    return AttentionShape(
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=_head_dim(branch),
        scaling=attention.scaling,
        softcap=getattr(attention, "attn_logit_softcapping", None),
        window=config.sliding_window if branch.family.one_window else own_window,
    )


def _head_dim(branch: Branch) -> int:
    size: int = getattr(branch.module, branch.family.head_dim)
    return size


# -- linear layers, and parts of fused ones ---------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Rows of a fused weight: `count` rows in runs of `run`, which begin `stride` apart from
    `first`."""

    first: int
    count: int
    run: int
    stride: int

    def whole(self, tile: int) -> bool:
        """Whether runs begin and, if there are several, end at borders of tiles of `tile` rows."""
        return not self.first % tile and (self.run == self.count or not self.run % tile)

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor [n, ...]: a view where they are contiguous."""
        if self.run == self.count:
            return tensor[self.first : self.first + self.count]
        runs: Tensor = tensor.unflatten(0, (-1, self.stride))
        return runs[:, self.first : self.first + self.run].flatten(0, 1)

    def columns(self, x: Tensor) -> Tensor:
        """The outputs of these rows, among all outputs x [..., n]."""
        if self.run == self.count:
            return x[..., self.first : self.first + self.count]
        runs: Tensor = x.unflatten(-1, (-1, self.stride))
        return runs[..., self.first : self.first + self.run].flatten(-2)


@dataclass(frozen=True)
class Part:
    """A projection: a linear layer, or some rows of one."""

    module: Any
    rows: Rows | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        module, rows = self.module, self.rows
        if rows is None:
            return module(x)  # type: ignore[no-any-return]
        if hasattr(module, "part"):  # packed for our kernels
            return module.part(x, rows)  # type: ignore[no-any-return]
        if not _is_plain(module):
            return rows.columns(module(x))
        bias = None if module.bias is None else rows.of(module.bias)
        return F.linear(x, rows.of(module.weight), bias)


PROJECTIONS = ("queries", "keys", "values", "output")
"""Names of the projections of an attention branch."""


def attention_parts(branch: Branch) -> tuple[Part, Part, Part, Part]:
    """The projections of an attention branch: queries, keys, values and output."""
    attention: Any = branch.module
    family = branch.family
    output = Part(getattr(attention, family.output))
    if len(family.qkv) > 1:
        queries, keys, values = (Part(getattr(attention, name)) for name in family.qkv)
        return queries, keys, values, output
    fused, width = getattr(attention, family.qkv[0]), _head_dim(branch)
    heads = output.module.in_features // width
    rest = fused.out_features // width - heads  # heads of keys and values
    if family.qkv_by_head:
        every = [Rows(i * width, heads * width, width, 3 * width) for i in range(3)]
    else:
        counts = (heads * width, rest // 2 * width, rest // 2 * width)
        every = [Rows(sum(counts[:i]), n, n, n) for i, n in enumerate(counts)]
    queries, keys, values = (Part(fused, rows) for rows in every)
    return queries, keys, values, output


def mlp_parts(branch: Branch) -> tuple[Part | None, Part, Part]:
    """The projections of an MLP branch: gate, up and down; None for no gate."""
    mlp: Any = branch.module
    family = branch.family
    down = Part(getattr(mlp, family.down))
    first, *second = (getattr(mlp, name) for name in family.gate_up)
    if not family.gated:
        return None, Part(first), down
    if second:
        return Part(first), Part(second[0]), down
    width = down.module.in_features
    gate, up = (Part(first, Rows(i * width, width, width, width)) for i in range(2))
    return gate, up, down


def _is_plain(linear: Any) -> bool:
    """Whether a layer is only its weight and bias; peft's wrappers have a weight and more."""
    if not isinstance(linear, nn.Linear):
        return False
    return linear.weight.is_floating_point() and linear.weight.ndim == 2


# -- queries, keys, values and output ---------------------------------------------------------


def by_modules(branch: Branch, names: Sequence[str], x: Tensor) -> list[Tensor]:
    """An attention branch's `queries`, `keys`, `values` or `output` [..., n] of x [..., in]."""
    parts = dict(zip(PROJECTIONS, attention_parts(branch), strict=True))
    return [parts[name](x) for name in names]


def norm_heads(branch: Branch, name: str, x: Tensor) -> Tensor:
    """Queries or keys x [..., heads * D], normed by the branch's module of that name: by head
    (Qwen3) or together (OLMo2); unchanged where there is no such module."""
    norm = getattr(branch.module, name, None)
    if norm is None:
        return x
    normed: Tensor = norm(x.unflatten(-1, (-1, norm.weight.shape[-1])))
    return normed.flatten(-2)


def rotates(branch: Branch) -> bool:
    """Whether an attention branch rotates queries and keys: some layers of SmolLM3 do not."""
    return bool(getattr(branch.module, "use_rope", True))


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of the first D channels, rotated as two halves.

    x [..., heads, head_dim], rope two of [..., D]; channels beyond D do not change.
    """
    cos, sin = rope[0].unsqueeze(-2), rope[1].unsqueeze(-2)
    width = cos.shape[-1]
    turned, still = (x, None) if width == x.shape[-1] else (x[..., :width], x[..., width:])
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if still is None else torch.cat((turned, still), dim=-1)


@dataclass(frozen=True)
class Steps:
    """The functions that compute projections: torch's, unless a backend has others."""

    multiply: Multiply = by_modules
    norm: NormHeads = norm_heads
    turn: Turn = rotate


BY_TORCH = Steps()


def project_queries(
    branch: Branch, x: Tensor, rope: tuple[Tensor, Tensor], by: Steps = BY_TORCH
) -> Tensor:
    """Rotated queries. x [..., H], rope two of [..., D] -> [..., heads, head_dim]."""
    (queries,) = by.multiply(branch, ("queries",), x)
    return _rotated(branch, "q_norm", queries, rope, by)


def project_keys_values(
    branch: Branch, x: Tensor, rope: tuple[Tensor, Tensor], by: Steps = BY_TORCH
) -> tuple[Tensor, Tensor]:
    """Rotated keys, and values. x [..., H], rope two of [..., D] -> two of [..., kv_heads, D]."""
    keys, values = by.multiply(branch, ("keys", "values"), x)
    return _rotated(branch, "k_norm", keys, rope, by), _heads(branch, values)


def project_inputs(
    branch: Branch, x: Tensor, rope: tuple[Tensor, Tensor], by: Steps = BY_TORCH
) -> tuple[Tensor, Tensor, Tensor]:
    """`project_queries` and `project_keys_values` in one: rotated queries and keys, and values."""
    queries, keys, values = by.multiply(branch, PROJECTIONS[:3], x)
    return (
        _rotated(branch, "q_norm", queries, rope, by),
        _rotated(branch, "k_norm", keys, rope, by),
        _heads(branch, values),
    )


def project_out(branch: Branch, mixed: Tensor, by: Steps = BY_TORCH) -> Tensor:
    """The output projection: attention of all heads [..., heads * head_dim] -> [..., H]."""
    (output,) = by.multiply(branch, ("output",), mixed)
    return output


def _heads(branch: Branch, x: Tensor) -> Tensor:
    cut: Tensor = x.unflatten(-1, (-1, _head_dim(branch)))
    return cut


def _rotated(
    branch: Branch, norm: str, x: Tensor, rope: tuple[Tensor, Tensor], by: Steps
) -> Tensor:
    """Queries or keys [..., heads * D] -> [..., heads, D], normed and rotated."""
    cut = _heads(branch, by.norm(branch, norm, x))
    return by.turn(cut, rope) if rotates(branch) else cut
