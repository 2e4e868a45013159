"""The stage `prune-width`: removes the least important neurons of every MLP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compose.errors import RuleBroken
from compose.stages.base import AS_STORED, ModelShape, Stage, StageJob
from compose.stages.prune.edit import (
    GATED_MLP,
    Pruning,
    model_and_blocks,
    narrowed,
    require_layout,
    save_pruned,
    text_loss,
)
from compose.stages.prune.importance import Importance, activation_scores, importance_scores
from compose.stages.prune.refit import grams_by_layer, refitted

if TYPE_CHECKING:
    from torch import Tensor


FIT = 4  # matrices of a fit's size that exist at once


class PruneWidth(Pruning):
    """Remove the least important neurons from every MLP, the same number in each layer."""

    version: ClassVar[int] = 3
    libraries: ClassVar[tuple[str, ...]] = ("torch_pruning",)
    example: ClassVar[Mapping[str, Any]] = {"ratio": 0.2}

    use: Literal["prune-width"] = "prune-width"
    """The stage's name."""

    ratio: float = Field(gt=0, lt=1)
    """Share of the neurons of each MLP that is removed."""

    round_to: int = Field(default=64, ge=1)
    """The number of neurons that remain in each MLP is rounded down to a multiple of `round_to`."""

    importance: Importance = "activation"
    """How neurons are ranked: by their contribution on calibration text (`activation`), by the
    gradient of the loss on calibration text (`taylor`), or by the size of their weights alone
    (`magnitude`)."""

    refit: bool = True
    """Whether the down projection of each MLP is re-fitted by least squares, so that the remaining
    neurons make up for the removed neurons. The re-fit of the down projections uses all calibration
    text. The re-fit works best if the calibration text has tens of tokens for each neuron."""

    def kept_width(self, width: int) -> int:
        """How many of `width` neurons stay: a multiple of `round_to`, as torch-pruning rounds.

        >>> PruneWidth(ratio=0.2).kept_width(1536)
        1216
        """
        size = int(width * (1 - self.ratio))
        return size - size % self.round_to

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, `layout-known`, and `width-fits`: some neurons stay after rounding."""
        super().check(shape, before)
        if shape is None:
            return
        require_layout(self, shape, GATED_MLP)
        if self.kept_width(shape.intermediate_size) == 0:
            raise RuleBroken(
                "width-fits",
                f"prune-width keeps no neuron: {1 - self.ratio:.3g} of {shape.intermediate_size}"
                f" is less than round_to {self.round_to}",
                fix="use a smaller ratio or a smaller round_to",
            )

    def worked_on(self, shape: ModelShape, length: int) -> float:
        """The remaining MLP weights, and the larger of one MLP's Gram matrix and the memory of all
        pruning. The states of the text come on top; only the job knows their size."""
        stored = AS_STORED * 3 * self.kept_width(shape.intermediate_size) * shape.hidden_size
        fit = FIT * 4.0 * shape.intermediate_size**2 if self.refit else 0.0
        return shape.num_layers * stored + max(fit, super().worked_on(shape, length))

    def reshape(self, shape: ModelShape) -> ModelShape:
        """Narrower MLPs."""
        return replace(shape, intermediate_size=self.kept_width(shape.intermediate_size))

    def run(self, job: StageJob) -> dict[str, Any]:
        """Rank each MLP's neurons and cut the least important ones."""
        from gateskip.model.families import backbone

        model, blocks = model_and_blocks(job)
        width = self.kept_width(model.config.intermediate_size)
        before = text_loss(model, blocks)
        mlps: list[Any] = [layer.mlp for layer in backbone(model).layers]
        ranked = self._ranked(model, mlps, blocks, job)
        lost = [
            _cut(mlp, width, *ranking, blocks.numel(), job)
            for mlp, ranking in zip(mlps, ranked, strict=True)
        ]
        model.config.intermediate_size = width
        loss = {"before": before, "after": text_loss(model, blocks)}
        save_pruned(model, job)
        return {
            "width": width,
            "importance": self.importance,
            "importance_lost": lost,
            "loss": loss,
        }

    def _ranked(
        self, model: Any, mlps: list[Any], blocks: Tensor, job: StageJob
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """For each MLP, the squared importance of its neurons, and the Gram matrix of its down
        projection's inputs where `refit` or `activation` needs it."""
        readers, scores = [mlp.down_proj for mlp in mlps], None
        if not (self.refit and self.importance == "activation"):
            writers = [list(_writers(mlp)) for mlp in mlps]
            scores = importance_scores(
                self.importance, model, readers, blocks, job, None, writers=writers
            )
        if scores is not None and not self.refit:
            yield from ((squares, None) for squares in scores)
            return
        for number, gram in enumerate(grams_by_layer(model, readers, blocks, job)):
            if scores is None:
                yield activation_scores([readers[number]], [gram.diagonal()])[0], gram
            else:
                yield scores[number], gram


def _cut(
    mlp: Any, width: int, squares: Tensor, gram: Tensor | None, tokens: int, job: StageJob
) -> float:
    """Keep an MLP's most important neurons, re-fitted where their Gram matrix over `tokens` tokens
    is known. Returns the share of the importance that was removed."""
    scores = squares.sqrt()
    order = scores.argsort()
    gone, neurons = order[: len(scores) - width], order[len(scores) - width :].sort().values
    weight = mlp.down_proj.weight.detach()
    cut_neurons(mlp, sorted(gone.tolist()))
    if gram is not None:
        fitted = refitted(weight, neurons, gram, tokens)
        mlp.down_proj.weight.data = narrowed(fitted, weight, job)
    return round(float(scores[gone].sum() / scores.sum()), 4)


def _writers(mlp: Any) -> tuple[Tensor, ...]:
    """Gate and up weights, [width, H] each."""
    if hasattr(mlp, "gate_up_proj"):
        fused: tuple[Tensor, ...] = mlp.gate_up_proj.weight.chunk(2)
        return fused
    return (mlp.gate_proj.weight, mlp.up_proj.weight)


def cut_neurons(mlp: Any, gone: list[int]) -> None:
    """Remove neurons from a gated MLP with torch-pruning's channel cutters."""
    import torch_pruning

    if hasattr(mlp, "gate_up_proj"):  # Phi3: the gate's rows above the up projection's
        width = mlp.down_proj.in_features
        both = [*gone, *(neuron + width for neuron in gone)]
        torch_pruning.prune_linear_out_channels(mlp.gate_up_proj, both)
    else:
        torch_pruning.prune_linear_out_channels(mlp.gate_proj, gone)
        torch_pruning.prune_linear_out_channels(mlp.up_proj, gone)
    torch_pruning.prune_linear_in_channels(mlp.down_proj, gone)
