"""The native engine with drafts: several tokens guessed in one call, by its own model or by a small
network, and whole rounds of guessing, verifying and accepting."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gateskip.gates.base import Gates
from gateskip.kernels import abi, ops
from gateskip.kernels.abi import Matrix
from gateskip.model.draft_network import DraftNetwork
from gateskip.quantization.packed_linear import PackedLinear
from gateskip.runtime.backend import Asked, Drafted, Drawn, Verified
from gateskip.runtime.engine import Engine, guarded
from gateskip.runtime.kv_cache import KVCache


@dataclass(frozen=True)
class DraftHead:
    """What ranks the tokens of a draft."""

    matrix: Matrix
    tokens: Tensor | None = None
    """int32 [rows of the matrix]: the token that each row is of; None where they are all."""
    rerank: Matrix | None = None
    """An LM head of all tokens, which chooses among the best."""

    @property
    def padded(self) -> int:
        """Rows, rounded up to a multiple of 8."""
        rows: int = self.matrix.n
        return rows + -rows % 8

    def draft(self, request: abi.DecodeRequest, wanted: tuple[float, Sequence[float]]) -> abi.Draft:
        """Let a request, which must not outlive this, be a draft ranked by it, until that is as
        `wanted`."""
        acceptance = torch.tensor(list(wanted[1]))
        draft = abi.Draft(wanted[0], acceptance.data_ptr(), len(acceptance), held=acceptance)
        draft.head_tokens = None if self.tokens is None else self.tokens.data_ptr()
        draft.rerank_head = self.rerank and ctypes.pointer(self.rerank)
        request.head, request.draft = ctypes.pointer(self.matrix), ctypes.pointer(draft)
        return draft

    def whole(self, shares: Tensor, vocabulary: int) -> Tensor:
        """Probabilities [rows] as those of all tokens [V]."""
        if self.tokens is None:
            return shares
        return torch.zeros(vocabulary).index_copy_(0, self.tokens.long(), shares)


class DraftingEngine(Engine):
    """An engine that drafts, too. `draft_head` ranks the tokens of a draft: the LM head, or what
    takes its place."""

    def __init__(
        self, model: Any, gates: Gates | None, kv_rule: str = "project", rounded: bool = False
    ) -> None:
        """Raises UnsupportedModel when the kernels cannot run this model here."""
        super().__init__(model, gates, kv_rule, rounded)
        self.draft_head = DraftHead(self.head)

    def use_draft_head(self, ranks: PackedLinear, rerank: Matrix, tokens: Tensor | None) -> None:
        """Rank tokens [T] of a draft, or all, by an LM head in few bits with a row for each, and
        choose among the best by a head of all."""
        matrix = self._parts.packed(ranks, rounded=True)
        self.draft_head = DraftHead(matrix, None if tokens is None else tokens.int(), rerank)

    def draft(
        self,
        token: int,
        count: int,
        wanted: tuple[float, Sequence[float]],
        place: tuple[KVCache, int, int],
        thresholds: Sequence[float] | None,
        drawn: Drawn | None = None,
    ) -> Drafted:
        """Up to `count` tokens that follow `token`, greedily or `drawn`: see `RowDecoder.draft`.

        `kept` then counts over all steps. Drawn tokens are ranked by the draft head alone.
        """
        order = self._order(token, count)
        return self._drafted(
            order,
            self.draft_head,
            wanted,
            drawn,
            lambda: self._follow(order, place, thresholds)[0],
        )

    def take_network(self, network: DraftNetwork, rows: Tensor) -> None:
        """Let a network draft, whose states meet rows [T, H] of the LM head, one a token of it."""
        squares = network.norm_final.weight.float().square()
        head = DraftHead(self._parts.integers(rows, squares, 4), network.tokens)
        self._network = self._parts.network(network), head

    def draft_by_network(
        self,
        token: int,
        count: int,
        wanted: tuple[float, Sequence[float]],
        state: Tensor,
        drawn: Drawn | None = None,
    ) -> Drafted:
        """As `draft`, by the network that was taken, from the final state [H] before `token`."""
        network, head = self._network
        order, moving = self._order(token, count), state.float().clone().contiguous()
        tokens = torch.empty(count, dtype=torch.int32)
        order.tokens = tokens.data_ptr()

        def follow() -> list[int]:
            ops.decode_by_network(network, moving, order, self._arena)
            found: list[int] = tokens[: order.count].tolist()
            return found

        return self._drafted(order, head, wanted, drawn, follow)

    def _drafted(
        self,
        order: abi.DecodeRequest,
        head: DraftHead,
        wanted: tuple[float, Sequence[float]],
        drawn: Drawn | None,
        follow: Callable[[], list[int]],
    ) -> Drafted:
        """What following an order drafts, ranked by a head, with probabilities, until it is as
        `wanted`."""
        draft, chances = head.draft(order, wanted), torch.empty(order.count)
        draft.probabilities = chances.data_ptr()
        kept = torch.empty(0 if drawn is None else order.count, head.padded)
        held = draft, self._draw(order, drawn)
        if drawn is not None:
            draft.distributions = kept.data_ptr()
        tokens = follow()
        del held
        drawn_from = kept[: len(tokens), : head.matrix.n]
        sources = tokens if drawn is None else [head.whole(p, self.head.n) for p in drawn_from]
        return Drafted(tokens, chances[: len(tokens)].tolist(), sources)

    def speculate(
        self,
        asked: Asked,
        drafter: DraftingEngine | None,
        place: tuple[KVCache, int, int],
        thresholds: Sequence[float] | None,
        draft_thresholds: Sequence[float] | None,
    ) -> tuple[list[tuple[Verified, float, float]], Tensor]:
        """Rounds of one row, each a pass with the seconds that drafting and verifying it took, and
        the final state [H] before the last token: see `RowDecoder.speculate`. Without a drafter the
        network drafts that was taken."""
        cache, row, slot = place
        raised: list[BaseException] = []
        most = max(asked.length, asked.longest)
        state, chances = asked.state.float().clone(), torch.empty(asked.rounds, asked.length)
        hidden = torch.empty(1 + most, self.model.hidden)
        first = torch.tensor([[row], [slot]], dtype=torch.int32)
        looked_up = guarded(asked.propose, raised, ())

        def propose(tokens: Any, count: int) -> int:
            found = looked_up(count)
            for i, token in enumerate(found):
                tokens[i] = token
            return len(found)

        call = abi.Speculation(
            *(asked.token, asked.left, asked.rounds, asked.drafts, asked.length, asked.longest),
            embedding=self._embedding,
            state=state.data_ptr(),
            propose=abi.Propose(propose),
            on_token=abi.OnToken(guarded(asked.on_token, raised, 1)),
            round=(abi.Round * asked.rounds)(),
            probabilities=chances.data_ptr(),
        )
        step = self._step(hidden, first, thresholds)
        held = self._thresholds  # which the drafts' may replace, if they are this engine's
        drafts = (drafter or self)._drafts_of(call, asked, drafter is None, row, draft_thresholds)
        drawn = self._drawn_rounds(call, asked, 1 + most)
        ops.speculate(self.model, self._view(cache), step, self.head, call, self._arena)
        del held, drafts, drawn
        if raised:
            raise raised[0]
        return [
            (
                Verified(
                    *(made.drafted, made.accepted, bool(made.looked_up)),
                    [] if made.looked_up else own[: made.drafted],
                ),
                made.draft_s,
                made.verify_s,
            )
            for made, own in zip(call.round[: call.rounds], chances.tolist(), strict=False)
        ], state

    def _drafts_of(
        self,
        call: abi.Speculation,
        asked: Asked,
        by_network: bool,
        row: int,
        thresholds: Sequence[float] | None,
    ) -> tuple[Any, ...]:
        """Let a call's drafts come from this engine, or from its network; what is returned has to
        live as long as the call."""
        head = self.draft_head
        if by_network and asked.length:
            network, head = self._network
            call.network = ctypes.pointer(network)
        order = self._order(asked.token, asked.length)
        draft = head.draft(order, asked.wanted)
        held: list[Any] = [order, draft]
        if not by_network:
            moving = torch.empty(1, self.model.hidden)
            where = torch.tensor([[row], [0]], dtype=torch.int32)
            drafting = self._step(moving, where, thresholds)
            call.draft_model, call.draft_step = ctypes.pointer(self.model), ctypes.pointer(drafting)
            held += [moving, where, drafting]
        if asked.draws is not None:
            sampling = abi.Sampling(*asked.draws)
            order.sampling = ctypes.pointer(sampling)
            kept = torch.empty(asked.length, head.padded)
            draft.distributions = kept.data_ptr()
            held += [sampling, kept]
        call.drafting = ctypes.pointer(order)
        return tuple(held)

    def _drawn_rounds(self, call: abi.Speculation, asked: Asked, rows: int) -> tuple[Tensor, ...]:
        """Let a call draw the tokens of its rounds, of so many rows each; what is returned has to
        live as long as the call."""
        if asked.draws is None:
            return ()
        width = self.head.n + -self.head.n % 8
        logits = self._buffers.take("verified", (rows, width), torch.float32)
        shares = self._buffers.take("shares", (width,), torch.float32)
        uniform = asked.uniform(asked.rounds * (asked.length + rows))
        call.logits, call.shares = logits.data_ptr(), shares.data_ptr()
        call.uniform = uniform.data_ptr()
        return logits, shares, uniform
