"""The native engine: calls of the compiled kernels, each a pass over a few tokens or several steps.

It decodes, drafts and verifies on a CPU, where a step in torch spends most of its time between
operators. Devices, formats and architectures that it does not support stay with torch. Weights are
the torch modules' own, float32, bfloat16 or packed; packed ones are multiplied with activations
rounded to 8 bits when `rounded` asks for it. Between branches everything is float32, so that
bfloat16 models lose less precision here than in torch.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gateskip.gates.base import Gates
from gateskip.kernels import abi, build, ops
from gateskip.kernels.abi import PARTS, Matrix
from gateskip.model.draft_network import DraftNetwork
from gateskip.model.families import UnsupportedModel, logit_cap
from gateskip.quantization.packed_linear import PackedLinear
from gateskip.runtime.backend import (
    DraftLimit,
    Round,
    SampledTokens,
    SampleRequest,
    Sampling,
    SpeculationRequest,
    Verified,
)
from gateskip.runtime.descriptors import Buffers, Descriptors, TokenHead
from gateskip.runtime.kv_cache import KVCache


class Engine:
    """A model of a supported architecture, ready for `step`.

    `rounded` tells whether any of its products use activations rounded to 8 bits. `draft_head`
    ranks the tokens of a draft: the LM head, or its replacement. Not for two threads at a time:
    calls share memory.
    """

    def __init__(
        self, model: Any, gates: Gates | None, kv_rule: str = "project", rounded: bool = False
    ) -> None:
        """Raises UnsupportedModel when the kernels cannot run this model here."""
        if not ops.has_decoder():
            raise UnsupportedModel(build.problem() or "the processor has neither AVX2 nor NEON")
        self.parts = Descriptors(model, gates, rounded)
        self.rounded, self.model = self.parts.rounded, self.parts.model
        self.head = self.parts.head
        self.lm_head = self.draft_head = TokenHead(self.head)
        self._cap = logit_cap(model)
        self._copies = int(kv_rule == "copy")
        self.entered = torch.zeros(2 * self.model.layers, dtype=torch.int64)
        """Rows that entered each branch in the last call."""
        self._spent = torch.zeros(len(PARTS), dtype=torch.float64)
        self._arena = ops.Arena()
        self._buffers = Buffers()
        self._thresholds: tuple[Any, Tensor] | None = None
        self._row_thresholds: Tensor | None = None
        self._cache: tuple[weakref.ref[KVCache], abi.CacheView] | None = None

    def tensors(self) -> list[Tensor]:
        """The tensors that the engine reads: the model's weights, and converted copies of some of
        them."""
        return self.parts.tensors()

    # -- one pass -------------------------------------------------------------------------------

    def step(
        self,
        hidden: Tensor,
        cache: KVCache,
        cache_rows: Sequence[int],
        slots: Sequence[int],
        thresholds: Sequence[float] | Tensor | None,
        entered: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [rows, H] at `slots` of `cache_rows` -> final normed hidden states [rows, H],
        float32 for weights of any type.

        Any number of rows, whose bits do not depend on each other; within a cache row, later slots
        come after earlier ones. Thresholds may differ by row, float32 [rows, branches]; `entered`,
        uint8 [rows, branches] and zero, becomes 1 where a row entered.
        """
        out = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        places = torch.tensor([[*cache_rows], [*slots]], dtype=torch.int32)
        step = self._step(out, places, thresholds, entered)
        ops.step(self.model, self._view(cache), step, self._arena)
        return out

    def argmax(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        cache_rows: Sequence[int],
        slots: Sequence[int],
        thresholds: Sequence[float] | None,
    ) -> tuple[list[int], Tensor]:
        """The argmax token after each of `tokens`, which are at `slots` of `cache_rows`, from the
        logits of `step`'s states; and those states [rows, H]."""
        rows = torch.tensor([[*cache_rows], [*slots], [*tokens]], dtype=torch.int32)
        hidden = torch.empty(len(tokens), self.model.hidden)
        step = self._step(hidden, rows, thresholds)
        inputs = (self.parts.embedding, rows[2])
        chosen = ops.argmax(self.model, self._view(cache), step, inputs, self.head, self._arena)
        return chosen.tolist(), hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [rows, H] -> logits [rows, V]."""
        started = time.perf_counter()
        out = self._multiply(self.head, hidden)
        if self._cap is not None:
            out.div_(self._cap).tanh_().mul_(self._cap)
        self._spent[PARTS.index("lm head")] += time.perf_counter() - started
        return out

    def multiplier(self, layer: PackedLinear) -> Callable[[Tensor], Tensor]:
        """The engine's product of rows x [rows, in] with such a layer, as a call that can be
        timed."""
        matrix = self.parts.packed(layer, self.rounded)
        return lambda x: self._multiply(matrix, x)

    def _multiply(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Rows x [rows, k] -> [rows, n]."""
        return ops.multiply(matrix, x.float().contiguous(), self._arena)

    def spent(self) -> dict[str, float]:
        """Seconds in each part of the native work since the engine was made."""
        return dict(zip(PARTS, self._spent.tolist(), strict=True))

    # -- several steps of a row -----------------------------------------------------------------

    def sample(
        self,
        request: SampleRequest,
        place: tuple[KVCache, int, int],
        thresholds: Sequence[float] | Tensor | None,
        entered: Tensor | None = None,
    ) -> SampledTokens:
        """The next tokens of a row: see `Backend.sample`. `self.entered` counts all steps.

        Thresholds may be those of the row, float32 [1, branches]; `entered`, uint8 [count,
        branches] and zero, becomes 1 where a step entered. The draft head ranks a draft's tokens,
        and alone draws them when sampling.
        """
        cache, cache_row, slot = place
        state = torch.empty(1, self.model.hidden)
        places = torch.tensor([[cache_row], [slot]], dtype=torch.int32)
        step = self._step(state, places, thresholds, entered)

        def follow(order: abi.DecodeRequest) -> None:
            ops.decode(self.model, self._view(cache), step, order, self._arena)

        head = self.lm_head if request.limit is None else self.draft_head
        return self._sampled(request, head, state[0], follow)

    def draft_by_network(self, request: SampleRequest, state: Tensor) -> SampledTokens:
        """As `sample`, by the draft network, from the final state [H] before the token."""
        network, head = self._network
        moving = state.float().clone().contiguous()

        def follow(order: abi.DecodeRequest) -> None:
            ops.decode_by_network(network, moving, order, self._arena)

        return self._sampled(request, head, None, follow)

    def _sampled(
        self,
        request: SampleRequest,
        head: TokenHead,
        state: Tensor | None,
        follow: Callable[[abi.DecodeRequest], None],
    ) -> SampledTokens:
        """The kernels' answer to a request, with tokens ranked by a head."""
        raised: list[BaseException] = []
        order, distributions = self._order(request, head)
        tokens = torch.empty(request.count, dtype=torch.int32)
        order.tokens = tokens.data_ptr()
        if request.on_token is not None:
            order.on_token = abi.OnToken(guarded(request.on_token, raised, 1))
        probabilities = torch.empty(request.count) if request.limit is not None else None
        if probabilities is not None:
            order.draft.contents.probabilities = probabilities.data_ptr()
        follow(order)
        if raised:
            raise raised[0]
        following: list[int] = tokens[: order.count].tolist()
        if probabilities is None:
            return SampledTokens(following, state)
        drawn_from: Sequence[int | Tensor] = following
        if distributions is not None:
            shares = distributions[: len(following), : head.matrix.n]
            drawn_from = [head.of_all(row, self.head.n) for row in shares]
        return SampledTokens(following, state, probabilities[: order.count].tolist(), drawn_from)

    def _order(
        self, request: SampleRequest, head: TokenHead
    ) -> tuple[abi.DecodeRequest, Tensor | None]:
        """A request in the form that the kernels read, and the memory for a draft's distributions,
        if it has any."""
        order = abi.DecodeRequest(
            token=request.token,
            count=request.count,
            embedding=self.parts.embedding,
            cap=self._cap or 0.0,
            head=ctypes.pointer(head.matrix),
        )
        distributions, pointed = None, list[Any]()
        if request.limit is not None:
            draft = self._draft(request.limit, head)
            if request.sampling is not None:
                distributions = torch.empty(request.count, head.padded)
                draft.distributions = distributions.data_ptr()
            order.draft = ctypes.pointer(draft)
            pointed += [draft, distributions]
        if request.sampling is not None:
            order.sampling = ctypes.pointer(abi.Sampling(*request.sampling))
        if len(request.uniform):
            uniform = torch.tensor(list(request.uniform), dtype=torch.float64)
            order.uniform = uniform.data_ptr()
            pointed.append(uniform)
        order.held = (head, pointed)  # which live as long as the order
        return order, distributions

    def _draft(self, limit: DraftLimit, head: TokenHead) -> abi.Draft:
        """The settings of a draft that a head ranks."""
        acceptance = torch.tensor(list(limit.acceptance_by_bin))
        draft = abi.Draft(
            limit.min_acceptance, acceptance.data_ptr(), len(acceptance), held=acceptance
        )
        draft.head_tokens = None if head.tokens is None else head.tokens.data_ptr()
        draft.rerank_head = head.rerank and ctypes.pointer(head.rerank)
        return draft

    def draw(self, logits: Tensor, sampling: Sampling, uniform: float) -> int:
        """A token of logits [V], drawn by a number from 0 to 1."""
        shares = self._buffers.take("shares", (len(logits) + 8,), torch.float32)
        return ops.sample(logits.contiguous(), abi.Sampling(*sampling), uniform, shares)

    # -- drafts ---------------------------------------------------------------------------------

    def use_draft_head(self, ranks: PackedLinear, rerank: Matrix, tokens: Tensor | None) -> None:
        """Rank tokens [T] of a draft, or all, by an LM head in few bits with a row for each, and
        choose among the best by a full head."""
        matrix = self.parts.packed(ranks, rounded=True)
        self.draft_head = TokenHead(matrix, None if tokens is None else tokens.int(), rerank)

    def use_draft_network(self, network: DraftNetwork, rows: Tensor) -> None:
        """Let a network draft; its states are multiplied with rows [T, H] of the LM head, one for
        each of its tokens."""
        squares = network.norm_final.weight.float().square()
        head = TokenHead(self.parts.integers(rows, squares, 4), network.tokens)
        self._network = self.parts.network(network), head

    def speculate(
        self,
        request: SpeculationRequest,
        drafter: Engine | None,
        place: tuple[KVCache, int, int],
        thresholds: Sequence[float] | None,
        draft_thresholds: Sequence[float] | None,
        draft_cache: KVCache | None = None,
    ) -> tuple[list[Round], Tensor]:
        """Rounds of one row, plain steps one by one, and the final state [H] before the last token:
        see `RowDecoder.speculate`. Without a drafter the draft network drafts."""
        cache, row, slot = place
        raised: list[BaseException] = []
        longest = max(request.draft_length, request.lookup_length)
        state = request.state.float().clone()
        probabilities = torch.empty(request.max_rounds, request.draft_length)
        hidden = torch.empty(1 + longest, self.model.hidden)
        first = torch.tensor([[row], [slot]], dtype=torch.int32)
        look_up = guarded(request.propose, raised, ())

        def propose(tokens: Any, count: int) -> int:
            proposed = look_up(count)
            for i, token in enumerate(proposed):
                tokens[i] = token
            return len(proposed)

        call = abi.Speculation(
            *(request.token, request.left, request.max_rounds, request.max_drafts),
            *(request.draft_length, request.lookup_length),
            embedding=self.parts.embedding,
            state=state.data_ptr(),
            propose=abi.Propose(propose),
            on_token=abi.OnToken(guarded(request.on_token, raised, 1)),
            round=(abi.Round * request.max_rounds)(),
            probabilities=probabilities.data_ptr(),
            cap=self._cap or 0.0,
        )
        step = self._step(hidden, first, thresholds)
        held = self._thresholds  # which the drafts' may replace, if they are this engine's
        by = drafter or self
        drafts = by._add_drafts(call, request, drafter is None, row, draft_thresholds)
        if draft_cache is not None:
            call.draft_cache = ctypes.pointer(by._view(draft_cache))
        drawn = self._add_sampling(call, request, 1 + longest)
        ops.speculate(self.model, self._view(cache), step, self.head, call, self._arena)
        del held, drafts, drawn
        if raised:
            raise raised[0]
        rounds = zip(call.round[: call.rounds], probabilities.tolist(), strict=False)
        return [_round(*pair) for pair in rounds], state

    def _add_drafts(
        self,
        call: abi.Speculation,
        request: SpeculationRequest,
        by_network: bool,
        row: int,
        thresholds: Sequence[float] | None,
    ) -> tuple[Any, ...]:
        """Let a call's drafts come from this engine, or from its network. The returned objects have
        to live as long as the call."""
        head = self.draft_head
        if by_network and request.draft_length:
            network, head = self._network
            call.network = ctypes.pointer(network)
        drafts = SampleRequest(
            request.token, request.draft_length, request.sampling, limit=request.limit
        )
        order, _ = self._order(drafts, head)
        call.drafting = ctypes.pointer(order)
        if by_network:
            return (order,)
        moving = torch.empty(1, self.model.hidden)
        places = torch.tensor([[row], [0]], dtype=torch.int32)
        drafting = self._step(moving, places, thresholds)
        call.draft_model, call.draft_step = ctypes.pointer(self.model), ctypes.pointer(drafting)
        return order, moving, places, drafting

    def _add_sampling(
        self, call: abi.Speculation, request: SpeculationRequest, rows: int
    ) -> tuple[Tensor, ...]:
        """Let a call draw the tokens of its rounds, with that many rows each. The returned objects
        have to live as long as the call."""
        if request.sampling is None:
            return ()
        width = self.head.n + -self.head.n % 8
        logits = self._buffers.take("verified", (rows, width), torch.float32)
        shares = self._buffers.take("shares", (width,), torch.float32)
        uniform = request.uniform(request.max_rounds * (request.draft_length + rows))
        call.logits, call.shares = logits.data_ptr(), shares.data_ptr()
        call.uniform = uniform.data_ptr()
        return logits, shares, uniform

    # -- what a call points to ------------------------------------------------------------------

    def _step(
        self,
        hidden: Tensor,
        places: Tensor,
        thresholds: Sequence[float] | Tensor | None,
        entered: Tensor | None = None,
    ) -> abi.Step:
        """A pass over hidden [rows, H], at cache rows and slots `places` [2, rows]."""
        self.entered.zero_()
        by_row = isinstance(thresholds, Tensor)
        return abi.Step(
            rows=len(hidden),
            copies=self._copies,
            cache_row=places[0].data_ptr(),
            slot=places[1].data_ptr(),
            hidden=hidden.data_ptr(),
            thresholds=None if thresholds is None else self._tensor(thresholds).data_ptr(),
            stride=2 * self.model.layers if by_row else 0,
            entered=None if entered is None else entered.data_ptr(),
            kept=self.entered.data_ptr(),
            spent=self._spent.data_ptr(),
        )

    def _tensor(self, thresholds: Sequence[float] | Tensor) -> Tensor:
        """A tensor in the form that the kernels read; kept alive until the next call at least."""
        if isinstance(thresholds, Tensor):
            self._row_thresholds = thresholds.contiguous()
            return self._row_thresholds
        if self._thresholds is None or self._thresholds[0] is not thresholds:
            self._thresholds = (thresholds, torch.tensor(list(thresholds), dtype=torch.float32))
        return self._thresholds[1]

    def _view(self, cache: KVCache) -> abi.CacheView:
        if self._cache is None or self._cache[0]() is not cache:
            ropes = [cache.rope[key] for key in self.parts.rotary_dims]
            tables = [[rope[part].float().contiguous() for rope in ropes] for part in (0, 1)]
            lists = [_pointers(part) for part in (cache.keys, cache.values, *tables)]
            bf16 = int(cache.keys[0].dtype == torch.bfloat16)
            slots = (abi.Int * len(cache.slots))(*cache.slots)
            scales = [None if part is None else _pointers(part) for part in cache.scales]
            pointed = (*lists, *scales, slots)
            places = (None if part is None else ctypes.addressof(part) for part in pointed)
            view = abi.CacheView(*places, cache.capacity, bf16)
            view.held = (lists, scales, tables, slots)
            self._cache = (weakref.ref(cache), view)  # its memory goes when its text is done
        return self._cache[1]


def _round(done: abi.Round, probabilities: list[float]) -> Round:
    """A round from the kernels' answer."""
    said = [] if done.looked_up else probabilities[: done.drafted]
    row = Verified(done.drafted, done.accepted, bool(done.looked_up), said)
    return Round([row], done.draft_s, done.verify_s)


def _pointers(tensors: Sequence[Tensor]) -> Any:
    """Addresses of tensors, as an array to which a structure points."""
    return (abi.Pointer * len(tensors))(*(x.data_ptr() for x in tensors))


def guarded(called: Callable[..., Any], raised: list[BaseException], instead: Any) -> Any:
    """A function whose exceptions, which may not pass through the kernels, are stored in a list; it
    returns another value where it raised."""

    def call(*arguments: Any) -> Any:
        try:
            return called(*arguments)
        except BaseException as error:
            raised.append(error)
            return instead

    return call
