"""Pruning: whole layers that change their input least, and neurons of the MLPs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compose.errors import RuleBroken
from compose.stages.base import ModelShape, Role, Split, Stage, StageJob

if TYPE_CHECKING:
    from torch import Tensor

PRUNE_BLOCKS = 16  # calibration blocks that rank layers and neurons


class DropLayers(Stage):
    """Remove whole decoder layers: the ones named, or the `count` that change their input least."""

    role: ClassVar[Role] = "prune"
    reads_data: ClassVar[tuple[Split, ...]] = ("calibration",)

    use: Literal["drop-layers"] = "drop-layers"
    """The stage's name."""

    count: int | None = Field(default=None, ge=1)
    """How many layers to drop, chosen by `metric`; give this or `layers`."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Which layers to drop, counted from 0; give this or `count`."""

    metric: Literal["block-influence"] = "block-influence"
    """How layers are ranked: 1 - cosine between a layer's input and its output."""

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if (self.count is None) == (self.layers is None):
            raise ValueError("drop-layers takes either 'count' or 'layers'")
        if self.layers is not None and not self.layers:
            raise ValueError("'layers' names no layer")
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise ValueError("'layers' names a layer twice")
        return self

    @property
    def dropped(self) -> int:
        """How many layers go."""
        return len(self.layers) if self.layers is not None else self.count or 0

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, and `layers-fit`: the layers exist, and at least one stays."""
        super().check(shape, before)
        if shape is None:
            return
        last = shape.num_layers - 1
        if self.layers is not None and max(self.layers) > last:
            raise RuleBroken(
                "layers-fit",
                f"drop-layers names layer {max(self.layers)}, but the last one is {last}",
            )
        if self.dropped > last:
            raise RuleBroken(
                "layers-fit",
                f"drop-layers drops {self.dropped} layers of {shape.num_layers}; one must stay",
            )

    def reshape(self, shape: ModelShape) -> ModelShape:
        """Fewer layers."""
        return replace(shape, num_layers=shape.num_layers - self.dropped)

    def run(self, job: StageJob) -> dict[str, Any]:
        """Rank, cut, renumber, save."""
        model, blocks = _model_and_blocks(job)
        scores = None if self.layers is not None else block_influence(model, blocks, job)
        if scores is None:
            gone = set(self.layers or ())
        else:
            order = sorted(range(len(scores)), key=lambda layer: scores[layer])
            gone = set(order[: self.dropped])
        keep_layers(model, [i for i in range(len(model.model.layers)) if i not in gone])
        _save(model, job)
        return {"dropped": sorted(gone), "block_influence": scores}


class PruneWidth(Stage):
    """Remove the least important neurons from every MLP; all MLPs keep the same width."""

    role: ClassVar[Role] = "prune"
    reads_data: ClassVar[tuple[Split, ...]] = ("calibration",)

    use: Literal["prune-width"] = "prune-width"
    """The stage's name."""

    ratio: float = Field(gt=0, lt=1)
    """The share of each MLP's neurons to remove."""

    round_to: int = Field(default=32, ge=1)
    """The width that is kept is rounded down to a multiple of this."""

    def kept_width(self, width: int) -> int:
        """How many of `width` neurons stay: a multiple of `round_to`, as torch-pruning rounds.

        >>> PruneWidth(ratio=0.2).kept_width(1536)
        1216
        """
        kept = int(width * (1 - self.ratio))
        return kept - kept % self.round_to

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, and `width-fits`: some neurons stay after rounding."""
        super().check(shape, before)
        if shape is not None and self.kept_width(shape.intermediate_size) == 0:
            raise RuleBroken(
                "width-fits",
                f"prune-width keeps no neuron: {1 - self.ratio:.3g} of {shape.intermediate_size}"
                f" is less than round_to {self.round_to}",
                fix="take a smaller ratio or a smaller round_to",
            )

    def reshape(self, shape: ModelShape) -> ModelShape:
        """Narrower MLPs."""
        return replace(shape, intermediate_size=self.kept_width(shape.intermediate_size))

    def run(self, job: StageJob) -> dict[str, Any]:
        """Rank each MLP's neurons on the calibration text and cut the least important ones."""
        model, blocks = _model_and_blocks(job)
        width = self.kept_width(model.config.intermediate_size)
        scores = neuron_importance(model, blocks, job)
        lost = []
        for layer, importance in zip(model.model.layers, scores, strict=True):
            gone = importance.argsort()[: len(importance) - width]
            lost.append(round(float((importance[gone].sum() / importance.sum()).detach()), 4))
            cut_neurons(layer.mlp, sorted(gone.tolist()))
        model.config.intermediate_size = width
        _save(model, job)
        return {"width": width, "importance_lost": lost}


def _model_and_blocks(job: StageJob) -> tuple[Any, Tensor]:
    """The source model in float32, and calibration blocks [N, length]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert job.calibration is not None, "pruning reads the calibration split"
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(job.source)
    limit = min(job.calibration.limit, PRUNE_BLOCKS)
    return model, job.blocks("calibration", tokenizer, limit=limit)


def _save(model: Any, job: StageJob) -> None:
    import torch

    model.to(getattr(torch, job.dtype)).save_pretrained(job.target)


def block_influence(model: Any, blocks: Tensor, job: StageJob) -> list[float]:
    """Each layer's 1 - cos(input, output), mean over tokens (ShortGPT, arXiv 2403.03853, eq. 1)."""
    from torch.nn import functional as F

    total = [0.0] * len(model.model.layers)

    def watch(number: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            total[number] += float((1 - F.cosine_similarity(inputs[0], after, dim=-1)).mean())

        return hook

    hooks = [layer.register_forward_hook(watch(i)) for i, layer in enumerate(model.model.layers)]
    _run_watched(model, blocks, hooks, job, "ranking layers")
    return [value / len(blocks) for value in total]


def _run_watched(model: Any, blocks: Tensor, hooks: list[Any], job: StageJob, note: str) -> None:
    """Show the model every block while the hooks look on, then take them off."""
    import torch

    with torch.inference_mode():
        for done, block in enumerate(blocks.split(1)):
            model.model(block, use_cache=False)
            job.progress(done + 1, len(blocks), note)
    for hook in hooks:
        hook.remove()


def keep_layers(model: Any, kept: list[int]) -> None:
    """Leave only these decoder layers, renumbered, and say so in the config."""
    from torch import nn

    config = model.config
    model.model.layers = nn.ModuleList(model.model.layers[i] for i in kept)
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number  # the cache files its entries under this number
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]


def neuron_importance(model: Any, blocks: Tensor, job: StageJob) -> list[Tensor]:
    """Root mean square of each MLP neuron's contribution on the text, [width] a layer.

    A neuron adds its activation times its column of the down projection, so its contribution has
    the size of activation times column norm (Wanda's score, arXiv 2306.11695, summed over a
    column).
    """
    import torch

    layers = model.model.layers
    squares = [torch.zeros(layer.mlp.down_proj.in_features) for layer in layers]

    def watch(number: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            squares[number] += inputs[0].flatten(0, -2).float().square().sum(0)

        return hook

    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(watch(i)) for i, layer in enumerate(layers)
    ]
    _run_watched(model, blocks, hooks, job, "ranking neurons")
    return [
        (square / blocks.numel()).sqrt() * layer.mlp.down_proj.weight.float().norm(dim=0)
        for square, layer in zip(squares, layers, strict=True)
    ]


def cut_neurons(mlp: Any, gone: list[int]) -> None:
    """Remove neurons from a gated MLP with torch-pruning's channel cutters."""
    import torch_pruning

    torch_pruning.prune_linear_out_channels(mlp.gate_proj, gone)
    torch_pruning.prune_linear_out_channels(mlp.up_proj, gone)
    torch_pruning.prune_linear_in_channels(mlp.down_proj, gone)
