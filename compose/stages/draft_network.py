"""A small network that learns to draft for the model: see gateskip/model/draft_network.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compose.stages.base import ModelShape, Role, Split, Stage, StageJob
from gateskip.training.recipe import DraftConfig

if TYPE_CHECKING:
    from torch import Tensor

DRAFT = DraftConfig()  # each default stands there, once
HELD_OUT = 8  # blocks on which agreement is measured


class DraftNetwork(Stage):
    """Train a small network on what the model says, and put it beside the weights.

    It drafts from the model's last hidden state and the last token, at a few percent of the cost of
    a token, and takes a few megabytes; the weights stay what they are. `speculate` uses it as
    `draft_weights: learned`. Text that the model writes itself is the best to learn from
    (`data.train: {mix: {self-written: 1, ...}}`).
    """

    role: ClassVar[Role] = "draft"
    reads_data: ClassVar[tuple[Split, ...]] = ("train",)

    use: Literal["draft-network"] = "draft-network"
    """The stage's name."""

    steps: int = Field(default=DRAFT.steps, ge=1)
    """Optimizer steps."""

    batch: int = Field(default=DRAFT.batch, ge=1)
    """Sequences in one step."""

    blocks: int = Field(default=1000, ge=2)
    """Blocks of the training text that are read; what the model says of them is kept in memory, and
    each is gone over several times."""

    length: int | None = Field(default=None, ge=16)
    """Tokens in one block; when left out, `data.train.length`."""

    unroll: int = Field(default=DRAFT.unroll, ge=1, le=8)
    """Tokens that the network drafts of each place while it trains."""

    lr: float = Field(default=DRAFT.lr, gt=0)
    """Learning rate at its peak."""

    inner: int | None = Field(default=None, ge=8)
    """Neurons of its MLP; when left out, as many as an MLP of the model has."""

    vocabulary: int = Field(default=8192, ge=8)
    """Tokens that it can draft: those that are most frequent in its training text."""

    precision: Literal["auto", "no", "bf16", "fp16"] = DRAFT.precision
    """Mixed precision of the training, as accelerate names it."""

    def worked_on(self, shape: ModelShape, length: int) -> float:
        """The states of all text, and the logits' weights."""
        states = 2.0 * self.blocks * (self.length or length) * shape.hidden_size
        return states + 6.0 * min(self.vocabulary, shape.vocab_size) * shape.hidden_size

    def run(self, job: StageJob) -> dict[str, Any]:
        """Train; resumes from its own checkpoint after a kill."""
        import torch

        import gateskip
        from compose.artifacts.folder import copy_source
        from gateskip.model.draft_network import DraftNetwork as Network
        from gateskip.model.draft_network import save_network
        from gateskip.training.draft_network import agreement, frequent, train_draft_network

        assert job.train is not None, "a draft network reads the training split"
        decoder = gateskip.load(job.source)
        model, tokenizer = decoder.skipping.model, decoder.tokenizer
        blocks = job.blocks("train", tokenizer, self.length or job.train.length, self.blocks)
        train, held_out = _parted(blocks)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        tokens = frequent(train, self.vocabulary, vocabulary)
        torch.manual_seed(job.seed)
        inner = self.inner or model.config.intermediate_size
        network = Network(model.config.hidden_size, inner, tokens)
        shared = ("steps", "batch", "unroll", "lr", "precision")
        config = DraftConfig(**{name: getattr(self, name) for name in shared}, seed=job.seed)
        curve = train_draft_network(model, network, train, config, job.work, job.progress)
        copy_source(job.source, job.target, job.dtype, link=True)
        save_network(job.target, network, torch.bfloat16)
        return {
            "training": curve,
            "train_tokens": self.steps * self.batch * blocks.shape[1],
            "parameters": sum(part.numel() for part in network.parameters()),
            "covered": float(torch.isin(held_out, tokens).double().mean()),
            "agreement": agreement(model, network, held_out, self.unroll),
        }


def _parted(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks to train on, and a few, at most a quarter, that are held out."""
    held = max(1, min(HELD_OUT, len(blocks) // 4))
    return blocks[:-held], blocks[-held:]
