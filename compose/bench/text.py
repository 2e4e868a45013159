"""Scoring running text: perplexity, and KL and greedy agreement to the dense model.

The model under test is anything that turns token ids into final hidden states and these into
logits, so a model that skips branches is measured while it skips. Logits are computed in chunks:
for a small model the LM head is a fifth of the work.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from compose.errors import StepError
from compose.store import new_file
from compose.units import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEAD_CHUNK = 256  # tokens whose logits exist at once: 50 MB for a vocabulary of 49152

Head = Callable[[Tensor], Tensor]
"""Final hidden states [..., H] -> logits [..., V]."""


class ScoredModel(Protocol):
    """A model whose predictions are scored: token ids -> hidden states -> logits."""

    @property
    def device(self) -> torch.device:
        """Where its inputs must lie."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""

    def hidden(self, input_ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Token ids [B, S] -> final hidden states [B, S, H], which `head` takes.

        Rows are padded on the right; `lengths` [B] counts the tokens before the padding, None
        means that there is none. The states at padded positions are never read.
        """

    def head(self, hidden: Tensor) -> Tensor:
        """Final hidden states [..., H] -> logits [..., V]."""


@dataclass(frozen=True)
class BlockScores:
    """How well a model predicts a text, and how close it is to the dense model there."""

    perplexity: float
    tokens: int
    """Predicted tokens: all but the first of each block."""
    kl: float | None = None
    """Mean over all positions of KL(dense || model), in nats."""
    agreement: float | None = None
    """Share of positions at which both would choose the same next token."""


def score_blocks(
    model: ScoredModel,
    blocks: Tensor,
    reference: tuple[Tensor, Head] | None = None,
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
    keep: Callable[[Tensor], None] | None = None,
) -> BlockScores:
    """Run `blocks` [N, S] once and measure perplexity, and the distance to `reference` if given.

    `reference` is the dense model's final hidden states [N, S, H] and its head; `keep` is called
    with the hidden states [B, S, H] of each batch.

    Raises:
        StepError: the reference was computed from other blocks.
    """
    if reference is not None and reference[0].shape[:2] != blocks.shape:
        raise StepError(
            f"the reference holds {list(reference[0].shape[:2])} positions, "
            f"but {list(blocks.shape)} are measured"
        )
    loss = distance = 0.0
    same = 0
    with torch.inference_mode():
        for start in range(0, len(blocks), batch_size):
            ids = blocks[start : start + batch_size].to(model.device)  # [B, S]
            hidden = model.hidden(ids, None)  # [B, S, H]
            if keep is not None:
                keep(hidden)
            dense = None if reference is None else reference[0][start : start + batch_size]
            for row, tokens in enumerate(ids):
                for part in head_chunks(len(tokens)):
                    logits = log_probs(model.head(hidden[row, part]))  # [C, V]
                    loss += _nll(logits, tokens[part.start + 1 : part.stop + 1])
                    if reference is not None and dense is not None:
                        target = log_probs(reference[1](dense[row, part].to(model.device)))
                        distance += _kl(target, logits)
                        same += int((target.argmax(-1) == logits.argmax(-1)).sum())
            if progress is not None:
                progress(min(start + batch_size, len(blocks)), len(blocks), "scoring text")
    tokens_scored = len(blocks) * (blocks.shape[1] - 1)
    perplexity = _exp(loss / tokens_scored)
    if reference is None:
        return BlockScores(perplexity, tokens_scored)
    positions = blocks.numel()
    return BlockScores(perplexity, tokens_scored, distance / positions, same / positions)


def save_reference(
    model: ScoredModel,
    blocks: Tensor,
    path: Path,
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> BlockScores:
    """Store the final hidden states of `blocks` [N, S] as safetensors; the model's own perplexity.

    The file holds `hidden` [N, S, H] in the model's dtype and `blocks`; it appears whole.
    """
    from safetensors.torch import save_file

    kept: list[Tensor] = []
    scores = score_blocks(
        model,
        blocks,
        batch_size=batch_size,
        progress=progress,
        keep=lambda hidden: kept.append(hidden.cpu()),
    )
    with new_file(path) as file:
        save_file({"hidden": torch.cat(kept).contiguous(), "blocks": blocks.cpu()}, file)
    return scores


def load_reference(path: Path, blocks: Tensor) -> Tensor:
    """The hidden states [N, S, H] that `save_reference` stored for exactly these `blocks`.

    Raises:
        StepError: the file is absent or unreadable, or was computed from other blocks.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
        hidden, stored_blocks = stored["hidden"], stored["blocks"]
    except (OSError, SafetensorError, KeyError) as error:
        raise StepError(f"cannot read the reference {path}: {error}") from error
    if not torch.equal(stored_blocks, blocks.cpu()):
        raise StepError(f"the reference {path} was made from other text")
    return hidden


def load_head(folder: Path) -> Head:
    """The LM head of an unquantized model folder, read without the rest of the model.

    Raises:
        StepError: the folder has no such weight.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tied = config.get("tie_word_embeddings", False)
    names = ("model.embed_tokens.weight",) if tied else ("lm_head.weight",)
    weight = _read_weight(folder, (*names, "lm_head.weight", "model.embed_tokens.weight"))
    softcap = config.get("final_logit_softcapping")
    scale = config.get("logit_scale", 1.0) / config.get("logits_scaling", 1.0)

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = hidden.to(weight.dtype) @ weight.T * scale
        return torch.tanh(logits / softcap) * softcap if softcap else logits

    return head


def _read_weight(folder: Path, names: Sequence[str]) -> Tensor:
    from safetensors import safe_open

    for name in names:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                if name in file.keys():  # noqa: SIM118 -- not a mapping
                    weight: Tensor = file.get_tensor(name)
                    return weight
    raise StepError(f"{folder} has none of the weights {', '.join(dict.fromkeys(names))}")


def head_chunks(length: int) -> Iterator[slice]:
    """Slices of at most HEAD_CHUNK positions that cover `length`."""
    for start in range(0, length, HEAD_CHUNK):
        yield slice(start, min(start + HEAD_CHUNK, length))


def log_probs(logits: Tensor) -> Tensor:
    """Logits [..., V] -> log-probabilities [..., V] in float32."""
    return logits.float().log_softmax(-1)


def _nll(predicted: Tensor, targets: Tensor) -> float:
    """Summed loss of the targets [T] under the first T rows of [C, V]; T is C or C - 1."""
    picked = predicted[: len(targets)].gather(1, targets[:, None])
    return -float(picked.double().sum())


def _kl(target: Tensor, predicted: Tensor) -> float:
    """Summed KL(target || predicted) of two [C, V] of log-probabilities."""
    return float((target.exp() * (target - predicted)).sum(-1).double().sum())


def _exp(mean_loss: float) -> float:
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf
