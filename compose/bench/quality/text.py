"""Scores running text: perplexity, and KL and greedy agreement to the dense model.

The model under test turns token ids into final hidden states, and these into logits; a model that
skips branches is measured while it skips. Logits are computed in chunks: for a small model the LM
head is a fifth of the work.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from compose.artifacts.packed_folder import tensor_files, tensors_of
from compose.errors import StepError
from compose.store import new_file
from compose.units import Progress
from gateskip.quantization.folders import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK = 512  # tokens of a block on which perplexity is measured
HEAD_ROWS = 16384  # of a head in bfloat16 that are cast to float32 at once
HEAD_CHUNK = 256  # tokens whose logits exist at once: 50 MB for a vocabulary of 49152

Head = Callable[[Tensor], Tensor]
"""Final hidden states [..., H] -> logits [..., V]."""


class ScoredModel(Protocol):
    """A model whose predictions are scored: token ids -> hidden states -> logits."""

    @property
    def device(self) -> torch.device:
        """The device of its inputs."""

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
    """How well a model predicts a text, and how close it is to the dense model there.

    Without a dense model to compare with, the distances are None and `block_kl` is empty.
    """

    perplexity: float
    tokens: int
    """Predicted tokens: all but the first of each block."""
    block_nll: tuple[float, ...]
    """Mean negative log-likelihood of a token, in nats, of each block."""
    kl: float | None = None
    """Mean over all positions of KL(dense || model), in nats."""
    kl_median: float | None = None
    """Median of KL over all positions, in nats."""
    kl_p90: float | None = None
    """90th percentile of KL over all positions, in nats."""
    block_kl: tuple[float, ...] = ()
    """Mean KL of each block, in nats."""
    agreement: float | None = None
    """Share of positions at which both have the same argmax token."""
    dense_nll: tuple[float, ...] = ()
    """The dense model's `block_nll` on the same tokens, where only a part of each block is
    scored."""


Reference = tuple[Tensor, Head]
"""The dense model's final hidden states [N, S, H] of some blocks, and its head."""


def score_blocks(
    model: ScoredModel,
    blocks: Tensor,
    reference: Reference | None = None,
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
    keep: Callable[[Tensor], None] | None = None,
    after: int = 0,
) -> BlockScores:
    """Run `blocks` [N, S] once and measure perplexity, and the distance to `reference` if given.

    `keep` is called with the hidden states [B, S, H] of each batch. The first `after` tokens of
    each block are context only: predictions at them do not count.

    Raises:
        StepError: the reference was computed from other blocks.
    """
    if reference is not None and reference[0].shape[:2] != blocks.shape:
        raise StepError(
            f"the reference holds {list(reference[0].shape[:2])} positions, "
            f"but {list(blocks.shape)} are measured"
        )
    rows: list[_Row] = []
    with torch.inference_mode():
        for start in range(0, len(blocks), batch_size):
            ids = blocks[start : start + batch_size].to(model.device)  # [B, S]
            hidden = model.hidden(ids, None)  # [B, S, H]
            if keep is not None:
                keep(hidden)
            for row, tokens in enumerate(ids):
                dense = None
                if reference is not None:
                    dense = (reference[0][start + row, after:], reference[1])
                rows.append(_score_row(model.head, hidden[row, after:], tokens[after:], dense))
            if progress is not None:
                progress(min(start + batch_size, len(blocks)), len(blocks), "scoring text")
    scores = _summary(rows)
    if not after or reference is None:
        return scores
    return replace(scores, dense_nll=tuple(float(row.dense_nll.mean()) for row in rows))


class _Row(NamedTuple):
    """Scores of a block of S tokens; float64 on the CPU."""

    nll: Tensor
    """[S - 1], of each predicted token."""
    kl: Tensor
    """[S], at each position; empty without a dense model."""
    same: Tensor
    """[S], whether both have the same argmax."""
    dense_nll: Tensor
    """[S - 1], the dense model's of each predicted token; empty without one."""


def _score_row(
    head: Head, hidden: Tensor, tokens: Tensor, reference: tuple[Tensor, Head] | None
) -> _Row:
    """Scores of one block: hidden states [S, H], tokens [S], the dense model's states and head."""
    nll, kl, same, dense_nll = [], [], [], []
    for part in head_chunks(len(tokens)):
        predicted = log_probs(head(hidden[part]))  # [C, V]
        following = tokens[part.start + 1 : part.stop + 1]
        nll.append(_nll(predicted, following))
        if reference is not None:
            target = log_probs(reference[1](reference[0][part].to(hidden.device)))
            kl.append(kl_rows(target, predicted))
            same.append(target.argmax(-1) == predicted.argmax(-1))
            dense_nll.append(_nll(target, following))
    none = torch.empty(0, dtype=torch.float64)
    return _Row(
        torch.cat(nll).cpu(),
        torch.cat(kl).cpu() if kl else none,
        torch.cat(same).double().cpu() if same else none,
        torch.cat(dense_nll).cpu() if dense_nll else none,
    )


def _summary(rows: Sequence[_Row]) -> BlockScores:
    """Means, median and percentile over all blocks."""
    nll, kl, same, _ = (torch.cat(column) for column in zip(*rows, strict=True))
    perplexity, block_nll = _exp(float(nll.mean())), tuple(float(row.nll.mean()) for row in rows)
    if not len(kl):
        return BlockScores(perplexity, len(nll), block_nll)
    middle, high = torch.quantile(kl, kl.new_tensor([0.5, 0.9])).tolist()
    return BlockScores(
        perplexity=perplexity,
        tokens=len(nll),
        block_nll=block_nll,
        kl=float(kl.mean()),
        kl_median=middle,
        kl_p90=high,
        block_kl=tuple(float(row.kl.mean()) for row in rows),
        agreement=float(same.mean()),
    )


# --- The reference: what the baseline leaves for the others ---------------------------------------


def score_reference(
    model: ScoredModel, blocks: Tensor, *, batch_size: int = 1, progress: Progress | None = None
) -> tuple[BlockScores, dict[str, Tensor]]:
    """Score the baseline on `blocks` [N, S]; the second value is the reference of the other cells.

    The reference has `hidden` [N, S, H] in the model's type, and `blocks`.
    """
    states: list[Tensor] = []
    scores = score_blocks(
        model,
        blocks,
        batch_size=batch_size,
        progress=progress,
        keep=lambda hidden: states.append(hidden.cpu().clone()),
    )
    return scores, {"hidden": torch.cat(states).contiguous(), "blocks": blocks.cpu()}


def store(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write the baseline's tensors as safetensors; the file appears only when complete."""
    from safetensors.torch import save_file

    with new_file(path) as file:
        save_file(dict(tensors), file)


def load_stored(path: Path) -> dict[str, Tensor]:
    """The tensors that `store` wrote.

    Raises:
        StepError: the file is absent or unreadable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise StepError(f"cannot read the reference {path}: {error}") from error


def load_blocks(stored: Mapping[str, Tensor], blocks: Tensor) -> Tensor:
    """The baseline's final hidden states [N, S, H] of exactly these `blocks` [N, S].

    Raises:
        StepError: the baseline scored other text, or none.
    """
    if "blocks" not in stored or not torch.equal(stored["blocks"], blocks.cpu()):
        raise StepError(
            "the reference was made from other text: the data has changed since the baseline was"
            " measured",
            fix="measure all cells on the new text with --again, or name a new folder with --out",
        )
    return stored["hidden"]


def load_head(folder: Path, device: str = "cpu") -> Head:
    """The LM head of a model folder on a device, read without the rest of the model unless it is
    packed.

    It multiplies in float32 whatever the weights' type: rounding logits to bfloat16 would add to
    the KL.

    Raises:
        StepError: the folder has no such weight.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tied = config.get("tie_word_embeddings", False)
    names: tuple[str, ...] = ("model.embed_tokens.weight",) if tied else ("lm_head.weight",)
    names = (*names, "lm_head.weight", "model.embed_tokens.weight")
    weight = _read_weight(folder, names)
    if weight is None and "quantization_config" in config:
        weight = _unpacked_head(folder)
    if weight is None:
        raise StepError(f"{folder} has none of the weights {', '.join(dict.fromkeys(names))}")
    weight = weight.to(device)
    softcap = config.get("final_logit_softcapping")
    scale = config.get("logit_scale", 1.0) / config.get("logits_scaling", 1.0)

    def head(hidden: Tensor) -> Tensor:
        states = hidden.float()
        parts = [states @ rows.float().T for rows in weight.split(HEAD_ROWS)]
        logits: Tensor = torch.cat(parts, dim=-1) * scale
        return torch.tanh(logits / softcap) * softcap if softcap else logits

    return head


def _read_weight(folder: Path, names: Sequence[str]) -> Tensor | None:
    files = tensor_files(folder)
    name = next((name for name in names if name in files), None)
    return None if name is None else tensors_of(folder)(name)


def _unpacked_head(folder: Path) -> Tensor | None:
    """The weights of a head that the folder stores as integer codes."""
    weight = getattr(load_model(folder).get_output_embeddings(), "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    return weight.detach()


def head_chunks(length: int) -> Iterator[slice]:
    """Slices of at most HEAD_CHUNK positions that cover `length`."""
    for start in range(0, length, HEAD_CHUNK):
        yield slice(start, min(start + HEAD_CHUNK, length))


def log_probs(logits: Tensor) -> Tensor:
    """Logits [..., V] -> log-probabilities [..., V] in float32."""
    return logits.float().log_softmax(-1)


def _nll(predicted: Tensor, targets: Tensor) -> Tensor:
    """Losses [T] of the targets [T] under the first T rows of [C, V]; T is C or C - 1."""
    return -predicted[: len(targets)].gather(1, targets[:, None])[:, 0].double()


def kl_rows(target: Tensor, predicted: Tensor) -> Tensor:
    """KL(target || predicted) of each row of two [C, V] of log-probabilities, in nats [C]."""
    return (target.exp() * (target - predicted)).sum(-1).double()


def _exp(mean_loss: float) -> float:
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf
