"""Drafts of a model: the model itself, a cheaper copy of its weights, or a small network."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from gateskip.model.draft_network import DraftNetwork, frequent
from gateskip.model.families import UnsupportedModel, embed, logit_cap
from gateskip.quantization.dequantize import dense_weight, stored_bits
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
from gateskip.runtime.backend import SampledTokens, SampleRequest
from gateskip.runtime.engine import Engine
from gateskip.runtime.skipping import SkippingModel

Weights = Literal["own", "int4-head", "nf4", "int4", "int3", "int2", "learned", "auto"]
"""What drafts: the model's own weights; these, but for a 4-bit LM head; a copy; a small network
that learned to; or the one of these that is measured to be the fastest here (draft_choice.py)."""
MAX_DRAFTED = 65536
"""Tokens that copies draft, which are 94 to 97 % of what Gemma 3 270M writes: its LM head of 262144
is more than half of a copy that drafts all. Fewer cost as much in acceptance as they save."""
TRIED = 2  # integer copies that a choice is made from: those with the most bits


def reads_text(weights: Weights) -> bool:
    """Whether making this draft takes text of the model's own."""
    return weights == "int4-head" or weights in COPIES


def make_draft(skipping: SkippingModel, weights: Weights, blocks: Tensor | None) -> SkippingModel:
    """The model that drafts for a model; blocks [N, S] are token ids, where `reads_text` asks so.

    Raises ValueError where a copy would have no fewer bits than the model's weights.
    """
    with torch.inference_mode():
        inputs = None if blocks is None else read_text(skipping.model, blocks)
        copied = skipping.model
        if inputs is None:
            copied = nf4_copy(skipping.model)
        elif weights in COPIES:
            copied = integer_copy(skipping.model, inputs, COPIES[weights])
    try:
        draft = SkippingModel(copied, skipping.gates, skipping.kv_rule, skipping.backend.name)
    except UnsupportedModel:
        return SkippingModel(copied, skipping.gates, skipping.kv_rule)
    if draft.engine is not None and skipping.engine is not None and inputs is not None:
        assert blocks is not None, "inputs were read of them"
        tokens = drafted_tokens(blocks, skipping.model.get_input_embeddings().num_embeddings)
        how = COPY_HEAD if weights in COPIES else HEAD
        head = draft_head(skipping.model, inputs, how, tokens)
        if head is not None:
            draft.engine.use_draft_head(head, skipping.engine.head, tokens)
    return draft


def drafted_tokens(blocks: Tensor, vocabulary: int) -> Tensor | None:
    """The tokens [T] that copies draft, by what the model writes in blocks [N, S]; None where they
    are all."""
    return frequent(blocks, MAX_DRAFTED, vocabulary) if vocabulary > MAX_DRAFTED else None


def draft_copies(skipping: SkippingModel) -> list[Weights]:
    """Copies that may draft for a model, the likeliest first."""
    integers: tuple[Weights, ...] = ("int4", "int3", "int2")
    copies = [name for name in integers if is_possible(skipping, name)][:TRIED]
    return [*copies, "nf4"] if is_possible(skipping, "nf4") else copies


def candidates(
    skipping: SkippingModel, budget: float = 1.0, learned: bool = False
) -> list[Weights]:
    """Drafts at a budget that may pay for a model: a network that `learned`, integer copies where
    the compiled kernels run them, and at less than full compute the model's own weights."""
    copies = [] if skipping.engine is None else draft_copies(skipping)
    names: list[Weights] = ["learned"] if learned else []
    names += [name for name in copies if name != "nf4"]
    if budget < 1:
        head = skipping.model.get_output_embeddings()
        ranks = skipping.engine is not None and stored_bits(head) > HEAD.bits
        names.append("int4-head" if ranks else "own")
    return names


def is_possible(skipping: SkippingModel, weights: Weights) -> bool:
    """Whether this can draft for a model."""
    bits = copy_bits(weights)
    return bits is None or can_copy(skipping.model, bits)


class LearnedDraft:
    """A network that drafts for a model, with the model's LM head and embedding."""

    def __init__(self, skipping: SkippingModel, network: DraftNetwork) -> None:
        """Nothing is rounded before the first draft: a folder may be decoded without it."""
        self.network, self._skipping, self._model = network, skipping, skipping.model
        self._tokens = network.tokens.long()

    @cached_property
    def _rows(self) -> Tensor:
        """The LM head's weights [T, H] for the network's tokens."""
        return dense_weight(self._model.get_output_embeddings())[self._tokens]

    @cached_property
    def _engine(self) -> Engine | None:
        """The compiled kernels, which have taken the network."""
        engine = self._skipping.engine
        if engine is not None:
            engine.use_draft_network(self.network, self._rows)
        return engine

    def prepare(self) -> bool:
        """Round what the kernels read, which takes a moment, if that was not done; whether they
        draft."""
        return self._engine is not None

    @torch.inference_mode()
    def draft(self, request: SampleRequest, state: Tensor) -> SampledTokens:
        """A draft that follows a token, of which `state` [H] is the final state before.

        In torch drafts are greedy, whatever is asked for: what a draft is drawn from says so, and
        verification keeps the distribution.
        """
        if self._engine is None:
            return self._in_torch(request, state)
        return self._engine.draft_by_network(request, state)

    def _in_torch(self, request: SampleRequest, state: Tensor) -> SampledTokens:
        assert request.limit is not None, "a draft has a limit"
        end, by_bin = request.limit
        tokens, probabilities, acceptance = list[int](), list[float](), 1.0
        cap, state = logit_cap(self._model), state.float()
        while len(tokens) < request.count:
            last = torch.tensor(tokens[-1] if tokens else request.token, device=state.device)
            state = self.network(state, embed(self._model, last).float())
            logits = self._rows @ state
            shares = (logits if cap is None else torch.tanh(logits / cap) * cap).softmax(-1)
            best = int(shares.argmax())
            tokens.append(int(self._tokens[best]))
            probabilities.append(float(shares[best]))
            acceptance *= by_bin[min(len(by_bin) - 1, int(probabilities[-1] * len(by_bin)))]
            if acceptance <= end:
                break
        return SampledTokens(tokens, None, probabilities, tokens)
