"""Functions that all pruning stages share: loading, the loss on text, hooks, cutting layers and
weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from compose.errors import RuleBroken
from compose.stages.base import AS_STORED, ModelShape, Role, Split, Stage, StageJob
from compose.stages.gate_transfer import thresholds_from_decoding
from compose.stages.rules import RULES

if TYPE_CHECKING:
    from torch import Tensor

RANK_BLOCKS = 16  # calibration blocks that rank layers: one score a layer needs few
LOSS_BLOCKS = 4  # calibration blocks of a loss, which is measured many times
LOSS_TOKENS = 64  # tokens whose logits exist at once
LOGITS = 3  # copies of them
PER_LAYER = ("layer_types", "no_rope_layers")  # lists in a config with an entry a layer

OUTPUT_LAYERS = ("o_proj", "dense", "down_proj", "dense_4h_to_h")
"""Names, by family, of the linear layer that an attention or MLP module ends in."""

GATED_MLP = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "phi3",
)
"""Families whose MLP is gate, up and down projection, the first two fused or not."""


class Pruning(Stage):
    """Base class of all stages that prune."""

    role: ClassVar[Role] = "prune"
    reads_data: ClassVar[tuple[Split, ...]] = ("calibration",)

    def held(self) -> float:
        """The mapped file. (With gates calibrated on decoded text the model is in float32; planning
        does not know that.)"""
        return AS_STORED

    def worked_on(self, shape: ModelShape, length: int) -> float:
        """The LM head in float32, and logits of a few tokens."""
        return 4.0 * shape.vocab_size * (shape.hidden_size + LOGITS * LOSS_TOKENS)


def require_layout(stage: Stage, shape: ModelShape, families: tuple[str, ...]) -> None:
    """Refuse a family whose weight names the stage does not know.

    Raises:
        RuleBroken: `layout-known`, naming the family and the known ones.
    """
    if shape.model_type not in families:
        raise RuleBroken(
            "layout-known",
            f"{stage.use} cannot cut a {shape.model_type} model: {RULES['layout-known']}",
            fix=f"use drop-layers, or a model of type {', '.join(families)}",
        )


class Hook(Protocol):
    """A hook that was registered on a module."""

    def remove(self) -> None:
        """Take it off."""
        ...


def refuse_long_rope(shape: ModelShape, rule: str, other: str) -> None:
    """Refuse to change a size that a long-context Phi3 uses to count its rotary factors.

    Raises:
        RuleBroken: `rule`; `other` names that size in the message.
    """
    if shape.model_type == "phi3" and shape.long_rope:
        raise RuleBroken(
            rule,
            "a phi3 config with long-rope factors needs as many as hidden size / heads / 2, so"
            f" the {other} cannot change",
            fix="use prune-width or drop-layers",
        )


def last_linear(branch: Any) -> Any:
    """The linear layer that an attention or MLP module ends in."""
    return next(getattr(branch, name) for name in OUTPUT_LAYERS if hasattr(branch, name))


def model_and_blocks(job: StageJob, limit: int | None = None) -> tuple[Any, Tensor]:
    """The source model, which computes in float32, and calibration blocks [N, length] of token ids
    on its device: all of the split, or at most `limit`."""
    from transformers import AutoTokenizer

    from compose.artifacts.packed_folder import load_as_stored
    from compose.stages.text.split_text import split_blocks

    assert job.calibration is not None, "pruning reads the calibration split"
    model = load_as_stored(job.source, widen=thresholds_from_decoding(job.source))
    model = model if job.device == "cpu" else model.to(job.device)
    tokenizer = AutoTokenizer.from_pretrained(job.source)
    limit = min(job.calibration.limit, limit or job.calibration.limit)
    return model, split_blocks(job, "calibration", tokenizer, limit=limit).to(model.device)


def save_pruned(model: Any, job: StageJob) -> None:
    """Write the model into the target folder, in the pipeline's dtype."""
    import torch

    model.to(getattr(torch, job.dtype)).save_pretrained(job.target)


def block_loss(model: Any, block: Tensor) -> Tensor:
    """Mean cross-entropy of block [B, S] of token ids, in nats per token; differentiable."""
    from gateskip.training.objectives import next_token_loss

    logits = model(block, use_cache=False).logits[:, :-1]
    return next_token_loss(logits.flatten(0, 1), block[:, 1:].flatten())


def text_loss(model: Any, blocks: Tensor) -> float:
    """Mean loss over the first `LOSS_BLOCKS` of blocks [N, S], in nats per token."""
    import torch

    from gateskip.quantization.as_stored import heads_in_float32

    with torch.inference_mode(), heads_in_float32(model):
        losses = [_loss_in_parts(model, block) for block in blocks[:LOSS_BLOCKS].split(1)]
    return sum(losses) / len(losses)


def _loss_in_parts(model: Any, block: Tensor) -> float:
    """`block_loss` without gradients: logits exist for a few tokens at a time."""
    from gateskip.model.families import backbone, head
    from gateskip.training.objectives import next_token_loss

    states = backbone(model)(block, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    following = block[:, 1:].flatten()
    parts = zip(states.split(LOSS_TOKENS), following.split(LOSS_TOKENS), strict=True)
    losses = (float(next_token_loss(head(model, part), then)) * len(then) for part, then in parts)
    return sum(losses) / len(following)


def run_hooked(
    run: Callable[[Tensor], object],
    blocks: Tensor,
    hooks: list[Hook],
    job: StageJob,
    note: str,
) -> None:
    """`run(block [1, S])` for each of blocks [N, S], then remove the hooks, also after an error."""
    try:
        for done, block in enumerate(blocks.split(1)):
            run(block)
            job.progress(done + 1, len(blocks), note)
    finally:
        for hook in hooks:
            hook.remove()


def keep_layers(model: Any, layers: list[int]) -> None:
    """Keep only these decoder layers, renumber them, and state their number in the config."""
    from torch import nn

    from gateskip.model.families import backbone

    config, body = model.config, backbone(model)
    body.layers = nn.ModuleList(body.layers[i] for i in layers)
    for number, layer in enumerate(body.layers):
        parts: Iterator[Any] = layer.modules()
        for part in parts:
            if hasattr(part, "layer_idx"):
                part.layer_idx = number  # the cache files its entries under this number
    config.num_hidden_layers = len(layers)
    for name in PER_LAYER:
        if getattr(config, name, None):
            setattr(config, name, [getattr(config, name)[i] for i in layers])


def narrowed(weight: Tensor, old: Tensor, job: StageJob) -> Tensor:
    """New float32 weights for a layer that had `old`, rounded to the type in which they will be
    saved where the layer has it: the whole model never exists in float32."""
    return weight.to(old.dtype) if str(old.dtype) == f"torch.{job.dtype}" else weight


def keep_rows(linear: Any, rows: Tensor) -> None:
    """Keep only these outputs of a linear layer."""
    from torch import nn

    linear.weight = nn.Parameter(linear.weight.detach()[rows].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[rows].clone())
    linear.out_features = len(rows)


def keep_columns(linear: Any, columns: Tensor) -> None:
    """Keep only these inputs of a linear layer."""
    from torch import nn

    linear.weight = nn.Parameter(linear.weight.detach()[:, columns].clone())
    linear.in_features = len(columns)
