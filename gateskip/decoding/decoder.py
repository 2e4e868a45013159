"""Decoding: plain, skipping and self-speculative, behind one `generate`.

Speculation drafts cheaply (with an aggressive skip budget, with copies of the weights in fewer
bits, by looking up what the text said before) and verifies at full compute. Both write the cache:
drafts attend to the committed, fully computed entries, a verify pass overwrites what the drafts
left, and what it rejects lies beyond the row's length and is overwritten in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gateskip.calibration.budgets import CalibratedBudgets
from gateskip.decoding.draft_choice import fastest
from gateskip.decoding.draft_length import DraftLengthController
from gateskip.decoding.draft_models import Weights, make_draft, reads_text
from gateskip.decoding.phases import FULL, Compute, Phase, Phases, check_phases
from gateskip.decoding.sampling import (
    GREEDY,
    Distribution,
    Sampler,
    accept_or_resample,
    draw,
)
from gateskip.decoding.self_generate import write
from gateskip.decoding.speculation import Draft, Drafting, Row, StopConditions
from gateskip.decoding.stats import Generation, Stats
from gateskip.model.compute import Saving, Usage, Work, branch_costs, kept_share, saving
from gateskip.model.gating import NEVER_SKIP
from gateskip.runtime.backend import (
    Arithmetic,
    Asked,
    BackendName,
    Cache,
    Round,
    Thresholds,
    Verified,
)
from gateskip.runtime.budget_control import STEPS, Hold
from gateskip.runtime.kv_cache import KVFormat
from gateskip.runtime.learned_draft import LearnedDraft
from gateskip.runtime.skipping import Limits, SkippingModel

Mode = Literal["plain", "skip", "speculate"]
Target = Literal["gated", "original"]
Place = tuple[list[list[int]], Cache, list[int], list[int], Limits]
"""What `SkippingModel.decode` takes: tokens of each row, where they go, and under which limits."""
MAX_DRAFT = 16
IN_ONE_CALL = 32  # greedy tokens of a row
PREFILL = 4096  # tokens of all prompts together in one pass: bounds what lies beside the cache
PIECE = 1024  # and of one of them: what branches hold then is a tenth of a small model at most
NO_NETWORK = "this folder has no draft network: the stage draft-network trains one"
SELF_WRITTEN = (8, 96)  # rows and tokens of the text to which a draft copy is fitted


def cache_capacity(prompt: int, new_tokens: int) -> int:
    """Positions that a row's cache has for a prompt and what follows, rejected drafts among it."""
    return prompt + new_tokens + MAX_DRAFT


class Decoder:
    """A model with its gates, ready to decode: what `gateskip.load` returns.

    Attributes:
        skipping: the model and its gates.
        tokenizer: the folder's tokenizer.
        grid: thresholds, one a branch, for each calibrated budget.
        defaults: mode and settings that the folder asks for.
        kernels: how many linear layers run on which compiled kernel.
        kernel_times: microseconds that chose them, by shape: `ours`, and the library's `own`.
        fallback: why the backend `native` was not taken, where it was to be taken if it can.
        network: what drafts under the name `learned`, where the folder has it.
    """

    def __init__(
        self,
        skipping: SkippingModel,
        tokenizer: Any,
        grid: CalibratedBudgets | Mapping[float, Sequence[float]],
        defaults: Mapping[str, Any] | None = None,
        kernels: Mapping[str, int] | None = None,
        fallback: str | None = None,
        kernel_times: Mapping[str, dict[str, float]] | None = None,
        network: LearnedDraft | None = None,
    ) -> None:
        self.skipping, self.tokenizer = skipping, tokenizer
        budgets = grid if isinstance(grid, CalibratedBudgets) else CalibratedBudgets(grid)
        self.grid, self.defaults = dict(budgets.thresholds), dict(defaults or {})
        self._kept, self._between, self._prompts = budgets.kept, budgets.between, budgets.prompts
        self.kernels, self.fallback = dict(kernels or {}), fallback
        self.kernel_times, self.network = dict(kernel_times or {}), network
        self._controllers: dict[Any, DraftLengthController] = {}  # by kind of draft
        self._drafters: dict[str, SkippingModel] = {"own": skipping}
        self._fastest: dict[float, tuple[Weights | None, bool]] = {}  # draft, if it pays, by budget

    @property
    def backend(self) -> BackendName:
        """The name of the backend that runs the model."""
        return self.skipping.backend.name

    @property
    def arithmetic(self) -> Arithmetic:
        """The arithmetic of decoding."""
        return self.skipping.arithmetic()

    @property
    def scoring_arithmetic(self) -> Arithmetic:
        """The arithmetic of prompts and scoring."""
        return self.skipping.arithmetic(scoring=True)

    def forget_draft_costs(self) -> None:
        """Measure again what drafting costs and brings: for another number of threads, say."""
        self._controllers, self._fastest = {}, {}

    def thresholds(self, budget: float) -> Thresholds:
        """Thresholds of a budget in (0, 1].

        Raises:
            ValueError: it was not calibrated, and would keep something else.
        """
        self._require_gates(budget)
        return self._budgets.at(budget)

    def _require_gates(self, budget: float) -> None:
        if budget < 1.0 and self.skipping.gates is None:
            raise ValueError("this model has no gates, so it cannot skip")

    def kept(self, budget: float) -> float:
        """Share of the branches' multiply-adds that a budget keeps on text like the calibration's.

        Raises:
            ValueError: it is below the lowest calibrated budget.
        """
        return self._budgets.kept_at(budget)

    def phases(
        self,
        budget: float,
        prompt: Compute = "budget",
        answer: Compute = "budget",
        hold: bool = False,
        prompt_budget: float | None = None,
    ) -> Phases:
        """What decides who enters, phase by phase: see `generate`.

        Raises:
            ValueError: no phase would skip, a budget was not calibrated, or too few budgets were
                for one to be held.
        """
        check_phases(prompt, answer, prompt_budget)
        limits = self._limits(self._budgets, budget, hold)
        reads = limits
        if prompt_budget is not None:
            reads = self._limits(self._budgets.for_prompts(), prompt_budget, hold)
        if limits is None and reads is None:
            return FULL
        # Not None: gates that scale do so in both phases
        full = [NEVER_SKIP] * len(self.skipping.branches)
        return Phases(
            full if prompt == "full" or reads is None else reads,
            full if answer == "full" or limits is None else limits,
            limits,
        )

    def _limits(self, budgets: CalibratedBudgets, budget: float, hold: bool) -> Limits:
        """What keeps a budget, in every row where it is held; None for full compute."""
        self._require_gates(budget)
        thresholds = budgets.at(budget)
        return thresholds if thresholds is None or not hold else self._hold(budgets, budget)

    def _hold(self, budgets: CalibratedBudgets, budget: float) -> Hold:
        low, high, rows = budgets.curve(STEPS)
        curve = torch.tensor(rows, device=self.skipping.device)
        return Hold(budget, low, high, curve, tuple(branch_costs(self.skipping.model)))

    @property
    def _budgets(self) -> CalibratedBudgets:
        return CalibratedBudgets(self.grid, self._kept, self._between, prompts=self._prompts)

    def models(self) -> list[SkippingModel]:
        """The model, and its draft copies as far as they were made."""
        return list(self._drafters.values())

    def tensors(self) -> Iterator[Tensor]:
        """What is loaded: weights and gates, what the engine made of them, and what drafts as far
        as it was made. Some share their memory."""
        for skipping in self.models():
            for part in (skipping.model, skipping.gates):
                if part is not None:
                    yield from (*part.parameters(), *part.buffers())
            if skipping.engine is not None:
                yield from skipping.engine.tensors()
        if self.network is not None:
            yield from self.network.network.state_dict().values()

    def prepare_drafts(self, weights: Weights = "auto", budget: float = 1.0) -> None:
        """Make what drafts, or choose it for `auto`, which the first call would do else.

        Raises ValueError as `drafter`, and for `learned` in a folder without a network.
        """
        if weights == "auto":
            weights = self.fastest_draft(budget)[0] or "own"
        if weights != "learned":
            self.drafter(weights, budget)
        elif self.network is None:
            raise ValueError(NO_NETWORK)
        else:
            self.network.prepare()

    def drafter(self, weights: Weights, budget: float = 1.0) -> SkippingModel:
        """What drafts: the model itself, or its quantized copy, which is made on first use; `auto`
        is the fastest draft at a budget.

        Raises ValueError where there can be no copy, and for a network, which is no such model.
        """
        if weights == "learned":
            raise ValueError("a draft network is no model that drafts: see prepare_drafts")
        if weights not in get_args(Weights):
            known = ", ".join(get_args(Weights))
            raise ValueError(f"draft_weights {weights!r}: one of {known}")
        if weights == "auto":
            weights = self.fastest_draft(budget)[0] or "own"
        if weights not in self._drafters:
            blocks = write(self, *SELF_WRITTEN) if reads_text(weights) else None
            self._drafters[weights] = make_draft(self.skipping, weights, blocks)
        return self._drafters[weights]

    def fastest_draft(self, budget: float = 1.0) -> tuple[Weights | None, bool]:
        """The fastest draft at a budget, None where there is none, and whether it is faster than
        plain decoding. Measured once a machine; other copies that were tried are dropped."""
        if budget not in self._fastest:
            before = set(self._drafters)
            self._fastest[budget] = fastest(self, budget)
            for name in self._drafters.keys() - before - {self._fastest[budget][0]}:
                del self._drafters[name]
        return self._fastest[budget]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        mode: Mode = "plain",
        budget: float = 0.8,
        draft_budget: float = 1.0,
        draft_length: int | Literal["auto"] = "auto",
        draft_weights: Weights = "auto",
        lookup: bool = True,
        target: Target = "gated",
        kv_cache: KVFormat | None = None,
        prompt: Compute = "budget",
        answer: Compute = "budget",
        hold: bool = False,
        prompt_budget: float | None = None,
        verify_budget: float = 1.0,
        sampler: Sampler = GREEDY,
        seed: int = 0,
        eos: Sequence[int] = (),
        stop: Sequence[str] = (),
        criteria: Sequence[Any] = (),
        on_token: Callable[[int, int], None] | None = None,
    ) -> Generation:
        """Continue prompts (token ids, one list a row), greedily unless `sampler` says otherwise.

        Args:
            mode: `plain` (full compute), `skip` (at `budget`), or `speculate` (drafted, verified at
                `verify_budget`: the tokens of `plain`, or when sampling its distribution; below a
                `verify_budget` of 1 those of `skip` at that budget).
            draft_budget: how much of the branches a draft computes; 1 skips nothing, and then the
                model's own weights draft nothing.
            draft_length: drafted tokens a verify pass, 1 to 16, or `auto`: set by measured costs
                and acceptance, 0 while speculation does not pay.
            draft_weights: `own`; `int4-head`, where a 4-bit LM head ranks tokens; a copy
                of all weights in fewer bits, `int4`, `int3`, `int2` (3-bit head) or `nf4`; the
                small network that the stage `draft-network` trained, `learned`; or `auto`, the one
                that is fastest here, which is measured once a machine.
            lookup: before drafting, propose what followed the last tokens earlier in the text.
            target: what full compute means where gates scale what branches add: the `gated` model,
                or the `original`, without them. Other gates leave the model what it was.
            kv_cache: how keys and values are kept: in the `model`'s float type, or in 8 bits with a
                scale for each token and head (`int8`); None is as `skipping.kv_cache` says.
            prompt, answer: what each phase is computed at where tokens skip: the `budget`, or
                `full` compute.
            prompt_budget: how much of the branches a prompt's tokens compute but the last, by
                thresholds that keep what answers need of them: see calibration/reading.py. Without
                it prompts are computed at `budget`.
            hold: let every row hold the budget by thresholds that move with its own past: see
                runtime/budget_control.py.
            sampler, seed: how tokens are drawn; each row has a random stream of its own.
            eos: token ids that end a row; the ending token is part of the result.
            stop: strings that end a row as soon as its text holds one.
            criteria: further StoppingCriteria of transformers.
            on_token: called with (row, token) as tokens are committed.
        """
        if not prompts or not all(prompts):
            raise ValueError("every prompt needs at least one token")
        if max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1")
        if draft_length != "auto" and not 1 <= draft_length <= MAX_DRAFT:
            raise ValueError(f"draft_length must be 'auto' or 1 to {MAX_DRAFT}")
        if mode not in ("plain", "skip", "speculate"):
            raise ValueError(f"mode {mode!r}: one of plain, skip, speculate")
        if target not in ("gated", "original"):
            raise ValueError(f"target {target!r}: gated or original")
        stops = StopConditions(
            frozenset(eos), tuple(stop), self.tokenizer, max_new_tokens, tuple(criteria)
        )
        rows = [Row(i, list(p), stops, seed, on_token) for i, p in enumerate(prompts)]
        stats = Stats(prompt_tokens=sum(map(len, prompts)))
        phases = FULL
        if mode == "skip" or verify_budget < 1.0 or prompt_budget is not None:
            own = {"skip": budget, "plain": 1.0, "speculate": verify_budget}[mode]
            phases = self.phases(own, prompt, answer, hold, prompt_budget)
        drafting = None
        if mode == "speculate":
            settings = (draft_weights, draft_budget, draft_length, lookup)
            drafting = self._drafting(*settings, len(prompts))
            stats.draft_weights = "none" if drafting is None else drafting.weights
        self.skipping.gated = target == "gated"  # after copies were made, whose text is gated
        used: dict[Phase, Usage] = {}
        with torch.inference_mode(), self.skipping.keeping(kv_cache):
            if drafting is None:
                used = self._decode(rows, phases, sampler, stats)
                stats.draft_lengths = {0: stats.passes} if mode == "speculate" else {}
            else:
                self._speculate(rows, phases, drafting, sampler, stats)
        stats.new_tokens = sum(len(row.tokens) for row in rows)
        return Generation([row.tokens for row in rows], stats, used)

    def _drafting(
        self,
        weights: Weights,
        budget: float,
        length: int | Literal["auto"],
        lookup: bool,
        batch: int,
    ) -> Drafting | None:
        """How one call drafts; None where it decodes plainly, since no draft is faster here."""
        thresholds = None if weights == "learned" else self.thresholds(budget)
        pays = weights != "own" or thresholds is not None  # else the draft is the model itself
        if weights == "auto":
            chosen, pays = self.fastest_draft(budget)
            weights = chosen or "own"
        if weights == "learned" and self.network is None:
            raise ValueError(NO_NETWORK)
        pays = pays or length != "auto"  # what is forced is drafted whatever it costs
        if not pays and not lookup:
            return None
        name = weights if pays else "none"
        learned = pays and weights == "learned"
        if learned and self.network is not None:
            self.network.prepare()  # which is no part of what a draft costs
        drafting = Drafting(
            self.drafter("own" if learned or not pays else weights),
            thresholds,
            length,
            lookup,
            weights=name,
            network=self.network if learned else None,
        )
        if length == "auto":
            drafting.controller = self._controller(name, budget, batch)
            drafting.lookup_controller = self._controller("lookup", batch)
        return drafting

    def _controller(self, *kind: Any) -> DraftLengthController:
        return self._controllers.setdefault(kind, DraftLengthController())

    # -- plain and skipping --------------------------------------------------------------------

    def _decode(
        self, rows: list[Row], phases: Phases, sampler: Sampler, stats: Stats
    ) -> dict[Phase, Usage]:
        """Decode until all rows have ended; what each phase entered."""
        usage = self.skipping.usage
        before = usage.copy()
        cache, read = self._prefill(rows, phases, sampler, stats)
        started = time.perf_counter()
        continues = sampler.native and self.skipping.row_decoder is not None
        alone = len(rows) == 1 and continues
        while alone and not rows[0].ended:
            stats.passes += self._continue(rows[0], IN_ONE_CALL, cache, phases.answer, sampler)
        while live := [row for row in rows if not row.ended]:
            tokens, numbers = [[row.last] for row in live], [row.number for row in live]
            place = (tokens, cache, numbers, [row.slot for row in live], phases.answer)
            if sampler == GREEDY:
                for row, following in zip(live, self.skipping.likeliest(*place)[0], strict=True):
                    row.commit(following)
            else:
                self._choose(live, self.skipping.head(self.skipping.decode(*place)), sampler)
            stats.passes += 1
        stats.decode_s = time.perf_counter() - started
        return {"prompt": read.since(before), "answer": usage.since(read)}

    def _continue(
        self,
        row: Row,
        most: int,
        cache: Cache,
        limits: Limits,
        sampler: Sampler,
    ) -> int:
        """Commit up to `most` tokens of one native call, until the row ends; how many."""
        before = len(row.tokens)
        count, place = min(most, row.stops.limit - before), (cache, row.number, row.slot)
        drawn = None
        if sampler.draws is not None:
            drawn = (sampler.draws, [row.uniform() for _ in range(count)])
        row.state = self.skipping.continue_row(
            row.last, count, place, limits, row.commit_one, drawn
        )
        return len(row.tokens) - before

    def _prefill(
        self, rows: list[Row], phases: Phases, sampler: Sampler, stats: Stats
    ) -> tuple[Cache, Usage]:
        """A cache that holds the prompts, and what was used until they were read; the first token
        of every row is committed."""
        started = time.perf_counter()
        longest = max(len(row.prompt) for row in rows)
        cache = self.skipping.new_cache(len(rows), cache_capacity(longest, rows[0].stops.limit))
        states = self._read(rows, cache, phases)
        used = self.skipping.usage.copy()
        if phases.apart:
            tokens, starts = (
                [row.prompt[-1:] for row in rows],
                [len(row.prompt) - 1 for row in rows],
            )
            numbers = list(range(len(rows)))
            states = self.skipping.decode(tokens, cache, numbers, starts, phases.answer).unbind()
        for row, state in zip(rows, states, strict=True):
            row.state = state.clone()
        self._choose(rows, self.skipping.head(torch.stack(list(states))), sampler)
        stats.prefill_s = stats.ttft_s = time.perf_counter() - started
        return cache, used

    def _read(self, rows: list[Row], cache: Cache, phases: Phases) -> Sequence[Tensor]:
        """Fill the cache with what of the prompts passes together; the final state [H] of each
        row's last token of that."""
        lengths = [phases.read(len(row.prompt)) for row in rows]
        full_from = phases.full_from(lengths)
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids[number, :length] = torch.tensor(row.prompt[:length], dtype=torch.long)
        ids = ids.to(self.skipping.device)
        final: list[Tensor] = [torch.empty(0)] * len(rows)
        columns = max(1, min(PIECE, PREFILL // len(rows)))
        for first in range(0, max(lengths), columns):
            part = ids[:, first : first + columns]
            own = [min(max(n - first, 0), part.shape[1]) for n in lengths]
            full = None if full_from is None else [place - first for place in full_from]
            starts = [first] * len(rows)
            hidden = self.skipping.forward(part, cache, starts, phases.prompt, own, full)
            for number, length in enumerate(lengths):
                if first < length <= first + columns:
                    final[number] = hidden[number, length - first - 1].clone()
        return final

    def _choose(self, rows: list[Row], logits: Tensor, sampler: Sampler) -> None:
        """Commit one token to every row that has not ended. logits [B, V]."""
        decoder, draws = self.skipping.row_decoder, sampler.draws
        for row, own in zip(rows, logits, strict=True):
            if row.ended:
                continue
            if decoder is not None and draws is not None:  # as it draws for a row alone
                row.commit([decoder.choose(own, draws, row.uniform())])
            else:
                row.commit([draw(sampler.distribution(own, row.text), row.generator)])

    # -- self-speculation ----------------------------------------------------------------------

    def _speculate(
        self,
        rows: list[Row],
        phases: Phases,
        drafting: Drafting,
        sampler: Sampler,
        stats: Stats,
    ) -> None:
        """Draft, verify, commit, each row by its own number of tokens, until all have ended."""
        cache, _ = self._prefill(rows, phases, sampler, stats)
        started = time.perf_counter()
        speculates = self.skipping.speculates(phases.answer)
        alone = sampler.native and speculates and drafting.native()
        while live := [row for row in rows if not row.ended]:
            if alone and len(live) == 1:
                made = self._rounds(live[0], drafting, sampler, cache, phases.answer)
            else:
                made = [self._round(live, drafting, sampler, cache, phases.answer)]
            for each in made:
                drafting.observe(each)
                stats.add_round(each)
        stats.decode_s = time.perf_counter() - started

    def _rounds(
        self, row: Row, drafting: Drafting, sampler: Sampler, cache: Cache, limits: Limits
    ) -> list[Round]:
        """Some rounds of one row in one native call."""
        assert row.state is not None, "prefill keeps each row's state"
        length, longest, rounds, drafts = drafting.lengths()
        asked = Asked(
            *(row.last, row.state, row.stops.limit - len(row.tokens), rounds, drafts),
            *(length, drafting.wanted(), longest),
            propose=lambda count: row.lookup.propose(row.text, count),
            on_token=row.commit_one,
            draws=sampler.draws,
            uniform=row.uniforms,
        )
        drafter = None if drafting.network is not None else drafting.model
        place = (cache, row.number, row.slot)
        made, row.state = self.skipping.speculate(
            asked, drafter, place, limits, drafting.thresholds
        )
        return made

    def _round(
        self,
        rows: list[Row],
        drafting: Drafting,
        sampler: Sampler,
        cache: Cache,
        limits: Limits,
    ) -> Round:
        """One round of some rows."""
        begun = time.perf_counter()
        drafts = drafting.make(rows, sampler, cache)
        drafted = time.perf_counter()
        accepted = self._verify(rows, drafts, sampler, cache, limits)
        verified = [
            Verified(len(draft.tokens), count, draft.looked_up, draft.probabilities)
            for draft, count in zip(drafts, accepted, strict=True)
        ]
        return Round(verified, drafted - begun, time.perf_counter() - drafted)

    def _verify(
        self,
        rows: list[Row],
        drafts: list[Draft],
        sampler: Sampler,
        cache: Cache,
        limits: Limits,
    ) -> list[int]:
        """One pass over each row's last token and draft; commits, counts accepted tokens."""
        tokens = [[row.last, *draft.tokens] for row, draft in zip(rows, drafts, strict=True)]
        place = (tokens, cache, [row.number for row in rows], [row.slot for row in rows], limits)
        targets, states = self._targets(rows, drafts, sampler, place)
        counts = []
        for row, draft, target, own in zip(rows, drafts, targets, states, strict=True):
            accepted, following = accept_or_resample(
                draft.tokens, draft.drawn_from, target, row.generator
            )
            row.commit([*draft.tokens[:accepted], following])
            row.state = own[accepted]
            counts.append(accepted)
        return counts

    def _targets(
        self, rows: list[Row], drafts: list[Draft], sampler: Sampler, place: Place
    ) -> tuple[Sequence[Iterable[Distribution]], Sequence[Tensor]]:
        """Of each row, what follows its last token and each token of its draft, and the final
        states [K + 1, H] there."""
        counts = [len(ids) for ids in place[0]]
        if sampler == GREEDY:
            chosen, states = self.skipping.likeliest(*place)
            return chosen, states.split(counts)
        states = self.skipping.decode(*place)
        logits = self.skipping.head(states).split(counts)
        targets = [
            sampler.distributions(part, row.text, draft.tokens)
            for row, draft, part in zip(rows, drafts, logits, strict=True)
        ]
        return targets, states.split(counts)

    # -- accounting ----------------------------------------------------------------------------

    def kept_of(self, usage: Usage) -> float:
        """Share of the branches' multiply-adds that entered, of the tokens that `usage` counted."""
        return kept_share(self.skipping.model, usage)

    def saved(
        self,
        usage: Usage,
        budget: float,
        dense: Work | None = None,
        prompt_budget: float | None = None,
    ) -> Saving:
        """Multiply-adds saved over the tokens that `usage` counted at a budget: of this model's
        own, or of those of the `dense` one that it was cut from. A gate that any of the thresholds
        asks counts for all tokens that skip anywhere."""
        skipping, gates = self.skipping, self.skipping.gates
        scaled = gates is not None and gates.scales and skipping.gated  # every gate is asked
        used = [self.thresholds(budget)]
        if prompt_budget is not None:
            used.append(self._budgets.for_prompts().at(prompt_budget))
        asked = [row for row in used if row is not None]
        gated = [
            scaled or any(row[branch] != NEVER_SKIP for row in asked)
            for branch in range(len(usage.kept))
        ]
        return saving(skipping.model, usage, gates, skipping.kv_rule, gated, dense)
