"""What may draft for a model: the model itself, or a cheaper copy of its weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gateskip.model.draft_network import frequent
from gateskip.model.families import UnsupportedModel
from gateskip.quantization.dequantize import stored_bits
from gateskip.quantization.draft_copy import (
    COPIES,
    COPY_HEAD,
    HEAD,
    can_copy,
    copy_bits,
    draft_head,
    integer_copy,
    nf4_copy,
    read_text,
)
from gateskip.runtime.skipping import SkippingModel

Weights = Literal["own", "int4-head", "nf4", "int4", "int3", "int2", "learned", "auto"]
"""What drafts: the model's own weights; these, but for a 4-bit LM head; a copy; a small network
that learned to; or the one of these that is measured to be the fastest here (draft_choice.py)."""
MOST_DRAFTED = 65536
"""Tokens that copies draft, which are 94 to 97 % of what Gemma 3 270M writes: its LM head of 262144
is more than half of a copy that drafts all. Fewer cost as much in acceptance as they save."""
TRIED = 2  # integer copies that a choice is made from: those with the most bits


def reads_text(weights: Weights) -> bool:
    """Whether making this draft takes text of the model's own."""
    return weights == "int4-head" or weights in COPIES


def make_draft(own: SkippingModel, weights: Weights, blocks: Tensor | None) -> SkippingModel:
    """The model that drafts for `own`; blocks [N, S] are token ids, where `reads_text` asks so.

    Raises ValueError where a copy would have no fewer bits than the model's weights.
    """
    with torch.inference_mode():
        inputs = None if blocks is None else read_text(own.model, blocks)
        copied = own.model
        if inputs is None:
            copied = nf4_copy(own.model)
        elif weights in COPIES:
            copied = integer_copy(own.model, inputs, COPIES[weights])
    try:
        draft = SkippingModel(copied, own.gates, own.kv_rule, own.backend.name)
    except UnsupportedModel:
        return SkippingModel(copied, own.gates, own.kv_rule)
    if draft.engine is not None and own.engine is not None and inputs is not None:
        assert blocks is not None, "inputs were read of them"
        tokens = drafted_tokens(blocks, own.model.get_input_embeddings().num_embeddings)
        how = COPY_HEAD if weights in COPIES else HEAD
        head = draft_head(own.model, inputs, how, tokens)
        if head is not None:
            draft.engine.use_draft_head(head, own.engine.head, tokens)
    return draft


def drafted_tokens(blocks: Tensor, vocabulary: int) -> Tensor | None:
    """The tokens [T] that copies draft, by what the model writes in blocks [N, S]; None where they
    are all."""
    return frequent(blocks, MOST_DRAFTED, vocabulary) if vocabulary > MOST_DRAFTED else None


def draft_copies(own: SkippingModel) -> list[Weights]:
    """Copies that may draft for a model, the likeliest first."""
    integers: tuple[Weights, ...] = ("int4", "int3", "int2")
    found = [name for name in integers if is_possible(own, name)][:TRIED]
    return [*found, "nf4"] if is_possible(own, "nf4") else found


def candidates(own: SkippingModel, budget: float = 1.0, learned: bool = False) -> list[Weights]:
    """Drafts at a budget that may pay for a model: a network that `learned`, integer copies where
    the compiled kernels run them, and at less than full compute the model's own weights."""
    copies = [] if own.engine is None else draft_copies(own)
    found: list[Weights] = ["learned"] if learned else []
    found += [name for name in copies if name != "nf4"]
    if budget < 1:
        head = own.model.get_output_embeddings()
        ranks = own.engine is not None and stored_bits(head) > HEAD.bits
        found.append("int4-head" if ranks else "own")
    return found


def is_possible(own: SkippingModel, weights: Weights) -> bool:
    """Whether this can draft for a model."""
    bits = copy_bits(weights)
    return bits is None or can_copy(own.model, bits)
