"""Drafts by a small network (gateskip/model/draft_network.py): natively, or in torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from gateskip.model.draft_network import DraftNetwork
from gateskip.model.families import embed, logit_cap
from gateskip.quantization.dequantize import dense_weight
from gateskip.runtime.backend import Drafted, Drawn
from gateskip.runtime.drafting_engine import DraftingEngine
from gateskip.runtime.skipping import SkippingModel


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
    def _engine(self) -> DraftingEngine | None:
        """The compiled kernels, which have taken the network."""
        engine = self._skipping.engine
        if engine is not None:
            engine.take_network(self.network, self._rows)
        return engine

    def prepare(self) -> bool:
        """Round what the kernels read, which takes a moment, if that was not done; whether they
        draft."""
        return self._engine is not None

    @torch.inference_mode()
    def draft(
        self,
        token: int,
        count: int,
        wanted: tuple[float, Sequence[float]],
        state: Tensor,
        drawn: Drawn | None = None,
    ) -> Drafted:
        """Up to `count` tokens that follow `token`, of which `state` [H] is the final state before.

        See `RowDecoder.draft`. In torch drafts are greedy, whatever is asked for: what a draft is
        drawn from says so, and verification keeps the distribution.
        """
        if self._engine is None:
            return self._in_torch(token, count, wanted, state)
        return self._engine.draft_by_network(token, count, wanted, state, drawn)

    def _in_torch(
        self, token: int, count: int, wanted: tuple[float, Sequence[float]], state: Tensor
    ) -> Drafted:
        tokens, chances, likely = list[int](), list[float](), 1.0
        cap, levels = logit_cap(self._model), len(wanted[1])
        state = state.float()
        while len(tokens) < count:
            before = torch.tensor(tokens[-1] if tokens else token, device=state.device)
            state = self.network(state, embed(self._model, before).float())
            logits = self._rows @ state
            shares = (logits if cap is None else torch.tanh(logits / cap) * cap).softmax(-1)
            best = int(shares.argmax())
            tokens.append(int(self._tokens[best]))
            chances.append(float(shares[best]))
            likely *= wanted[1][min(levels - 1, int(chances[-1] * levels))]
            if likely <= wanted[0]:
                break
        return Drafted(tokens, chances, tokens)
