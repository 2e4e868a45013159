"""The native engine: a whole pass over a few tokens in one call of the compiled kernels.

It takes over decoding and verifying on a CPU, where a step in torch spends most of its time between
operators. What it does not know (other devices, formats or architectures) stays with torch. So do
a prompt's products of dense weights; the rest of a prompt is native (prompt_kernels.py). Weights
are the torch modules' own, float32, bfloat16 or packed; packed ones are multiplied with activations
rounded to 8 bits when `rounded` asks for it. Between branches all is float32, so that bfloat16
models lose less here than in torch.
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
from gateskip.model.families import UnsupportedModel, logit_cap
from gateskip.quantization.packed_linear import PackedLinear
from gateskip.runtime.backend import Drawn, Draws
from gateskip.runtime.buffers import Buffers
from gateskip.runtime.descriptors import Descriptors
from gateskip.runtime.kv_cache import KVCache
from gateskip.runtime.native_prefill import PromptKernels

MOST_ROWS = 64  # of one pass over the weights, as MAX_ROWS in simd.h; `step` takes any number


class Engine:
    """A model of a supported architecture, ready for `step`.

    `rounded` tells whether any of its products are of activations rounded to 8 bits. `prompts` has
    what prefills take. Not for two threads at a time: calls share memory.
    """

    def __init__(
        self, model: Any, gates: Gates | None, kv_rule: str = "project", rounded: bool = False
    ) -> None:
        """Raises UnsupportedModel when the kernels cannot run this model here."""
        if not ops.has_decoder():
            raise UnsupportedModel(build.problem() or "the processor has no AVX2")
        self._parts = Descriptors(model, gates, rounded)
        self.rounded, self.model = self._parts.rounded, self._parts.model
        self.head = self._parts.head
        self._embedding = self._parts.embedding
        self._cap = logit_cap(model)
        self.copies = int(kv_rule == "copy")
        self.kept = torch.zeros(2 * self.model.layers, dtype=torch.int64)
        self._spent = torch.zeros(len(PARTS), dtype=torch.float64)
        self._arena = ops.Arena()
        self._buffers = Buffers()
        self.prompts = PromptKernels(self._parts, self._buffers)
        self._thresholds: tuple[Any, Tensor] | None = None
        self._row_thresholds: Tensor | None = None
        self._cache: tuple[weakref.ref[KVCache], abi.CacheView] | None = None

    def tensors(self) -> list[Tensor]:
        """What the engine reads: the model's weights, and what it made of some of them."""
        return self._parts.tensors()

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
        float32 whatever the weights are.

        Any number of rows, whose bits do not depend on each other; of a cache row, later slots come
        after earlier ones. `kept` then counts, branch by branch, how many rows entered. Thresholds
        may be those of each row, float32 [rows, branches]; `entered`, uint8 [rows, branches] and
        zero, becomes 1 where a row entered.
        """
        out = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        where = torch.tensor([[*cache_rows], [*slots]], dtype=torch.int32)
        step = self._step(out, where, thresholds, entered)
        ops.step(self.model, self._view(cache), step, self._arena)
        return out

    def _draw(self, order: abi.Draft, drawn: Drawn | None) -> Tensor | None:
        """Let an order's tokens be drawn; what is returned has to live as long as the order."""
        if drawn is None:
            return None
        uniform = torch.tensor(list(drawn[1]), dtype=torch.float64)
        order.sampling = ctypes.pointer(abi.Sampling(*drawn[0]))
        order.uniform = uniform.data_ptr()
        return uniform

    def continue_row(
        self,
        token: int,
        count: int,
        place: tuple[KVCache, int, int],
        thresholds: Sequence[float] | Tensor | None,
        on_token: Callable[[int], bool],
        drawn: Drawn | None = None,
        entered: Tensor | None = None,
    ) -> tuple[int, Tensor]:
        """Tell of up to `count` tokens that follow `token`, greedily or `drawn`, one after the
        other; how many, and the final state [H] before the last one.

        `place` is as in `draft`. The tokens end where `on_token` says so, or raises, which this
        call does then. `kept` counts over all steps. Thresholds may be those of the row, float32
        [1, branches]; `entered`, uint8 [count, branches] and zero, becomes 1 where a step entered.
        """
        raised: list[BaseException] = []
        order = self._order(token, count)
        order.on_token = abi.OnToken(guarded(on_token, raised, 1))
        held = self._draw(order, drawn)
        followed, state = self._follow(order, place, thresholds, entered)
        del held
        if raised:
            raise raised[0]
        return len(followed), state

    def likeliest(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        cache_rows: Sequence[int],
        slots: Sequence[int],
        thresholds: Sequence[float] | None,
    ) -> tuple[list[int], Tensor]:
        """The likeliest token after each of `tokens`, which stand at `slots` of `cache_rows`: what
        the logits of `step`'s states have as their largest; and those states [rows, H]."""
        rows = torch.tensor([[*cache_rows], [*slots], [*tokens]], dtype=torch.int32)
        hidden = torch.empty(len(tokens), self.model.hidden)
        step = self._step(hidden, rows, thresholds)
        inputs = (self._embedding, rows[2])
        chosen = ops.likeliest(self.model, self._view(cache), step, inputs, self.head, self._arena)
        found: list[int] = chosen.tolist()
        return found, hidden

    def choose(self, logits: Tensor, draws: Draws, uniform: float) -> int:
        """A token of logits [V], drawn by a number from 0 to 1."""
        shares = self._buffers.take("shares", (len(logits) + 8,), torch.float32)
        return ops.choose(logits.contiguous(), abi.Sampling(*draws), uniform, shares)

    def _order(self, token: int, count: int) -> abi.Draft:
        """What follows a token, ranked by the LM head."""
        return abi.Draft(
            token=token,
            count=count,
            embedding=self._embedding,
            cap=self._cap or 0.0,
            draft_head=ctypes.pointer(self.head),
        )

    def _follow(
        self,
        order: abi.Draft,
        place: tuple[KVCache, int, int],
        thresholds: Sequence[float] | Tensor | None,
        entered: Tensor | None = None,
    ) -> tuple[list[int], Tensor]:
        """The tokens of an order whose first token stands at a place, and the final state [H]
        before the last one."""
        cache, cache_row, slot = place
        where = torch.tensor([[cache_row], [slot]], dtype=torch.int32)
        tokens, hidden = (
            torch.empty(order.count, dtype=torch.int32),
            torch.empty(1, self.model.hidden),
        )
        order.tokens = tokens.data_ptr()
        step = self._step(hidden, where, thresholds, entered)
        ops.draft(self.model, self._view(cache), step, order, self._arena)
        return tokens[: order.count].tolist(), hidden[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [rows, H] -> logits [rows, V]."""
        started = time.perf_counter()
        out = self._multiply(self.head, hidden)
        if self._cap is not None:
            out.div_(self._cap).tanh_().mul_(self._cap)
        self._spent[PARTS.index("lm head")] += time.perf_counter() - started
        return out

    def multiplier(self, layer: PackedLinear) -> Callable[[Tensor], Tensor]:
        """What the engine does with rows x [rows, in] at such a layer: a call that can be timed."""
        matrix = self._parts.packed(layer, self.rounded)
        return lambda x: self._multiply(matrix, x)

    def _multiply(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Rows x [rows, k] -> [rows, n]."""
        return ops.multiply(matrix, x.float().contiguous(), self._arena)

    def _step(
        self,
        hidden: Tensor,
        where: Tensor,
        thresholds: Sequence[float] | Tensor | None,
        entered: Tensor | None = None,
    ) -> abi.Step:
        """A pass over hidden [rows, H], cache rows and slots `where` [2, rows]."""
        self.kept.zero_()
        of_rows = isinstance(thresholds, Tensor)
        return abi.Step(
            rows=len(hidden),
            copies=self.copies,
            cache_row=where[0].data_ptr(),
            slot=where[1].data_ptr(),
            hidden=hidden.data_ptr(),
            thresholds=None if thresholds is None else self._tensor(thresholds).data_ptr(),
            stride=2 * self.model.layers if of_rows else 0,
            entered=None if entered is None else entered.data_ptr(),
            kept=self.kept.data_ptr(),
            spent=self._spent.data_ptr(),
        )

    def spent(self) -> dict[str, float]:
        """Seconds in each part of the native work since the engine was made."""
        return dict(zip(PARTS, self._spent.tolist(), strict=True))

    # -- what a call points to ------------------------------------------------------------------

    def _tensor(self, thresholds: Sequence[float] | Tensor) -> Tensor:
        """As the kernels read them; held until the next call at least."""
        if isinstance(thresholds, Tensor):
            self._row_thresholds = thresholds.contiguous()
            return self._row_thresholds
        if self._thresholds is None or self._thresholds[0] is not thresholds:
            self._thresholds = (thresholds, torch.tensor(list(thresholds), dtype=torch.float32))
        return self._thresholds[1]

    def _view(self, cache: KVCache) -> abi.CacheView:
        if self._cache is None or self._cache[0]() is not cache:
            ropes = [cache.rope[key] for key in self._parts.rotary_dims]
            tables = [[rope[part].float().contiguous() for rope in ropes] for part in (0, 1)]
            lists = [_pointers(part) for part in (cache.keys, cache.values, *tables)]
            bf16 = int(cache.keys[0].dtype == torch.bfloat16)
            slots = (abi.Int * len(cache.slots))(*cache.slots)
            scales = [None if part is None else _pointers(part) for part in cache.scales]
            parts = (*lists, *scales, slots)
            places = (None if part is None else ctypes.addressof(part) for part in parts)
            view = abi.CacheView(*places, cache.capacity, bf16)
            view.held = (lists, scales, tables, slots)
            self._cache = (weakref.ref(cache), view)  # its memory goes when its text is done
        return self._cache[1]


def _pointers(tensors: Sequence[Tensor]) -> Any:
    """Addresses of tensors, as an array that a structure points to."""
    return (abi.Pointer * len(tensors))(*(x.data_ptr() for x in tensors))


def guarded(called: Callable[..., Any], raised: list[BaseException], instead: Any) -> Any:
    """A function whose exceptions, which may not pass through the kernels, are kept in a list; it
    returns something else where it raised."""

    def call(*given: Any) -> Any:
        try:
            return called(*given)
        except BaseException as error:
            raised.append(error)
            return instead

    return call
