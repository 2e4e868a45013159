"""Trains the draft network: its states learn to predict what the model's own states predict.

As in drafting, the network reads its own states. It is unrolled from the model's state before a
token over the next tokens of the text, and each state is compared with the model's there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from gateskip.model.draft_network import DraftNetwork
from gateskip.model.families import embed
from gateskip.model.progress import Progress
from gateskip.quantization.dequantize import dense_weight
from gateskip.runtime.skipping import SkippingModel
from gateskip.training.loop import Loop, Row, precision
from gateskip.training.objectives import distill_loss, in_chunks
from gateskip.training.recipe import DraftConfig

FADING = 0.8  # an unrolled step's weight over the one before: drafts reach later ones less often
READ = 8  # blocks whose states are computed at a time


def final_states(
    skipping: SkippingModel, blocks: Tensor, progress: Progress | None = None
) -> Tensor:
    """Final hidden states [N, S, H], in bfloat16, of token ids blocks [N, S]."""
    parts, done = list[Tensor](), 0
    for part in blocks.split(READ):
        cache = skipping.new_cache(*part.shape)
        states = skipping.forward(part.to(skipping.device), cache, [0] * len(part))
        parts.append(states.to("cpu", torch.bfloat16).clone())
        done += len(part)
        if progress is not None:
            progress(done, len(blocks), "reading text")
    return torch.cat(parts)


def train_draft_network(
    skipping: SkippingModel,
    network: DraftNetwork,
    blocks: Tensor,
    config: DraftConfig,
    work: Path | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Train a network in place to draft for a model, on token ids blocks [N, S].

    Returns the curve, one row a step. With `work`, a killed run resumes from its last checkpoint
    there.
    """
    network.requires_grad_(True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision(config.precision))
    set_seed(config.seed)
    states = final_states(skipping, blocks, progress)
    training = _DraftTraining(skipping.model, network, blocks, states, config, accelerator)
    curve = training.run(work, progress)
    network.requires_grad_(False)
    return curve


@torch.no_grad()
def agreement(
    skipping: SkippingModel, network: DraftNetwork, blocks: Tensor, ahead: int
) -> list[float]:
    """Shares of token ids blocks [N, S] at which the network's argmax is the model's, one share for
    each of the next 1 to `ahead` tokens."""
    model, states = skipping.model, final_states(skipping, blocks)
    predicted, shares = states.float(), []
    head = dense_weight(model.get_output_embeddings())
    rows, tokens = head[network.tokens.long()], network.tokens.long()
    embedded = embed(model, blocks).float()
    for place in range(1, ahead + 1):
        predicted = network(predicted[:, :-1], embedded[:, place:])
        drafted = tokens[(predicted @ rows.T).argmax(-1)]
        likeliest = [(row.float() @ head.T).argmax(-1) for row in states[:, place:]]
        shares.append(round(float((drafted == torch.stack(likeliest)).double().mean()), 4))
    return shares


class _DraftTraining(Loop):
    """The training: the dense states, and the LM head's rows of the network's tokens."""

    config: DraftConfig

    def __init__(
        self,
        model: Any,
        network: DraftNetwork,
        blocks: Tensor,
        states: Tensor,
        config: DraftConfig,
        accelerator: Accelerator,
    ) -> None:
        super().__init__(network, blocks, config, accelerator)
        self.source, self.states = model, states
        groups = [{"params": list(self.trained.values()), "lr": config.lr}]
        optimizer, self.schedule = self.optimizer_of(groups)
        self.network, self.optimizer = self.prepare(network, optimizer)
        rows = dense_weight(model.get_output_embeddings())[network.tokens.long()]
        self.head = rows.to(torch.bfloat16 if accelerator.mixed_precision == "bf16" else rows.dtype)

    def advance(self) -> Row:
        """One optimizer step over a batch."""
        chosen = self.chosen(0, len(self.blocks))
        with self.accelerator.autocast():
            loss = self._loss(self.states[chosen].float(), self.blocks[chosen])
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.trained.values(), self.config.clip)
        self.optimizer.step()
        self.step_rates()
        self.optimizer.zero_grad()
        self.step += 1
        return {"step": float(self.step), "loss": float(loss.detach())}

    def _loss(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Mean KL from the model's distribution after each token, over all unrolled steps.

        states [B, S, H] are the model's, tokens [B, S].
        """
        with torch.no_grad():
            embedded = embed(self.source, tokens).to(states.dtype)
        predicted, total, weights = states, torch.zeros(()), 0.0
        for ahead in range(1, self.config.unroll + 1):
            predicted = self.network(predicted[:, :-1], embedded[:, ahead:])
            weight = FADING ** (ahead - 1)
            total = total + weight * self._distance(predicted, states[:, ahead:])
            weights += weight
        return total / weights

    def _distance(self, predicted: Tensor, states: Tensor) -> Tensor:
        """Mean KL of the LM head's distributions at predicted states [B, S, H] from those at the
        model's."""
        predicted, states = predicted.flatten(0, 1), states.flatten(0, 1)

        def loss_of(part: Tensor, rows: slice) -> Tensor:
            target = states[rows].to(self.head.dtype) @ self.head.T
            logits = part.to(self.head.dtype) @ self.head.T
            return distill_loss(logits, target) * (len(part) / len(predicted))

        return in_chunks(predicted, loss_of)
