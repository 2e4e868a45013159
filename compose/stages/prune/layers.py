"""The stage `drop-layers`: removes whole decoder layers and renumbers the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compose.errors import RuleBroken
from compose.stages.base import ModelShape, Stage, StageJob
from compose.stages.gate_transfer import keep_gates, require_gates_that_move
from compose.stages.prune.edit import (
    RANK_BLOCKS,
    Hook,
    Pruning,
    keep_layers,
    model_and_blocks,
    run_hooked,
    save_pruned,
    text_loss,
)
from compose.stages.prune.refit import close_gaps

if TYPE_CHECKING:
    from torch import Tensor


class DropLayers(Pruning):
    """Remove whole decoder layers: the layers that are named, or the `count` least important
    layers."""

    version: ClassVar[int] = 4
    example: ClassVar[Mapping[str, Any]] = {"count": 1}

    use: Literal["drop-layers"] = "drop-layers"
    """The stage's name."""

    count: int | None = Field(default=None, ge=1)
    """Number of decoder layers to remove; `metric` decides which layers. Set either `count` or
    `layers`, not both."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Indices of the decoder layers to remove, counted from 0. Set either `layers` or `count`, not
    both."""

    metric: Literal["block-influence", "perplexity-greedy"] = "block-influence"
    """How the layers to remove are chosen: those that change their input least, by 1 - cosine
    between input and output (`block-influence`), or one after another, the layer whose removal
    raises the loss least (`perplexity-greedy`). After each removal, `perplexity-greedy` takes one
    pass over the calibration text for each remaining layer."""

    refit: bool = True
    """Whether the MLP before a removed layer is re-fitted by least squares, so that it also adds
    the contribution of the removed layer. The re-fit of the MLP uses all calibration text."""

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if (self.count is None) == (self.layers is None):
            raise ValueError("drop-layers needs either 'count' or 'layers'")
        if self.layers is not None and not self.layers:
            raise ValueError("'layers' lists no layer")
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise ValueError("'layers' lists a layer twice")
        return self

    @property
    def dropped(self) -> int:
        """Number of layers that are dropped."""
        return len(self.layers) if self.layers is not None else self.count or 0

    def tolerates(self, rule: str) -> bool:
        """Gates lose the rows of the dropped layers and are calibrated again."""
        return rule == "prune-after-gate"

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, `prune-after-gate`, and `layers-fit`: the layers exist, and one stays."""
        super().check(shape, before)
        require_gates_that_move(self, before)
        if shape is not None:
            self._require_layers(shape.num_layers)

    def _require_layers(self, count: int) -> None:
        last = count - 1
        if self.layers is not None and max(self.layers) > last:
            raise RuleBroken(
                "layers-fit",
                f"drop-layers names layer {max(self.layers)}, but the last one is {last}",
            )
        if self.dropped > last:
            raise RuleBroken(
                "layers-fit",
                f"drop-layers drops {self.dropped} layers of {count}; one must stay",
            )

    def reshape(self, shape: ModelShape) -> ModelShape:
        """Fewer layers."""
        return replace(shape, num_layers=shape.num_layers - self.dropped)

    def run(self, job: StageJob) -> dict[str, Any]:
        """Choose, cut, renumber, save; gates go along."""
        from gateskip.model.families import backbone

        model, every = model_and_blocks(job)
        blocks = every[:RANK_BLOCKS]
        count = len(backbone(model).layers)
        self._require_layers(count)  # prune-branches may have left fewer than were planned with
        before = text_loss(model, blocks)
        gone, scores = self._choose(model, blocks, job)
        layers = [layer for layer in range(count) if layer not in gone]
        closed = close_gaps(model, gone, every, job) if self.refit else 0
        keep_layers(model, layers)
        loss = {"before": before, "after": text_loss(model, blocks)}
        keep_gates(job, model, layers)
        save_pruned(model, job)
        return {"dropped": sorted(gone), **scores, "gaps_closed": closed, "loss": loss}

    def _choose(
        self, model: Any, blocks: Tensor, job: StageJob
    ) -> tuple[set[int], dict[str, list[Any]]]:
        """The layers to drop, and their scores for the record."""
        if self.layers is not None:
            return set(self.layers), {}
        if self.metric == "perplexity-greedy":
            rounds = greedy_drops(model, blocks, self.dropped, job)
            return {entry["layer"] for entry in rounds}, {"rounds": rounds}
        scores = block_influence(model, blocks, job)
        order = sorted(range(len(scores)), key=lambda layer: scores[layer])
        return set(order[: self.dropped]), {"block_influence": scores}


def block_influence(model: Any, blocks: Tensor, job: StageJob) -> list[float]:
    """Each layer's 1 - cos(input, output), mean over tokens (ShortGPT, arXiv 2403.03853, eq. 1)."""
    import torch
    from torch.nn import functional as F

    from gateskip.model.families import backbone

    layers = backbone(model).layers
    total = [0.0] * len(layers)

    def watch(number: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            total[number] += float((1 - F.cosine_similarity(inputs[0], after, dim=-1)).mean())

        return hook

    hooks: list[Hook] = [layer.register_forward_hook(watch(i)) for i, layer in enumerate(layers)]
    with torch.inference_mode():
        run_hooked(
            lambda block: model(block, use_cache=False), blocks, hooks, job, "ranking layers"
        )
    return [value / len(blocks) for value in total]


def greedy_drops(model: Any, blocks: Tensor, count: int, job: StageJob) -> list[dict[str, Any]]:
    """The layers that a greedy search drops, one after another, with the losses behind each choice.

    Each entry has `layer`, `loss`, and `losses`: each remaining layer -> the loss without it, in
    nats per token.
    """
    from gateskip.model.families import backbone

    layers = backbone(model).layers
    rounds: list[dict[str, Any]] = []
    total = sum(len(layers) - done for done in range(count))
    tried = 0
    for _ in range(count):
        gone = [entry["layer"] for entry in rounds]
        losses: dict[int, float] = {}
        for number in sorted(set(range(len(layers))) - set(gone)):
            with bypassed([layers[i] for i in (*gone, number)]):
                losses[number] = text_loss(model, blocks)
            tried += 1
            job.progress(
                tried, total, "leaving out layers", detail=f"layer {number}", loss=losses[number]
            )
        best = min(losses, key=lambda layer: losses[layer])
        rounds.append({"layer": best, "loss": losses[best], "losses": losses})
    return rounds


@contextmanager
def bypassed(layers: list[Any]) -> Iterator[None]:
    """Within this context the layers pass hidden states on unchanged and compute nothing."""
    for layer in layers:
        layer.forward = lambda hidden, *_, **__: hidden
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
