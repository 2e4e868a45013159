"""The stage `prune-hidden`: removes the least important channels of the residual stream."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compose.errors import RuleBroken
from compose.stages.base import AS_STORED, ModelShape, Stage, StageJob
from compose.stages.prune.edit import (
    GATED_MLP,
    Hook,
    Pruning,
    keep_columns,
    keep_rows,
    model_and_blocks,
    narrowed,
    refuse_long_rope,
    require_layout,
    run_hooked,
    save_pruned,
    text_loss,
)
from compose.stages.prune.heads import HEADS_DIVIDE_HIDDEN
from compose.stages.prune.importance import Importance, importance_scores
from compose.stages.prune.refit import input_grams, refitted

if TYPE_CHECKING:
    from torch import Tensor, nn

READERS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj")
WRITERS = ("o_proj", "down_proj")
NEAR = 0.9  # share of the requested size that a suggested fix must keep
ROUNDINGS = (64, 32, 16, 8, 4, 2, 1)


class PruneHidden(Pruning):
    """Remove the least important channels of the residual stream (hidden size) from all weights
    that use them."""

    version: ClassVar[int] = 3
    example: ClassVar[Mapping[str, Any]] = {"ratio": 0.2}

    use: Literal["prune-hidden"] = "prune-hidden"
    """The stage's name."""

    ratio: float = Field(gt=0, lt=1)
    """Share of the channels of the residual stream that is removed."""

    round_to: int = Field(default=64, ge=1)
    """The remaining hidden size is rounded down to a multiple of `round_to`, and also to a multiple
    of the number of attention heads if the config of the model requires this."""

    importance: Importance = "activation"
    """How channels of the residual stream are ranked: by their contribution to all layers that read
    them, on calibration text (`activation`), by the gradient of the loss on calibration text
    (`taylor`), or by the weights alone (`magnitude`)."""

    refit: bool = True
    """Whether layers that read the residual stream are re-fitted by least squares, so that the
    remaining channels make up for the removed channels. The re-fit of these layers uses all
    calibration text."""

    def kept_size(self, shape: ModelShape) -> int:
        """How many channels stay; 0 where no multiple fits.

        >>> shape = ModelShape("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True)
        >>> PruneHidden(ratio=0.2).kept_size(shape)
        704
        """
        step = self._step(shape)
        size = math.floor(shape.hidden_size * (1 - self.ratio) + 1e-9)
        return size - size % step

    def _step(self, shape: ModelShape) -> int:
        divides = shape.model_type in HEADS_DIVIDE_HIDDEN
        return math.lcm(self.round_to, shape.num_heads if divides else 1)

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, `layout-known`, and `hidden-fits`: a plain config can state the remaining
        size."""
        super().check(shape, before)
        if shape is None:
            return
        require_layout(self, shape, GATED_MLP)
        refuse_long_rope(shape, "hidden-fits", "size")
        if self.kept_size(shape) == 0:
            raise RuleBroken(
                "hidden-fits",
                f"prune-hidden keeps {1 - self.ratio:.3g} of {shape.hidden_size} channels, but"
                f" the remaining number must be a multiple of {self._step(shape)}",
                fix=self._nearest(shape),
            )

    def _nearest(self, shape: ModelShape) -> str:
        target = shape.hidden_size * (1 - self.ratio)
        for size in (size for size in ROUNDINGS if size < self.round_to):
            nearest = self.model_copy(update={"round_to": size}).kept_size(shape)
            if nearest >= NEAR * target:
                return f"set round_to: {size}, which keeps {nearest}"
        return "use a smaller ratio, or prune-width"

    def worked_on(self, shape: ModelShape, length: int) -> float:
        """Gram matrices of the channels, two per layer, and the memory of all pruning; then the
        remaining weights."""
        stored = AS_STORED * (1 - self.ratio) * shape.weights
        fit = 8.0 * shape.num_layers * shape.hidden_size**2 if self.refit else 0.0
        return max(stored, fit + super().worked_on(shape, length))

    def reshape(self, shape: ModelShape) -> ModelShape:
        """A narrower residual stream; heads keep their width."""
        return replace(shape, hidden_size=self.kept_size(shape))

    def run(self, job: StageJob) -> dict[str, Any]:
        """Rank the channels, cut the least important ones everywhere, and rescale the norms."""
        import torch

        model, blocks = model_and_blocks(job)
        shape = ModelShape.from_config(model.config.to_dict())
        size = self.kept_size(shape)
        before = text_loss(model, blocks)
        inside = list(readers(model))
        head = model.get_output_embeddings()
        grams = input_grams(model, [*inside, head], blocks, job) if self.refit else None
        every = importance_scores(self.importance, model, [*inside, head], blocks, job, grams)
        scores = torch.stack([squares / squares.sum() for squares in every]).mean(0)
        channels = scores.argsort(descending=True)[:size].sort().values
        factors = norm_factors(model, channels, blocks, job)
        if grams is not None:
            _refit(inside, channels, grams, blocks.numel(), job)
        cut_channels(model, channels, factors)
        model.config.head_dim = shape.head_dim  # no longer hidden size over heads
        loss = {"before": before, "after": text_loss(model, blocks)}
        save_pruned(model, job)
        return {
            "hidden_size": size,
            "importance": self.importance,
            "importance_lost": round(1 - float(scores[channels].sum() / scores.sum()), 4),
            "loss": loss,
        }


def _refit(
    linears: list[Any], channels: Tensor, grams: list[Tensor], tokens: int, job: StageJob
) -> None:
    """Re-fit the layers that read the residual stream for `channels`, one after another. Each Gram
    matrix is freed once its layers are fitted."""
    from torch import nn

    for linear in linears:  # the last Gram matrix is the LM head's
        old = linear.weight.detach()
        linear.weight = nn.Parameter(
            narrowed(refitted(old, channels, grams.pop(0), tokens), old, job)
        )
        linear.in_features = len(channels)


def readers(model: Any) -> Iterator[Any]:
    """Linear layers inside the decoder layers that read the residual stream, through a norm."""
    from gateskip.model.families import backbone

    for layer in backbone(model).layers:
        yield from (part for name, part in layer.named_modules() if name.endswith(READERS))


def residual_norms(model: Any) -> list[nn.Module]:
    """Norms over the residual stream or over branches' outputs; norms of heads, which are nested
    deeper, are not among them."""
    from gateskip.model.families import backbone, final_norm

    parts = [part for layer in backbone(model).layers for part in layer.children()]
    return [part for part in parts if type(part).__name__.endswith("Norm")] + [final_norm(model)]


def norm_factors(model: Any, channels: Tensor, blocks: Tensor, job: StageJob) -> list[float]:
    """For each norm, the mean ratio of the root mean square of `channels` to that of all channels.

    A norm divides by the root mean square, which differs over fewer channels. Multiplying the
    norm's weights by this ratio keeps its output.
    """
    import torch

    from gateskip.model.families import backbone

    norms, body = residual_norms(model), backbone(model)
    total = [0.0] * len(norms)

    def watch(number: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].float().square()
            whole = squares.mean(-1)
            ratio = squares[..., channels].mean(-1)[whole > 0] / whole[whole > 0]  # padding is 0
            total[number] += float(ratio.sqrt().mean())

        return hook

    hooks: list[Hook] = [norm.register_forward_pre_hook(watch(i)) for i, norm in enumerate(norms)]
    with torch.inference_mode():
        run_hooked(lambda block: body(block, use_cache=False), blocks, hooks, job, "norms")
    return [value / len(blocks) for value in total]


def cut_channels(model: Any, channels: Tensor, factors: list[float]) -> None:
    """Keep only these channels of the residual stream, in all weights that still have all of them.
    Norms are multiplied by `factors`, one each."""
    from torch import nn

    from gateskip.model.families import backbone

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    grown = _embedding_scale(model, channels)
    for norm, factor in zip(residual_norms(model), factors, strict=True):
        _scale_norm(norm, channels, factor)
    if tied and grown != 1:
        _scale_norm(residual_norms(model)[-1], slice(None), 1 / grown)
    for layer in backbone(model).layers:
        for name, part in layer.named_modules():
            if name.endswith(READERS) and part.in_features > len(channels):
                keep_columns(part, channels)
            elif name.endswith(WRITERS):
                keep_rows(part, channels)
    table = embedding.weight.detach()[:, channels]
    embedding.weight = nn.Parameter(table if grown == 1 else table.float() * grown)
    embedding.embedding_dim = len(channels)
    if tied:
        head.weight, head.in_features = embedding.weight, len(channels)
    else:
        keep_columns(head, channels)
    model.config.hidden_size = len(channels)


def _embedding_scale(model: Any, channels: Tensor) -> float:
    """Factor for the embedding: Gemma multiplies its output by the root of the hidden size, which
    shrinks."""
    if not model.config.model_type.startswith("gemma"):
        return 1.0
    embedding = model.get_input_embeddings()
    factor = math.sqrt(model.config.hidden_size / len(channels))
    if hasattr(embedding, "embed_scale"):
        embedding.embed_scale = embedding.embed_scale / factor
    return factor


def _scale_norm(norm: Any, channels: Tensor | slice, factor: float) -> None:
    """Keep only these channels of a norm and scale its output; Gemma stores weights minus one."""
    from torch import nn

    one = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0
    norm.weight = nn.Parameter((norm.weight.detach()[channels] + one) * factor - one)
