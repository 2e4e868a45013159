"""A loaded model's decoder: plain, skipping and self-speculative, behind one `generate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor

from gateskip.calibration.budgets import CalibratedBudgets
from gateskip.decoding.config import DraftConfig, PhaseSettings, Settings, SkipConfig, grouped
from gateskip.decoding.device_round import device_round, rounds_on_device
from gateskip.decoding.draft_cache import DraftCache
from gateskip.decoding.draft_choice import fastest
from gateskip.decoding.draft_length import DraftLengthController
from gateskip.decoding.draft_models import LearnedDraft, Weights, make_draft, reads_text
from gateskip.decoding.own_text import OwnText, own_text
from gateskip.decoding.phases import FULL, Phase, Phases, check_phases
from gateskip.decoding.prefill import commit_next, prefill
from gateskip.decoding.rows import Row, StopConditions
from gateskip.decoding.sampling import GREEDY, Sampler
from gateskip.decoding.self_generate import write
from gateskip.decoding.speculation import Drafting, speculate
from gateskip.decoding.stats import Generation, Stats
from gateskip.decoding.vocabulary import require_same_vocabulary
from gateskip.kernels.autotune import by_capability
from gateskip.model.compute import Saving, Usage, Work, kept_share, saving
from gateskip.model.gating import NEVER_SKIP
from gateskip.runtime.backend import Arithmetic, BackendName, Cache, SampleRequest, Thresholds
from gateskip.runtime.budget_control import BudgetControl
from gateskip.runtime.kv_cache import KVFormat
from gateskip.runtime.skipping import Limits, SkippingModel

Mode = Literal["plain", "skip", "speculate"]
Target = Literal["gated", "original"]
IN_ONE_CALL = 32  # tokens of a row
NO_NETWORK = "this folder has no draft network: the stage draft-network trains one"
NO_MODEL = "draft_weights 'model': no draft model was loaded; gateskip.load takes a draft_model"
WITHOUT_BUDGET: tuple[Weights, ...] = ("learned", "model")  # drafts that skip nothing
SELF_WRITTEN = (8, 96)  # rows and tokens of the text to which a draft copy is fitted


class Decoder:
    """A model with its gates, ready to decode: the result of `gateskip.load`.

    Attributes:
        skipping: the model and its gates.
        tokenizer: the folder's tokenizer.
        grid: thresholds, one per branch, for each calibrated budget.
        defaults: mode and settings by which the folder is decoded by default.
        kernels: the number of linear layers on each compiled kernel.
        kernel_times: microseconds that decided between them, by shape: `ours`, and the library's
            `own`.
        fallback: the reason why `auto` did not take the backend `native`.
        network: the draft network, named `learned`, where the folder has one.
        draft_model: another model that drafts, named `model`, where `draft_by` was given one.
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
        self.draft_model: SkippingModel | None = None
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
        """Measure again the cost and acceptance of drafts, for example after a change of the thread
        count. Copies that `auto` chose are dropped."""
        for name, _ in self._fastest.values():
            if name is not None and reads_text(name):
                self._drafters.pop(name, None)
        self._controllers, self._fastest = {}, {}

    def thresholds(self, budget: float) -> Thresholds:
        """Thresholds of a budget in (0, 1].

        Raises:
            ValueError: the budget was not calibrated, and would keep another share.
        """
        thresholds = self.skipping.limits(self.budgets, budget)
        assert not isinstance(thresholds, BudgetControl), "asked for without per-row control"
        return thresholds

    def kept(self, budget: float) -> float:
        """Share of the branches' multiply-adds that is computed at a budget, on text like the
        calibration text.

        Raises:
            ValueError: the budget is below the lowest calibrated budget.
        """
        return self.budgets.kept_at(budget)

    def phases(self, budget: float, **settings: Unpack[PhaseSettings]) -> Phases:
        """Limits that decide which tokens enter, phase by phase; `settings` are fields of
        `SkipConfig`.

        Raises:
            ValueError: no phase would skip, a budget was not calibrated, or too few budgets were
                for per-row control.
        """
        return self._phases(SkipConfig(budget=budget, **settings))

    def phases_of(self, mode: Mode, skip: SkipConfig, draft: DraftConfig) -> Phases:
        """The limits of one call of `generate`.

        Raises ValueError as `phases` does.
        """
        if mode != "skip" and draft.verify_budget == 1.0 and skip.prompt_budget is None:
            return FULL
        budgets = {"skip": skip.budget, "plain": 1.0, "speculate": draft.verify_budget}
        return self._phases(replace(skip, budget=budgets[mode]))

    def _phases(self, skip: SkipConfig) -> Phases:
        check_phases(skip.prompt, skip.answer, skip.prompt_budget)
        model, budgets = self.skipping, self.budgets
        limits = model.limits(budgets, skip.budget, skip.hold)
        of_prompts = limits
        if skip.prompt_budget is not None:
            of_prompts = model.limits(budgets.for_prompts(), skip.prompt_budget, skip.hold)
        if limits is None and of_prompts is None:
            return FULL
        # Not None: gates that scale do so in both phases
        full = [NEVER_SKIP] * len(model.branches)
        return Phases(
            full if skip.prompt == "full" or of_prompts is None else of_prompts,
            full if skip.answer == "full" or limits is None else limits,
            limits,
        )

    @property
    def budgets(self) -> CalibratedBudgets:
        """The calibrated budgets, which give thresholds for any budget."""
        return CalibratedBudgets(self.grid, self._kept, self._between, prompts=self._prompts)

    def draft_by(self, other: Decoder) -> None:
        """Let another model draft, at full compute: the draft named `model`.

        Raises ValueError where it has another tokenizer, or other numbers of embeddings or logits.
        """
        model, draft = self.skipping.model, other.skipping.model
        require_same_vocabulary(model, self.tokenizer, draft, other.tokenizer)
        self.draft_model = self._drafters["model"] = other.skipping
        self.forget_draft_costs()

    def models(self) -> list[SkippingModel]:
        """The model, and the models that draft for it: another one, and copies that exist."""
        return list(self._drafters.values())

    def tensors(self) -> Iterator[Tensor]:
        """Weights and gates, the engine's own tensors, and existing drafts. Some share their
        memory."""
        for skipping in self.models():
            for part in (skipping.model, skipping.gates):
                if part is not None:
                    yield from (*part.parameters(), *part.buffers())
            if skipping.engine is not None:
                yield from skipping.engine.tensors()
        if self.network is not None:
            yield from self.network.network.state_dict().values()

    def prepare_drafts(self, weights: Weights | None = None, budget: float = 1.0) -> None:
        """Make the draft model now; `auto` first chooses it. Without this call, the first call of
        `generate` that drafts makes it.

        Raises ValueError if the copy is impossible, or if a folder has no network for `learned`.
        """
        weights = self._weights(weights)
        if weights == "auto":
            weights = self.fastest_draft(budget)[0] or "own"
        if weights != "learned":
            self.drafter(weights, budget)
        elif self.network is None:
            raise ValueError(NO_NETWORK)
        else:
            self.network.prepare()

    def _weights(self, weights: Weights | None) -> Weights:
        """The draft of a setting that may be left out."""
        return weights or ("auto" if self.draft_model is None else "model")

    def drafter(self, weights: Weights, budget: float = 1.0) -> SkippingModel:
        """The draft model: the model itself, its quantized copy, made on first use, or the other
        model that was loaded; `auto` is the fastest draft at a budget.

        Raises ValueError where no copy is possible, where no other model was loaded, and for a
        draft network, which is not a causal LM.
        """
        if weights == "learned":
            raise ValueError("a draft network is not a causal LM: see prepare_drafts")
        if weights not in get_args(Weights):
            names = ", ".join(get_args(Weights))
            raise ValueError(f"draft_weights {weights!r}: one of {names}")
        if weights == "auto":
            weights = self.fastest_draft(budget)[0] or "own"
        if weights == "model" and self.draft_model is None:
            raise ValueError(NO_MODEL)
        if weights not in self._drafters:
            text = self._own_text if reads_text(weights) else None
            self._drafters[weights] = make_draft(self.skipping, weights, text)
        return self._drafters[weights]

    @cached_property
    def _own_text(self) -> OwnText:
        return own_text(
            self.skipping.model, self.skipping.gates, partial(write, self, *SELF_WRITTEN)
        )

    def fastest_draft(self, budget: float = 1.0) -> tuple[Weights | None, bool]:
        """The fastest draft at a budget (None if no draft is possible), and whether it is faster
        than plain decoding. This is measured once per machine."""
        if budget not in self._fastest:
            before = set(self._drafters)
            name, pays = self._fastest[budget] = fastest(self, budget)
            for other in self._drafters.keys() - before - ({name} if pays else set()):
                del self._drafters[other]
        return self._fastest[budget]

    def first_draft(self, budget: float = 1.0) -> Weights | None:
        """The draft that `auto` tries first at a budget; None if no draft is possible. Nothing is
        measured."""
        with by_capability():
            return fastest(self, budget)[0]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        mode: Mode = "plain",
        budget: float | None = None,
        *,
        skip: SkipConfig | None = None,
        draft: DraftConfig | None = None,
        sampler: Sampler = GREEDY,
        target: Target = "gated",
        kv_cache: KVFormat | None = None,
        seed: int = 0,
        eos: Sequence[int] = (),
        stop: Sequence[str] = (),
        criteria: Sequence[Any] = (),
        on_token: Callable[[int, int], None] | None = None,
        **settings: Unpack[Settings],
    ) -> Generation:
        """Generate tokens after prompts, one list of token ids for each row. The default is greedy.

        Args:
            mode: `plain` skips nothing and drafts nothing. `skip` skips branches as `skip` sets.
                `speculate` uses drafts as `draft` sets; the tokens equal those of `plain`, and with
                sampling their distribution does.
            budget: the same as `skip.budget`.
            skip: how prompts and answers skip branches.
            draft: how drafts are made and verified.
            sampler, seed: how tokens are sampled; each row has a separate random stream.
            target: the model that computes tokens which skip nothing: the model with gates
                (`gated`) or without gates (`original`). They differ only if gates scale the output
                of branches.
            kv_cache: format of the KV cache: the model's float type (`model`), or 8 bits with a
                scale for each token and head (`int8`). None uses `skipping.kv_cache`.
            eos: token ids that end a row; the last token of the result is the end token.
            stop: strings that end a row as soon as its text contains one of them.
            criteria: further StoppingCriteria of transformers.
            on_token: called with (row, token) for each new token.
            settings: fields of `skip` and `draft` as keyword arguments: `prompt`, `answer`,
                `prompt_budget`, `hold`; `draft_budget`, `draft_length`, `draft_weights`, `lookup`,
                `verify_budget`.

        Raises:
            ValueError: a setting is out of range, or contradicts `skip` or `draft`.

        >>> skip = SkipConfig(budget=0.8, prompt="full")                        # doctest: +SKIP
        >>> decoder.generate([ids], 16, "skip", skip=skip).tokens               # doctest: +SKIP
        >>> draft = DraftConfig(weights="int4", length=4)                       # doctest: +SKIP
        >>> decoder.generate([ids], 16, "speculate", draft=draft).tokens        # doctest: +SKIP
        """
        if not prompts or not all(prompts):
            raise ValueError("every prompt needs at least one token")
        if max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1")
        if mode not in ("plain", "skip", "speculate"):
            raise ValueError(f"mode {mode!r}: one of plain, skip, speculate")
        if target not in ("gated", "original"):
            raise ValueError(f"target {target!r}: gated or original")
        skip, draft = grouped(skip, draft, budget, settings)
        stops = StopConditions(
            frozenset(eos), tuple(stop), self.tokenizer, max_new_tokens, tuple(criteria)
        )
        rows = [Row(i, list(p), stops, seed, on_token) for i, p in enumerate(prompts)]
        stats = Stats(prompt_tokens=sum(map(len, prompts)))
        phases = self.phases_of(mode, skip, draft)
        drafting = None
        if mode == "speculate":
            drafting = self.drafting(draft, len(prompts))
            stats.draft_weights = "none" if drafting is None else drafting.weights
        self.skipping.gated = target == "gated"  # after copies were made, whose text is gated
        used: dict[Phase, Usage] = {}
        with torch.inference_mode(), self.skipping.keeping(kv_cache):
            if drafting is None:
                used = self._decode(rows, phases, sampler, stats)
                stats.draft_lengths = {0: stats.passes} if mode == "speculate" else {}
            else:
                cache, _ = prefill(self.skipping, rows, phases, sampler, stats)
                started = time.perf_counter()
                if drafting.weights == "model" and not all(row.ended for row in rows):
                    kind = self.skipping.kv_cache
                    drafting.own_cache = DraftCache.of(drafting.model, rows, kind)
                    stats.prefill_s += time.perf_counter() - started
                    started = time.perf_counter()
                limits = phases.answer
                there = rounds_on_device(self.skipping, drafting, sampler, limits)
                by = device_round if there else None
                speculate(self.skipping, rows, drafting, sampler, cache, limits, stats, by)
                stats.decode_s = time.perf_counter() - started
        stats.new_tokens = sum(len(row.tokens) for row in rows)
        return Generation([row.tokens for row in rows], stats, used)

    def drafting(self, draft: DraftConfig, batch: int) -> Drafting | None:
        """The drafting of `batch` rows together; None for plain decoding where no draft is faster
        on this machine.

        Raises ValueError as `prepare_drafts` does.
        """
        weights, length = self._weights(draft.weights), draft.length
        pays = weights != "own" or draft.budget < 1.0  # else the draft is the model itself
        if weights == "auto":
            chosen, pays = self.fastest_draft(draft.budget)
            weights = chosen or "own"
        thresholds = None if weights in WITHOUT_BUDGET else self.thresholds(draft.budget)
        if weights == "learned" and self.network is None:
            raise ValueError(NO_NETWORK)
        pays = pays or length != "auto"  # what is forced is drafted whatever it costs
        if not pays and not draft.lookup:
            return None
        name = weights if pays else "none"
        learned = pays and weights == "learned"
        if learned and self.network is not None:
            self.network.prepare()  # which is no part of what a draft costs
        drafting = Drafting(
            self.drafter("own" if learned or not pays else weights),
            thresholds,
            length,
            draft.lookup,
            weights=name,
            network=self.network if learned else None,
        )
        if length == "auto":
            drafting.controller = self._controller(name, draft.budget, batch)
            drafting.lookup_controller = self._controller("lookup", batch)
        return drafting

    def _controller(self, *kind: Any) -> DraftLengthController:
        return self._controllers.setdefault(kind, DraftLengthController())

    def _decode(
        self, rows: list[Row], phases: Phases, sampler: Sampler, stats: Stats
    ) -> dict[Phase, Usage]:
        """Decode, plain or skipping, until all rows have ended; returns the branches entered in
        each phase."""
        model, usage = self.skipping, self.skipping.usage
        before = usage.copy()
        cache, prefilled = prefill(model, rows, phases, sampler, stats)
        started = time.perf_counter()
        alone = len(rows) == 1 and (sampler == GREEDY or model.draws(sampler.draws))
        while alone and not rows[0].ended:
            stats.passes += self._decode_row(rows[0], cache, phases.answer, sampler)
        while live := [row for row in rows if not row.ended]:
            tokens, numbers = [[row.last] for row in live], [row.number for row in live]
            passed = (tokens, cache, numbers, [row.slot for row in live], phases.answer)
            if sampler == GREEDY:
                for row, following in zip(live, model.argmax(*passed)[0], strict=True):
                    row.commit(following)
            else:
                commit_next(model, live, model.head(model.decode(*passed)), sampler)
            stats.passes += 1
        stats.decode_s = time.perf_counter() - started
        return {"prompt": prefilled.since(before), "answer": usage.since(prefilled)}

    def _decode_row(self, row: Row, cache: Cache, limits: Limits, sampler: Sampler) -> int:
        """Commit tokens of one call until it or the row ends; returns their number."""
        before = len(row.tokens)
        count = min(IN_ONE_CALL, row.stops.limit - before)
        uniform = [row.uniform() for _ in range(count if sampler.draws is not None else 0)]
        request = SampleRequest(row.last, count, sampler.draws, uniform, on_token=row.commit_one)
        place = (cache, row.number, row.slot)
        row.state = self.skipping.sample(request, place, limits).state
        return len(row.tokens) - before

    # -- accounting ----------------------------------------------------------------------------

    def kept_of(self, usage: Usage) -> float:
        """Share of the branches' multiply-adds that was computed, of the tokens that `usage`
        counted."""
        return kept_share(self.skipping.model, usage)

    def saved(
        self,
        usage: Usage,
        budget: float,
        dense: Work | None = None,
        prompt_budget: float | None = None,
    ) -> Saving:
        """Multiply-adds saved over the tokens that `usage` counted at a budget, relative to this
        model, or to the `dense` one that it was pruned from. A gate that any of the thresholds uses
        counts for all tokens that skip anywhere."""
        skipping, gates = self.skipping, self.skipping.gates
        scaled = gates is not None and gates.scales and skipping.gated  # every gate is asked
        used = [self.thresholds(budget)]
        if prompt_budget is not None:
            used.append(self.budgets.for_prompts().at(prompt_budget))
        thresholds = [row for row in used if row is not None]
        gated = [
            scaled or any(row[branch] != NEVER_SKIP for row in thresholds)
            for branch in range(len(usage.kept))
        ]
        return saving(skipping.model, usage, gates, skipping.kv_rule, gated, dense)
