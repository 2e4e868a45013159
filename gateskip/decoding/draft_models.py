"""Draft models: the model itself, a copy of its weights, a small network, or another model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from gateskip.decoding.own_text import OwnText
from gateskip.model.draft_network import DraftNetwork, frequent
from gateskip.model.families import UnsupportedModel, embed, logit_cap, to_device, to_host
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
)
from gateskip.runtime.backend import SampledTokens, SampleRequest
from gateskip.runtime.engine import Engine
from gateskip.runtime.skipping import SkippingModel

Weights = Literal["own", "int4-head", "nf4", "int4", "int3", "int2", "learned", "model", "auto"]
"""The draft model: the model's own weights; these with a 4-bit LM head; a quantized copy; a trained
small network; another model with the same tokenizer; or the one of these that is measured to be the
fastest (draft_choice.py)."""
MAX_DRAFTED = 65536
"""Number of tokens that copies can draft: 94 to 97 % of the tokens that Gemma 3 270M writes. A full
LM head of 262144 tokens would be more than half of a copy. Fewer tokens lose as much acceptance as
they save time."""
TRIED = 2  # integer copies that a choice is made from: those with the most bits


def reads_text(weights: Weights) -> bool:
    """Whether making this draft needs text that the model writes."""
    return weights == "int4-head" or weights in COPIES


def make_draft(skipping: SkippingModel, weights: Weights, text: OwnText | None) -> SkippingModel:
    """The draft model of this name; `text` is given where `reads_text` says so.

    Raises ValueError where a copy would not have fewer bits than the model's weights.
    """
    with torch.inference_mode():
        copied = skipping.model
        if text is None:
            copied = nf4_copy(skipping.model)
        elif weights in COPIES:
            copied = integer_copy(skipping.model, text.inputs, COPIES[weights])
    try:
        draft = SkippingModel(copied, skipping.gates, skipping.kv_rule, skipping.backend.name)
    except UnsupportedModel:
        return SkippingModel(copied, skipping.gates, skipping.kv_rule)
    if draft.engine is not None and skipping.engine is not None and text is not None:
        vocabulary = skipping.model.get_input_embeddings().num_embeddings
        tokens = drafted_tokens(text.blocks, vocabulary)
        how = COPY_HEAD if weights in COPIES else HEAD
        head = draft_head(skipping.model, text.inputs, how, tokens)
        if head is not None:
            draft.engine.use_draft_head(head, skipping.engine.head, tokens)
    return draft


def drafted_tokens(blocks: Tensor, vocabulary: int) -> Tensor | None:
    """The tokens [T] that copies draft, chosen by the text of blocks [N, S] that the model wrote;
    None where they are all tokens."""
    return frequent(blocks, MAX_DRAFTED, vocabulary) if vocabulary > MAX_DRAFTED else None


def draft_copies(skipping: SkippingModel) -> list[Weights]:
    """Copies that may draft for a model, the most promising first."""
    integers: tuple[Weights, ...] = ("int4", "int3", "int2")
    copies = [name for name in integers if is_possible(skipping, name)][:TRIED]
    return [*copies, "nf4"] if is_possible(skipping, "nf4") else copies


def candidates(
    skipping: SkippingModel, budget: float = 1.0, given: Sequence[Weights] = ()
) -> list[Weights]:
    """Drafts at a budget that may be faster for a model: those `given` with it (a trained network,
    another model), integer copies where the compiled kernels run them, and below full compute the
    model's own weights."""
    copies = [] if skipping.engine is None else draft_copies(skipping)
    names: list[Weights] = list(given)
    names += [name for name in copies if name != "nf4"]
    if budget < 1:
        head = skipping.model.get_output_embeddings()
        ranks = skipping.engine is not None and stored_bits(head) > HEAD.bits
        names.append("int4-head" if ranks else "own")
    return names


def is_possible(skipping: SkippingModel, weights: Weights) -> bool:
    """Whether this draft is possible for a model."""
    bits = copy_bits(weights)
    return bits is None or can_copy(skipping.model, bits)


class LearnedDraft:
    """A network that drafts for a model, with the model's LM head and embedding."""

    def __init__(self, skipping: SkippingModel, network: DraftNetwork) -> None:
        """Nothing is rounded before the first draft, since a folder may be decoded without
        drafts."""
        self.network, self._skipping, self._model = network, skipping, skipping.model
        self._tokens = network.tokens.long()

    @cached_property
    def _rows(self) -> Tensor:
        """The LM head's weights [T, H] for the network's tokens."""
        return dense_weight(self._model.get_output_embeddings())[self._tokens]

    @cached_property
    def _engine(self) -> Engine | None:
        """The engine of compiled kernels, which has taken the network."""
        engine = self._skipping.engine
        if engine is not None:
            engine.use_draft_network(self.network, self._rows)
        return engine

    def prepare(self) -> bool:
        """Round the tensors that the kernels read, once, which takes a moment; returns whether they
        draft."""
        return self._engine is not None

    @torch.inference_mode()
    def draft(self, request: SampleRequest, state: Tensor) -> SampledTokens:
        """A draft after a token; `state` [H] is the final state before the token.

        In torch drafts are always greedy. Their `drawn_from` says so, and verification keeps the
        distribution.
        """
        if self._engine is None:
            return self._in_torch(request, state)
        return self._engine.draft_by_network(request, state)

    def _in_torch(self, request: SampleRequest, state: Tensor) -> SampledTokens:
        assert request.limit is not None, "a draft has a limit"
        end, by_bin = request.limit
        tokens, probabilities, acceptance = list[int](), list[float](), 1.0
        while len(tokens) < request.count:
            last = to_device([tokens[-1] if tokens else request.token], state.device)[0]
            token, sure, state = self._step(last, state)
            numbers = to_host(torch.stack((token.double(), sure.double())))
            tokens.append(int(numbers[0]))
            probabilities.append(numbers[1])
            acceptance *= by_bin[min(len(by_bin) - 1, int(probabilities[-1] * len(by_bin)))]
            if acceptance <= end:
                break
        return SampledTokens(tokens, None, probabilities, tokens)

    @torch.inference_mode()
    def draft_on_device(self, last: Tensor, state: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """`count` tokens [count] after the token `last` [], and the network's probabilities of
        them; `state` [H] is the final state before `last`."""
        tokens, probabilities = list[Tensor](), list[Tensor]()
        for _ in range(count):
            last, sure, state = self._step(last, state)
            tokens.append(last)
            probabilities.append(sure)
        return torch.stack(tokens), torch.stack(probabilities)

    def _step(self, last: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next token [], the network's probability of it [], and its state [H]."""
        cap = logit_cap(self._model)
        state = self.network(state.float(), embed(self._model, last).float())
        logits = self._rows @ state
        shares = (logits if cap is None else torch.tanh(logits / cap) * cap).softmax(-1)
        sure, best = shares.max(-1)
        return self._tokens.index_select(0, best.view(1))[0], sure, state
