"""The stage `prune-heads`: removes KV groups, or query heads of each group, from all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compose.errors import RuleBroken
from compose.stages.base import AS_STORED, ModelShape, Stage, StageJob
from compose.stages.prune.edit import (
    GATED_MLP,
    Pruning,
    keep_columns,
    keep_rows,
    model_and_blocks,
    narrowed,
    refuse_long_rope,
    require_layout,
    save_pruned,
    text_loss,
)
from compose.stages.prune.importance import Importance, importance_scores
from compose.stages.prune.refit import input_grams, refitted

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS = tuple(family for family in GATED_MLP if family != "olmo2")
"""Families whose heads can be cut apart. OLMo2 is not one: it norms the queries of all heads as one
vector."""

HEADS_DIVIDE_HIDDEN = ("llama", "gemma2", "gemma3_text")
"""Families whose config refuses a number of heads that does not divide the hidden size."""


class PruneHeads(Pruning):
    """Remove the least important attention heads, the same number from every layer."""

    version: ClassVar[int] = 3
    example: ClassVar[Mapping[str, Any]] = {"count": 3}

    use: Literal["prune-heads"] = "prune-heads"
    """The stage's name."""

    count: int = Field(ge=1)
    """Number of query heads that are removed from each layer."""

    take: Literal["groups", "queries"] = "groups"
    """Which heads are removed together: KV heads with all their query heads (`groups`), or an equal
    number of query heads from every KV head (`queries`). `take: groups` also makes the KV cache
    smaller."""

    importance: Importance = "activation"
    """How attention heads are ranked: by their contribution on calibration text (`activation`), by
    the gradient of the loss on calibration text (`taylor`), or by the size of their weights alone
    (`magnitude`)."""

    refit: bool = True
    """Whether the output projection of each attention is re-fitted by least squares, so that the
    remaining heads make up for the removed heads. The re-fit of the output projections uses all
    calibration text."""

    def counts(self, shape: ModelShape) -> list[int]:
        """Every `count` that a plain config of this shape can state.

        >>> SmolLM2 = ModelShape("llama", 576, 1536, 30, 9, 3, 64, 49152, True)
        >>> PruneHeads(count=3).counts(SmolLM2), PruneHeads(count=3, take="queries").counts(SmolLM2)
        ([3, 6], [3, 6])
        """
        step = self._step(shape)
        divides = shape.model_type in HEADS_DIVIDE_HIDDEN
        return [
            count
            for count in range(step, shape.num_heads, step)
            if not (divides and shape.hidden_size % (shape.num_heads - count))
        ]

    def _step(self, shape: ModelShape) -> int:
        """The least number of heads that can be removed: one group, or one head of each group."""
        groups = shape.num_kv_heads
        return shape.num_heads // groups if self.take == "groups" else groups

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, `layout-known`, and `heads-fit`: a plain config can state the remaining
        heads."""
        super().check(shape, before)
        if shape is None:
            return
        require_layout(self, shape, LAYOUTS)
        refuse_long_rope(shape, "heads-fit", "number of heads")
        fitting = self.counts(shape)
        if self.count not in fitting:
            raise RuleBroken("heads-fit", self._why_not(shape), fix=self._nearest(fitting))

    def _why_not(self, shape: ModelShape) -> str:
        step, left = self._step(shape), shape.num_heads - self.count
        if self.count % step:
            how = f"by whole groups of {step}" if self.take == "groups" else f"from {step} groups"
            return f"prune-heads cannot remove {self.count} of {shape.num_heads} heads {how} evenly"
        if left < step:
            return f"prune-heads removes {self.count} of {shape.num_heads} heads: {step} must stay"
        return (
            f"prune-heads leaves {left} heads, but a {shape.model_type} config needs a number"
            f" that divides the hidden size, {shape.hidden_size}"
        )

    def _nearest(self, fitting: list[int]) -> str:
        if not fitting:
            other = "queries" if self.take == "groups" else "groups"
            return f"no count fits with take: {self.take}; set take: {other}"
        return f"set count: {min(fitting, key=lambda count: abs(count - self.count))}"

    def worked_on(self, shape: ModelShape, length: int) -> float:
        """The remaining attention weights, the Gram matrices of the channels of all heads of each
        layer, and the memory of all pruning."""
        width, left = shape.num_heads * shape.head_dim, self.reshape(shape)
        heads = 2 * (left.num_heads + left.num_kv_heads)  # queries and outputs, keys and values
        stored = AS_STORED * heads * shape.head_dim * shape.hidden_size
        fit = 4.0 * width**2 if self.refit else 0.0
        return shape.num_layers * (stored + fit) + super().worked_on(shape, length)

    def reshape(self, shape: ModelShape) -> ModelShape:
        """Fewer heads, and fewer KV heads where whole groups go."""
        groups = self.count // self._step(shape) if self.take == "groups" else 0
        return replace(
            shape,
            num_heads=shape.num_heads - self.count,
            num_kv_heads=shape.num_kv_heads - groups,
        )

    def run(self, job: StageJob) -> dict[str, Any]:
        """Rank the heads of each layer, cut the least important ones, and state the remaining
        shape."""
        from gateskip.model.families import backbone

        model, blocks = model_and_blocks(job)
        shape = ModelShape.from_config(model.config.to_dict())
        before = text_loss(model, blocks)
        attentions: list[Any] = [layer.self_attn for layer in backbone(model).layers]
        readers = [attention.o_proj for attention in attentions]
        grams = input_grams(model, readers, blocks, job) if self.refit else None
        scores = importance_scores(
            self.importance,
            model,
            readers,
            blocks,
            job,
            grams,
            group=shape.head_dim,
            writers=[[_queries(attention, shape)] for attention in attentions],
        )
        gone, lost = [], []
        for number, (attention, squares) in enumerate(zip(attentions, scores, strict=True)):
            heads = self._left(squares.view(shape.num_kv_heads, -1))  # [kept groups, kept of each]
            weight = attention.o_proj.weight.detach()
            channels = cut_heads(attention, heads, shape)
            if grams is not None:
                fitted = refitted(weight, channels, grams[number], blocks.numel())
                attention.o_proj.weight.data = narrowed(fitted, weight, job)
            rest = sorted(set(range(shape.num_heads)) - set(heads.flatten().tolist()))
            gone.append(rest)
            lost.append(round(float(squares[rest].sqrt().sum() / squares.sqrt().sum()), 4))
        _state(model.config, self.reshape(shape))
        loss = {"before": before, "after": text_loss(model, blocks)}
        save_pruned(model, job)
        return {
            "heads": model.config.num_attention_heads,
            "kv_heads": model.config.num_key_value_heads,
            "dropped": gone,
            "importance": self.importance,
            "scores": [[round(value, 6) for value in layer.sqrt().tolist()] for layer in scores],
            "importance_lost": lost,
            "loss": loss,
        }

    def _left(self, squares: Tensor) -> Tensor:
        """Numbers of the heads that stay, [kept groups, kept of each]. squares [groups, of each].

        Both keep their old order, so that a query head still finds its KV head by division.
        """
        import torch

        groups, per_group = squares.shape
        heads = torch.arange(squares.numel(), device=squares.device).view(groups, per_group)
        if self.take == "groups":
            stay = squares.sum(1).argsort()[self.count // per_group :].sort().values
            return heads[stay]
        stay = squares.argsort(dim=1)[:, self.count // groups :].sort(dim=1).values
        return heads.gather(1, stay)


def _queries(attention: Any, shape: ModelShape) -> Tensor:
    """The query weights, [heads * head_dim, H]."""
    if hasattr(attention, "qkv_proj"):
        rows: Tensor = attention.qkv_proj.weight[: shape.num_heads * shape.head_dim]
        return rows
    weight: Tensor = attention.q_proj.weight
    return weight


def cut_heads(attention: Any, heads: Tensor, shape: ModelShape) -> Tensor:
    """Keep only these query heads [kept groups, kept of each] and the KV heads that they read.

    Returns the channels of the heads' outputs that stay.
    """
    import torch

    per_group = shape.num_heads // shape.num_kv_heads
    queries = _channels(heads.flatten(), shape.head_dim)
    groups = _channels(heads[:, 0] // per_group, shape.head_dim)
    if hasattr(attention, "qkv_proj"):  # Phi3: queries, keys, values, one below the other
        keys = shape.num_heads * shape.head_dim
        values = keys + shape.num_kv_heads * shape.head_dim
        keep_rows(attention.qkv_proj, torch.cat([queries, groups + keys, groups + values]))
    else:
        keep_rows(attention.q_proj, queries)
        keep_rows(attention.k_proj, groups)
        keep_rows(attention.v_proj, groups)
    keep_columns(attention.o_proj, queries)
    attention.num_key_value_groups = heads.shape[1]
    if hasattr(attention, "num_key_value_heads"):
        attention.num_key_value_heads = heads.shape[0]
    return queries


def _channels(heads: Tensor, head_dim: int) -> Tensor:
    """Channels of some heads [N] -> [N * head_dim]."""
    import torch

    inside = torch.arange(head_dim, device=heads.device)
    return (heads.unsqueeze(1) * head_dim + inside).flatten()


def _state(config: Any, shape: ModelShape) -> None:
    """Write the shape into the config; head_dim too, which is no longer hidden size over heads."""
    config.head_dim = shape.head_dim
    config.num_attention_heads = shape.num_heads
    config.num_key_value_heads = shape.num_kv_heads
