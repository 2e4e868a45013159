"""The stage `draft-network`: a small network learns to draft for the model
(gateskip/model/draft_network.py)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compose.errors import UserError
from compose.stages.base import ModelShape, Role, Split, Stage, StageJob
from gateskip.training.recipe import DraftConfig

if TYPE_CHECKING:
    from torch import Tensor

    from gateskip.decoding.decoder import Decoder
    from gateskip.model.draft_network import DraftNetwork as Network

DRAFT = DraftConfig()  # each default stands there, once
HELD_OUT = 8  # blocks on which agreement is measured


class DraftNetwork(Stage):
    """Train a small draft network on the model's predictions, and store the network in the model
    folder.

    The draft network predicts the next tokens from the model's last hidden state and the last
    token. Drafting one token takes a few percent of the compute that the model needs for one token.
    The draft network takes a few megabytes, and the model's weights do not change. The stage
    `speculate` uses the draft network with `draft_weights: learned`. Training works best on text
    that the model writes itself, as with `data.train: {mix: {self-written: 1}}`.
    """

    role: ClassVar[Role] = "draft"
    reads_data: ClassVar[tuple[Split, ...]] = ("train",)

    use: Literal["draft-network"] = "draft-network"
    """The stage's name."""

    init: str | None = Field(default=None, min_length=1)
    """Path of a draft_network.safetensors file with the initial weights of the draft network.
    Without `init`, the draft network starts with random weights."""

    steps: int = Field(default=DRAFT.steps, ge=0)
    """Number of optimizer steps for training the draft network. With `steps: 0`, the draft network
    of `init` is stored unchanged, and no training text is read."""

    batch: int = Field(default=DRAFT.batch, ge=1)
    """Number of training sequences in one optimizer step."""

    blocks: int = Field(default=1000, ge=2)
    """Number of blocks of training text. The stage keeps the model's predictions on all blocks in
    memory, and uses each block several times for training."""

    length: int | None = Field(default=None, ge=16)
    """Length of a block of training text, in tokens; by default, the value of `data.train.length`.
    """

    unroll: int = Field(default=DRAFT.unroll, ge=1, le=8)
    """Number of tokens that the draft network drafts at each position of the training text."""

    lr: float = Field(default=DRAFT.lr, gt=0)
    """Maximum learning rate."""

    inner: int | None = Field(default=None, ge=8)
    """Number of neurons in the MLP of the draft network; by default, as many as in one MLP of the
    model."""

    vocabulary: int = Field(default=8192, ge=8)
    """Number of different tokens that the draft network can draft: the most frequent tokens of the
    training text."""

    precision: Literal["auto", "no", "bf16", "fp16"] = DRAFT.precision
    """Mixed precision in training, named as in the library accelerate."""

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if self.steps == 0 and self.init is None:
            raise ValueError("steps: 0 trains nothing: name a trained network with init")
        usual = type(self).model_fields["vocabulary"].default
        if self.init is not None and (self.inner is not None or self.vocabulary != usual):
            raise ValueError(
                "the network that init names sets inner and vocabulary: leave them out"
            )
        return self

    def files(self) -> dict[str, Path]:
        """The network's file, where one is named."""
        return {} if self.init is None else {"init": Path(self.init)}

    def worked_on(self, shape: ModelShape, length: int) -> float:
        """The hidden states of all text, and the logits' weights."""
        states = 2.0 * self.blocks * (self.length or length) * shape.hidden_size
        return states + 6.0 * min(self.vocabulary, shape.vocab_size) * shape.hidden_size

    def run(self, job: StageJob) -> dict[str, Any]:
        """Train; resumes from its own checkpoint after a kill."""
        import torch

        import gateskip
        from compose.artifacts.folder import copy_source
        from gateskip.model.draft_network import save_network

        decoder = gateskip.load(job.source)
        if self.steps:
            network, record = self._trained(job, decoder)
        else:
            network, record = self._given(decoder.skipping.model), {}
        copy_source(job.source, job.target, job.dtype, link=True)
        save_network(job.target, network, torch.bfloat16)
        return {"parameters": sum(part.numel() for part in network.parameters()), **record}

    def _trained(self, job: StageJob, decoder: Decoder) -> tuple[Network, dict[str, Any]]:
        """A trained network, and its record."""
        import torch

        from compose.stages.text.split_text import split_blocks
        from gateskip.training.draft_network import agreement, train_draft_network

        assert job.train is not None, "a draft network reads the training split"
        skipping, length = decoder.skipping, self.length or job.train.length
        blocks = split_blocks(job, "train", decoder.tokenizer, length, self.blocks)
        train, held_out = _parted(blocks)
        model = skipping.model
        network = self._new(model, train, job.seed) if self.init is None else self._given(model)
        shared = ("steps", "batch", "unroll", "lr", "precision")
        config = DraftConfig(**{name: getattr(self, name) for name in shared}, seed=job.seed)
        curve = train_draft_network(skipping, network, train, config, job.work, job.progress)
        return network, {
            "training": curve,
            "train_tokens": self.steps * self.batch * length,
            "covered": float(torch.isin(held_out, network.tokens).double().mean()),
            "agreement": agreement(skipping, network, held_out, self.unroll),
        }

    def _new(self, model: Any, blocks: Tensor, seed: int) -> Network:
        """A network that drafts the most frequent tokens of blocks [N, S]."""
        import torch

        from gateskip.model.draft_network import DraftNetwork as New
        from gateskip.model.draft_network import frequent

        tokens = frequent(blocks, self.vocabulary, model.get_input_embeddings().num_embeddings)
        torch.manual_seed(seed)
        return New(model.config.hidden_size, self.inner or model.config.intermediate_size, tokens)

    def _given(self, model: Any) -> Network:
        """The network in the file that `init` names."""
        from gateskip.errors import FormatError
        from gateskip.model.draft_network import read_network

        assert self.init is not None, "without steps a network is named"
        try:
            sizes = model.config.hidden_size, model.get_input_embeddings().num_embeddings
            return read_network(Path(self.init), *sizes)
        except FormatError as error:
            fix = "name a draft_network.safetensors of this model, or leave init out"
            raise UserError(str(error), fix=fix) from error


def _parted(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks to train on, and a few blocks, at most a quarter, that are held out."""
    held = max(1, min(HELD_OUT, len(blocks) // 4))
    return blocks[:-held], blocks[-held:]
