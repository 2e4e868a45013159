"""The backend `native`: compiled kernels on a CPU.

Decoding is one native call for all tokens of a pass: where a step in torch spends most of its time
between operators, a skipped branch costs its gate alone. In prompts a branch is one native call, or
a few: with packed weights, which meet the same activations as in decoding, and with all in bfloat16
where the processor has units for whole matrices (AMX). Others torch multiplies, as in `gathered`,
and what lies between its products is native.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gateskip.gates.base import Gates
from gateskip.kernels import ops
from gateskip.kernels.abi import PromptUnits
from gateskip.kernels.autotune import bfloat16_is_faster
from gateskip.model.families import Branch, embed
from gateskip.model.gating import NEVER_SKIP
from gateskip.model.projections import AttentionShape, Steps, by_modules
from gateskip.quantization.formats import weight_format
from gateskip.quantization.packed_linear import DenseLinear, PackedLinear, prompt_kernel, rounding
from gateskip.runtime.attention import attend_rows, causal_softmax
from gateskip.runtime.backend import (
    Arithmetic,
    Asked,
    BackendName,
    Drafted,
    Drawn,
    Draws,
    PassThresholds,
    Round,
    Thresholds,
    Verified,
    dtype_name,
)
from gateskip.runtime.budget_control import RowThresholds
from gateskip.runtime.drafting_engine import DraftingEngine
from gateskip.runtime.gathered import Attend, Batch, GatheredBackend
from gateskip.runtime.kv_cache import KVCache, Visible
from gateskip.runtime.sizes import EVEN, equal_sizes, few_sizes

IN_BYTES = "8 bits in blocks of 32, 16 where a value stands out"
"""What packed weights are multiplied with: see matvec.h."""


class NativeBackend(GatheredBackend):
    """See `Backend`. `rounded` lets packed weights be multiplied with activations of 8 bits."""

    name: BackendName = "native"

    def __init__(
        self,
        model: Any,
        gates: Gates | None = None,
        kv_rule: str = "project",
        rounded: bool = True,
    ) -> None:
        """Raises UnsupportedModel when the kernels cannot run this model here."""
        super().__init__(model, gates, kv_rule)
        self.engine = DraftingEngine(model, gates, kv_rule, rounded)

    def arithmetic(self, scoring: bool = False) -> Arithmetic:
        """Decoding keeps float32 between products; packed weights may meet 8-bit activations."""
        if scoring and not self._prompts_in_bytes:
            activations = "float32" if self.fp32_activations else dtype_name(self.dtype)
        else:
            activations = IN_BYTES if self.engine.rounded else "float32"
        return Arithmetic(self.name, weight_format(self.model), activations, "float32")

    # -- decoding: one native call --------------------------------------------------------------

    def decode(
        self,
        tokens: Sequence[Sequence[int]],
        cache: KVCache,
        rows: Sequence[int],
        starts: Sequence[int],
        thresholds: PassThresholds = None,
    ) -> Tensor:
        """See `Backend.decode`; a row has the same bits alone and beside any others."""
        flat, cache_rows, slots = _begin(tokens, cache, rows, starts)
        hidden = embed(self.model, torch.tensor(flat))
        if isinstance(thresholds, RowThresholds):
            width = thresholds.entered.shape[1]
            values = thresholds.values.repeat_interleave(width, 0)  # [rows, branches]
            entered = torch.zeros(values.shape, dtype=torch.uint8)
            states = self.engine.step(hidden, cache, cache_rows, slots, values, entered)
            weights = thresholds.weights.repeat_interleave(width, 0)
            thresholds.entered += (entered * weights).sum(1).view(-1, width)
        else:
            states = self.engine.step(hidden, cache, cache_rows, slots, thresholds)
        self._count(slots)
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Backend.logits`."""
        return self.engine.logits(hidden)

    def draft(
        self,
        token: int,
        count: int,
        wanted: tuple[float, Sequence[float]],
        place: tuple[KVCache, int, int],
        thresholds: Thresholds,
        drawn: Drawn | None = None,
    ) -> Drafted:
        """See `RowDecoder.draft`."""
        cache, row, slot = place
        cache.begin([row], [slot], [count])
        drafted = self.engine.draft(token, count, wanted, place, thresholds, drawn)
        self._count(range(slot, slot + len(drafted.tokens)))
        return drafted

    def continue_row(
        self,
        token: int,
        count: int,
        place: tuple[KVCache, int, int],
        thresholds: PassThresholds,
        on_token: Callable[[int], bool],
        drawn: Drawn | None = None,
    ) -> tuple[int, Tensor]:
        """See `RowDecoder.continue_row`."""
        cache, row, slot = place
        cache.begin([row], [slot], [count])
        if isinstance(thresholds, RowThresholds):
            values = thresholds.values
            entered = torch.zeros(count, values.shape[1], dtype=torch.uint8)
            found = self.engine.continue_row(token, count, place, values, on_token, drawn, entered)
            thresholds.entered += (entered * thresholds.weights).sum(1)
        else:
            found = self.engine.continue_row(token, count, place, thresholds, on_token, drawn)
        self._count(range(slot, slot + found[0]))
        return found

    def likeliest(
        self,
        tokens: Sequence[Sequence[int]],
        cache: KVCache,
        rows: Sequence[int],
        starts: Sequence[int],
        thresholds: Thresholds = None,
    ) -> tuple[list[list[int]], Tensor]:
        """See `RowDecoder.likeliest`."""
        flat, cache_rows, slots = _begin(tokens, cache, rows, starts)
        found, states = self.engine.likeliest(flat, cache, cache_rows, slots, thresholds)
        self._count(slots)
        each = iter(found)
        return [list(islice(each, len(ids))) for ids in tokens], states

    def speculate(
        self,
        asked: Asked,
        drafter: NativeBackend | None,
        place: tuple[KVCache, int, int],
        thresholds: Thresholds = None,
        draft_thresholds: Thresholds = None,
    ) -> tuple[list[Round], Tensor]:
        """See `RowDecoder.speculate`."""
        cache, row, slot = place
        cache.begin([row], [slot], [1])
        other = None if drafter is None else drafter.engine
        made, state = self.engine.speculate(asked, other, place, thresholds, draft_thresholds)
        read, drafted = list[int](), list[int]()
        first, end = slot, slot + 1
        for each, _, _ in made:
            read += range(slot, slot + each.drafted + 1)
            if not each.looked_up:
                drafted += range(slot, slot + each.drafted)
            end = max(end, slot + each.drafted + 1)
            slot += each.accepted + 1
        cache.begin([row], [first], [end - first])
        if drafter is self:
            read, drafted = read + drafted, []
        self._count(read)
        if drafter is not None and drafted:
            drafter._count(drafted)
        return as_rounds(made), state

    def choose(self, logits: Tensor, draws: Draws, uniform: float) -> int:
        """See `RowDecoder.choose`."""
        return self.engine.choose(logits, draws, uniform)

    def _count(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.usage.saw(slot)
        kept = self.engine.kept.tolist()
        self.usage.kept = [a + b for a, b in zip(self.usage.kept, kept, strict=True)]

    # -- prompts: what lies between the products ------------------------------------------------

    @cached_property
    def _own_products(self) -> bool:
        """Whether the kernels multiply prompts: a bfloat16 model's, in units for whole matrices, or
        by packed weights as decoding does, with activations of 8 bits. Weights beside those must be
        multiplied fast in bfloat16."""
        units = ops.prompt_units()
        if self.dtype != torch.bfloat16 or units != PromptUnits.VECTORS:
            return self.dtype == torch.bfloat16 and units == PromptUnits.TILE_UNITS
        asked = self._packed == "all" or (self._packed == "some" and bfloat16_is_faster())
        return self.engine.rounded and asked

    @cached_property
    def _prompts_in_bytes(self) -> bool:
        """Whether packed weights meet activations of 8 bits in prompts, too."""
        return self._own_products and ops.prompt_units() == PromptUnits.VECTORS

    @cached_property
    def _packed(self) -> Literal["all", "some", "none"]:
        """How many of the branches' weights are packed."""
        packed = [isinstance(part, PackedLinear) for part in self._linears]
        return "all" if all(packed) else "some" if any(packed) else "none"

    @cached_property
    def _linears(self) -> list[nn.Module]:
        """What multiplies in the branches."""
        parts = (part for branch in self.branches for part in branch.module.modules())
        return [part for part in parts if hasattr(part, "in_features")]

    def prompt(
        self,
        input_ids: Tensor,
        cache: KVCache,
        starts: Sequence[int],
        thresholds: PassThresholds = None,
        lengths: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        full_from: Sequence[int] | None = None,
    ) -> Tensor:
        """See `Backend.prompt`."""
        with rounding(self._own_products and self.engine.rounded):
            return super().prompt(input_ids, cache, starts, thresholds, lengths, rows, full_from)

    @cached_property
    def fp32_activations(self) -> bool:  # type: ignore[override]
        """Whether prompts pass in float32 though the weights are bfloat16: where that is
        multiplied faster. Decoding does so anyway."""
        if self.dtype != torch.bfloat16 or bfloat16_is_faster() or self._own_products:
            return False
        return not any(type(part) is nn.Linear for part in self._linears)

    @cached_property
    def _any_size(self) -> bool:
        """Whether a prompt's products take any number of rows as it is: in float32, and where all
        are a kernel of ours."""
        if self.fp32_activations or all(map(self._multiplies, self.branches)):
            return True
        return prompt_kernel() and self._packed == "all"

    @property
    def even(self) -> int:
        """One where products take any number of rows."""
        return 1 if self._any_size else EVEN

    def sizes(self, count: int) -> list[int]:
        """Equal parts where products take any number of rows, few sizes else."""
        return equal_sizes(count) if self._any_size else few_sizes(count)

    def entering(self, branch: Branch, tokens: int) -> AbstractContextManager[None]:
        """Where several parts of `tokens` enter in float32, the weights are converted once."""
        return self._fp32_weights(branch, tokens)

    @contextmanager
    def _fp32_weights(self, branch: Branch, tokens: int) -> Iterator[None]:
        with ExitStack() as stack:
            again = self.fp32_activations and len(equal_sizes(tokens)) > 1
            for part in branch.module.modules() if again else ():
                if isinstance(part, DenseLinear):
                    stack.enter_context(part.fp32_weight())
            yield

    @cached_property
    def steps(self) -> Steps:
        """Norms of queries and keys, and rotary embedding, in one native pass each; projections of
        one input in one native call, where it has all of a branch."""
        return Steps(self._project, self.engine.prompts.norm_heads, self.engine.prompts.rotate)

    def _multiplies(self, branch: Branch) -> bool:
        """Whether a branch's products are native calls, each of several matrices."""
        return self._own_products and self.engine.prompts.multiplies(branch.index)

    def _project(self, branch: Branch, names: Sequence[str], x: Tensor) -> Sequence[Tensor]:
        if not self._multiplies(branch):
            return by_modules(branch, names, x)
        return self.engine.prompts.project(branch.index, names, x)

    def add_branch(
        self,
        branch: Branch,
        hidden: Tensor,
        ropes: Mapping[str, tuple[Tensor, Tensor]],
        cache: KVCache,
        batch: Batch,
        least: float | Tensor | None,
    ) -> int | None:
        """One native call, where the kernels have all products, thresholds are those of all rows,
        and skipped tokens have keys and values of their own."""
        prompts, count = self.engine.prompts, batch.slots.numel()
        if hidden.dtype != torch.bfloat16 or not self._multiplies(branch):
            return None
        if isinstance(least, Tensor) or self.sizes(count) != [count]:
            return None
        entry = None
        if least is not None or batch.real is not None:
            entry = prompts.entry(
                branch.index, batch.entering, NEVER_SKIP if least is None else least
            )
        if branch.kind == "mlp":
            return prompts.add_mlp(branch.index, hidden, entry)
        if self.kv_rule != "project" and least is not None:
            return None
        rope = ropes[branch.rope]
        return prompts.add_attention(branch.index, hidden, rope, cache, batch.place, entry)

    def read(self, branch: Branch, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The norm and the gate in one native pass."""
        return self.engine.prompts.normed(branch.index, hidden)

    def final(self, hidden: Tensor) -> Tensor:
        """The norm before the LM head."""
        return self.engine.prompts.final(hidden)

    def mlp(self, branch: Branch, x: Tensor) -> Tensor:
        """One native call where the kernels have all products; else torch's with a native
        activation between them."""
        prompts = self.engine.prompts
        if self._multiplies(branch):
            return self.leave(branch, prompts.packed_mlp(branch.index, x))
        return self.leave(branch, prompts.mlp(branch, x))

    def leave(self, branch: Branch, output: Tensor) -> Tensor:
        """The norm after a branch in one native pass."""
        return self.engine.prompts.left(branch.index, output)

    def attention(self, branch: Branch, seen: Visible, batch: Batch, whole: bool) -> Attend:
        """In bfloat16 one native call; else torch's products with a native softmax between them."""
        prompts, shape = self.engine.prompts, self.shapes[branch.index]
        kv, rows = seen.kv, seen.rows
        packed: list[Tensor] = []  # keys and values as the kernel reads them, made once a branch

        def attend(queries: Tensor, counts: Sequence[int], slots: Tensor) -> Tensor:
            if rows is not None or not prompts.attends(queries, shape):
                return attend_rows(queries, counts, slots, kv, shape, rows, self._softmax)
            if not packed:
                packed.append(prompts.pack(kv, seen.used))
            return prompts.attend(queries, counts, slots, packed[0], shape)

        return attend

    def _softmax(self, scores: Tensor, slots: Tensor, begin: int, shape: AttentionShape) -> Tensor:
        if scores.shape[2] % 8:
            return causal_softmax(scores, slots, begin, shape)
        self.engine.prompts.soften(scores, slots, begin, shape)
        return scores

    def add_rows(self, hidden: Tensor, places: Tensor, added: Tensor) -> None:
        """hidden [B, S, H] at flat places [N] += added [N, H], in place."""
        self.engine.prompts.add_rows(hidden, places, added.to(hidden.dtype))

    def add_shortcuts(self, branch: Branch, hidden: Tensor, x: Tensor, skip: Tensor) -> None:
        """One native pass over the rows that skip."""
        places = skip.flatten().nonzero().squeeze(1)
        self.engine.prompts.add_shortcuts(branch.index, hidden, x, places)


def _begin(
    tokens: Sequence[Sequence[int]], cache: KVCache, rows: Sequence[int], starts: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Token ids, cache rows and slots, one of each a token, once the cache knows that they come."""
    counts = [len(ids) for ids in tokens]
    cache.begin(rows, starts, counts)
    flat = [token for ids in tokens for token in ids]
    cache_rows = [row for row, n in zip(rows, counts, strict=True) for _ in range(n)]
    slots = [start + i for start, n in zip(starts, counts, strict=True) for i in range(n)]
    return flat, cache_rows, slots


def as_rounds(made: Sequence[tuple[Verified, float, float]]) -> list[Round]:
    """Passes of one row, each with the seconds of its draft and of verifying it, as rounds: plain
    steps that follow each other are one."""
    found = list[Round]()
    for each, draft_s, verify_s in made:
        before = found[-1] if found else None
        if each.drafted or before is None or before.rows[0].drafted:
            found.append(Round([each], draft_s, verify_s))
        else:
            times = before.draft_s + draft_s, before.verify_s + verify_s
            found[-1] = Round([each], *times, before.steps + 1)
    return found
