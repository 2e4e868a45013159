"""The figures that we publish, each beside one worked by hand on something tiny.

Hand-worked means that the expected number stands here as arithmetic on the sizes of the example,
not as a second call of the code under test.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

import gateskip
from compose.bench.speed.measure import SpeedTurns
from compose.bench.speed.workloads import TurnText, add_turns
from gateskip.calibration.budgets import CalibratedBudgets, half_way, with_gaps_filled
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.stats import Stats
from gateskip.gates.learned import ScalarGates
from gateskip.gates.shortcuts import Shortcuts
from gateskip.model.compute import (
    BranchCost,
    Usage,
    Work,
    attended,
    branch_costs,
    kept_share,
    saving,
)
from gateskip.quantization.folders import load_model
from gateskip.runtime.backend import Round, Verified
from gateskip.runtime.skipping import SkippingModel

# -- multiply-adds ----------------------------------------------------------------------------

# hidden 32, four heads of 16 (so queries are 64 wide), one KV head, MLP 48, two layers:
#   q and o: 2 x 32 x 64 = 4096; k and v: 2 x 32 x 16 = 1024; scores and values: 2 x 64 a position
#   MLP: 3 x 32 x 48 = 4608; LM head: 32 x 512 = 16384
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
}
ATTENTION, MLP, HEAD = 5120 + 128 * 5.5, 4608, 16384
# 10 tokens that attend to 55 positions in all; 10, 4, 7 and 1 of them enter the four branches
SEEN, CONTEXT, KEPT = 10, 55, [10, 4, 7, 1]
OWN: dict[str, Any] = {"draft_weights": "own", "draft_length": 3, "lookup": False}
DENSE = 10 * (2 * ATTENTION + 2 * MLP)  # 208640
GROSS = 0 * ATTENTION + 6 * MLP + 3 * ATTENTION + 9 * MLP  # 86592


@pytest.fixture(scope="module")
def small(make_tiny: Callable[..., Path]) -> Any:
    return load_model(make_tiny("llama", **SIZES), "float32")


def usage() -> Usage:
    return Usage(list(KEPT), SEEN, CONTEXT)


class TestComputeSaved:
    def test_what_a_token_costs(self, small: Any) -> None:
        attention, mlp = BranchCost(5120, 1024, 128), BranchCost(4608, 0, 0)
        assert branch_costs(small) == [attention, mlp, attention, mlp]
        assert Work.of(small) == Work((attention, mlp, attention, mlp), 16384)
        assert attention.at(5.5) == 5824 and mlp.at(5.5) == 4608
        assert [attention.saved(rule) for rule in ("project", "copy")] == [4096, 5120]
        assert mlp.saved("project") == mlp.saved("copy") == 4608
        assert Work.of(small).of_branches(usage()) == DENSE == 208640

    @pytest.mark.parametrize(
        ("kv_rule", "kv"),
        [
            ("project", 3 * 1024),  # the second attention makes keys and values of 3 skipped tokens
            ("copy", 0),  # and here it copies them: only the first would have to make its own
        ],
    )
    def test_keys_and_values_of_skipped_tokens(self, small: Any, kv_rule: str, kv: int) -> None:
        own = saving(small, usage(), None, kv_rule, [False] * 4)
        assert own.gross == pytest.approx(GROSS / DENSE)
        assert own.net == pytest.approx((GROSS - kv) / DENSE)
        assert own.model == pytest.approx((GROSS - kv) / (DENSE + 10 * HEAD))

    def test_a_first_attention_that_copies_still_makes_its_own(self, small: Any) -> None:
        """It has no layer below to copy from: its 2 skipped tokens pay 1024 each."""
        skipped = Usage([8, 10, 7, 10], SEEN, CONTEXT)
        own = saving(small, skipped, None, "copy", [False] * 4)
        assert own.gross * DENSE == pytest.approx(5 * ATTENTION)
        assert own.net * DENSE == pytest.approx(5 * ATTENTION - 2 * 1024)
        own = saving(small, skipped, None, "project", [False] * 4)
        assert own.net * DENSE == pytest.approx(5 * ATTENTION - 5 * 1024)

    def test_gates_and_shortcuts_are_paid(self, small: Any) -> None:
        """A gate reads 32 numbers of each of 10 tokens, at the three branches that ask it; a
        shortcut of rank 2 costs 2 x 2 x 32 for each of 0 + 6 + 3 + 9 skipped tokens."""
        gates = ScalarGates(4, 32)
        asked = [False, True, True, True]
        own = saving(small, usage(), gates, "project", asked)
        paid = 3072 + 3 * 10 * 32
        assert own.net == pytest.approx((GROSS - paid) / DENSE)
        gates.shortcuts = Shortcuts(4, 32, 2)
        own = saving(small, usage(), gates, "project", asked)
        paid += 18 * 128
        assert own.gross == pytest.approx(GROSS / DENSE)
        assert own.net == pytest.approx((GROSS - paid) / DENSE)
        assert own.model == pytest.approx((GROSS - paid) / (DENSE + 10 * HEAD))

    def test_against_a_larger_dense_model(self, small: Any) -> None:
        """Before pruning, each MLP cost 6144 and the LM head 20000."""
        before = (BranchCost(5120, 1024, 128), BranchCost(6144, 0, 0)) * 2
        dense = 10 * (2 * ATTENTION + 2 * 6144)
        own = saving(small, usage(), None, "project", [False] * 4, Work(before, 20000))
        gross = GROSS + 10 * 2 * (6144 - 4608)
        assert own.gross == pytest.approx(gross / dense)
        assert own.net == pytest.approx((gross - 3072) / dense)
        whole = (gross - 3072 + 10 * (20000 - 16384)) / (dense + 10 * 20000)
        assert own.model == pytest.approx(whole)

    def test_nothing_counted_saves_nothing(self, small: Any) -> None:
        with pytest.raises(ValueError, match=r"^no token was counted$"):
            saving(small, Usage.of(small), None, "project", [False] * 4)
        assert Usage.of(small) == Usage([0, 0, 0, 0], 0, 0)
        assert Usage.of(small).shares() == [1.0] * 4
        assert usage().shares() == [1.0, 0.4, 0.7, 0.1]
        full = usage()
        full.clear()
        assert full == Usage.of(small)

    def test_a_count_of_other_branches_is_refused(self, small: Any) -> None:
        for kept in ([10, 4, 7], [10, 4, 7, 1, 1]):
            with pytest.raises(ValueError, match="zip"):
                saving(small, Usage(kept, SEEN, CONTEXT), None, "project", [False] * 4)
            with pytest.raises(ValueError, match="zip"):
                kept_share(small, Usage(kept, SEEN, CONTEXT))

    def test_the_share_that_entered(self, small: Any) -> None:
        entered = (10 + 7) * ATTENTION + (4 + 1) * MLP
        assert kept_share(small, usage()) == pytest.approx(entered / DENSE)
        with pytest.raises(ValueError, match=r"^no token was counted$"):
            kept_share(small, Usage.of(small))

    def test_windows_by_hand(self) -> None:
        """Positions 2 to 6 see 3 + 4 + 5 + 6 + 7 slots, in a window of 4: 3 + 4 + 4 + 4 + 4."""
        assert attended(2, 5, None) == 25 and attended(2, 5, 4) == 19
        assert attended(0, 3, 4) == 6 and attended(9, 2, 4) == 8 and attended(0, 4, 4) == 10
        assert BranchCost(100, 0, 2, 4).over(6) == pytest.approx(100 + 2 * 18 / 6)
        assert BranchCost(100, 0, 2).over(6) == pytest.approx(100 + 2 * 21 / 6)
        used = Usage([0], windowed={4: 0})
        used.saw(2, 5)
        used.saw(0)
        assert (used.seen, used.context, used.windowed) == (6, 26, {4: 20})
        assert used.mean_context(None) == pytest.approx(26 / 6)
        assert used.mean_context(4) == pytest.approx(20 / 6)
        dense = Work((BranchCost(100, 0, 2, 4), BranchCost(50, 0, 3)), 7)
        assert dense.of_branches(used) == pytest.approx(6 * 150 + 2 * 20 + 3 * 26)
        used.clear()
        assert used == Usage([0], 0, 0, {4: 0})

    @pytest.mark.parametrize(("kv_rule", "kv"), [("project", 7 * 1024), ("copy", 0)])
    @pytest.mark.parametrize("backend", ["gathered", "reference"])
    def test_decoding_counts_what_it_skips(
        self, small: Any, kv_rule: str, kv: int, backend: Any
    ) -> None:
        """A prompt of 5 and 4 new tokens: 8 are read, the last one is not. The third branch, an
        attention, is closed to all but the first token: 7 skip it, having attended to 36 of 36."""
        gates = ScalarGates(4, 32).requires_grad_(False)
        grid = {0.5: [-math.inf, -math.inf, math.inf, -math.inf]}
        decoder = Decoder(
            SkippingModel(small, gates, kv_rule, backend), None, CalibratedBudgets(grid)
        )
        decoder.generate([[5, 6, 7, 8, 9]], 4, "skip", budget=0.5)
        counted = decoder.skipping.usage
        assert (counted.seen, counted.context, counted.kept) == (8, 36, [8, 8, 1, 8])
        own = decoder.saved(counted, 0.5)
        attention = 5120 + 128 * 36 / 8
        dense = 8 * 2 * (attention + MLP)
        assert own.gross == pytest.approx(7 * attention / dense)
        assert own.net == pytest.approx((7 * attention - kv - 8 * 32) / dense)
        assert own.model == pytest.approx((7 * attention - kv - 8 * 32) / (dense + 8 * HEAD))


# -- thresholds between calibrated budgets ----------------------------------------------------


class TestThresholds:
    GRID: ClassVar = {0.9: [0.0, -4.0], 0.8: [2.0, 10.0]}

    def test_a_quarter_of_the_way(self) -> None:
        """0.825 is a quarter of the way from 0.8 to 0.9: 2 - 0.5 and 10 - 3.5."""
        assert CalibratedBudgets(self.GRID).at(0.825) == pytest.approx([1.5, 6.5])

    def test_nine_tenths_of_the_way(self) -> None:
        assert CalibratedBudgets(self.GRID).at(0.89) == pytest.approx([0.2, -2.6])

    def test_between_three_the_nearest_two_count(self) -> None:
        budgets = CalibratedBudgets(self.GRID | {0.84: [0.8, 8.0]})
        assert budgets.at(0.81) == pytest.approx([1.7, 9.5])
        assert budgets.at(0.855) == pytest.approx([0.6, 5.0])

    def test_calibrated_ones_are_taken_as_they_are(self) -> None:
        budgets = CalibratedBudgets(self.GRID)
        for budget in (0.8, 0.9):
            for near in (budget, budget - 1e-12, budget + 1e-12):
                assert budgets.at(near) == self.GRID[budget]
        assert budgets.at(1.0) is None

    def test_an_end_that_is_not_finite_keeps_the_safer_one(self) -> None:
        grid = {0.8: [math.inf, 3.0, math.inf, 5.0], 0.9: [1.0, -math.inf, math.inf, 1.0]}
        assert CalibratedBudgets(grid).at(0.825) == pytest.approx([1.0, -math.inf, math.inf, 4.0])

    def test_gaps_that_calibration_fills(self) -> None:
        """No gap above 0.1, and 0.97 at the top unless 0.96 or more is asked for."""
        assert with_gaps_filled([0.5, 0.95]) == [0.5, 0.59, 0.68, 0.77, 0.86, 0.95, 0.97]
        assert with_gaps_filled([0.8]) == [0.8, 0.885, 0.97]
        assert with_gaps_filled([0.965, 0.9, 1.0]) == [0.9, 0.965]
        assert with_gaps_filled([0.97 - 0.02 / 2]) == [0.97 - 0.02 / 2]
        assert with_gaps_filled([0.7, 0.96]) == [0.7, 0.787, 0.873, 0.96]
        assert with_gaps_filled([0.8, 0.9, 0.8]) == [0.8, 0.9, 0.97]
        assert with_gaps_filled([1.0]) == with_gaps_filled([]) == []

    def test_half_way(self) -> None:
        assert half_way(0.8, 0.9) == 0.85 and half_way(0.1, 0.10005) == 0.1
        with pytest.raises(ValueError, match="zip"):
            CalibratedBudgets({0.8: [1.0], 0.9: [1.0, 2.0]}).at(0.85)

    def test_what_a_budget_keeps(self) -> None:
        """Between 0.6 (0.61 kept), 0.65 (0.64) and 0.7 (0.69): linear from one to the next."""
        budgets = CalibratedBudgets({0.6: [2.0], 0.7: [1.0]}, {0.6: 0.61, 0.7: 0.69}, {0.65: 0.64})
        assert budgets.kept_at(0.6) == 0.61 and budgets.kept_at(1.0) == 1.0
        assert budgets.kept_at(0.62) == pytest.approx(0.622)  # two fifths of the way to 0.64
        assert budgets.kept_at(0.69) == pytest.approx(0.68)  # four fifths of the way to 0.69


# -- acceptance, and tokens a pass ------------------------------------------------------------


class TestSpeculation:
    def test_a_round_of_four_rows(self) -> None:
        """Drafts of 4, 2, 3 and 0 tokens, of which 4, 0, 1 and 0 are accepted."""
        stats = Stats()
        rows = [Verified(4, 4), Verified(2, 0), Verified(3, 1, looked_up=True), Verified(0, 0)]
        stats.add_round(Round(rows, draft_s=0.5, verify_s=0.25))
        assert (stats.drafted, stats.accepted, stats.passes, stats.looked_up) == (9, 5, 4, 3)
        assert stats.acceptance_rate == pytest.approx(5 / 9)
        assert stats.mean_accepted_tokens == pytest.approx(9 / 4)  # a pass adds one of its own
        assert stats.draft_lengths == {4: 1, 2: 1, 3: 1, 0: 1}
        # first: 3 drafts reached it, 2 stood; second: reached by 2 (4 and 3 long), 1 stood; ...
        assert stats.positions == [[3, 2], [2, 1], [1, 1], [1, 1]]
        assert (stats.draft_s, stats.verify_s) == (0.5, 0.25)

    def test_plain_steps_are_passes(self) -> None:
        stats = Stats()
        stats.add_round(Round([Verified(0, 0)], 0.0, 0.5, steps=5))
        assert (stats.passes, stats.draft_lengths, stats.drafted) == (5, {0: 5}, 0)

    def test_calls_add_up(self) -> None:
        drafts = ({2: 2, 0: 1}, "int4", 1, [[2, 1], [1, 1]])
        first = Stats(10, 5, 1.0, 2.0, 0.75, 4, 2, 3, 0.25, 0.5, *drafts)
        drafts = ({3: 1, 2: 1}, "int4", 2, [[2, 2]])
        other = Stats(20, 7, 0.5, 4.0, 0.25, 6, 5, 2, 0.75, 1.5, *drafts)
        first.add(other)
        assert first == Stats(
            *(30, 12, 1.5, 6.0, 0.75, 10, 7, 5, 1.0, 2.0),
            {2: 3, 0: 1, 3: 1},
            "int4",
            3,
            [[4, 3], [1, 1]],
        )
        assert first.acceptance_rate == pytest.approx(0.7)
        assert first.mean_accepted_tokens == pytest.approx(12 / 5)
        record = first.to_dict()
        assert record["acceptance_rate"] == pytest.approx(0.7)
        assert record["mean_accepted_tokens"] == pytest.approx(2.4)
        assert record["positions"] == [[4, 3], [1, 1]] and record["new_tokens"] == 12

    def test_without_drafts_there_is_no_rate(self) -> None:
        assert Stats().acceptance_rate is None and Stats().mean_accepted_tokens is None
        plain = Stats(passes=3)
        assert plain.acceptance_rate is None and plain.mean_accepted_tokens == 1.0

    def test_a_call_counts_its_rounds(self, tiny_llama: Path) -> None:
        """Drafts that are the model itself, 3 long: 1 token out of prefill, then passes of 4, and
        a last one that may draft no more than what is left."""
        decoder = gateskip.load(tiny_llama, backend="reference")
        made = decoder.generate([[5, 6, 7]], 11, "speculate", **OWN)
        stats = made.stats
        assert len(made.tokens[0]) == stats.new_tokens == 11 and stats.prompt_tokens == 3
        assert stats.draft_lengths == {3: 2, 1: 1}  # 1 + 4 + 4 + 2
        assert (stats.drafted, stats.accepted, stats.passes) == (7, 7, 3)
        assert stats.acceptance_rate == 1.0 and stats.mean_accepted_tokens == pytest.approx(10 / 3)
        assert stats.positions == [[3, 3], [2, 2], [2, 2]]


# -- tokens a second --------------------------------------------------------------------------


class TestSpeed:
    """A real model under a clock that is set by hand."""

    def turns(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, mode: Any, clock: Any, **wanted: Any
    ) -> dict[str, Any]:
        """What a turn of two prompts of six tokens is measured at."""
        decoder = gateskip.load(folder, backend="reference")
        for module in ("decoder", "prefill", "speculation"):
            timer = SimpleNamespace(perf_counter=clock)
            monkeypatch.setattr(f"gateskip.decoding.{module}.time", timer)
        rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]][: wanted.get("rows", 2)]
        times = wanted["times"]
        monkeypatch.setattr("compose.bench.speed.workloads.rows_of", lambda *of: [rows] * times)
        settings = {} if mode == "plain" else OWN
        speed = SpeedTurns(decoder, mode, settings, lambda usage: None, wanted, None, Path())  # type: ignore[arg-type,return-value]
        return speed.measure(TurnText(len(rows), 6, "", 0))

    def test_the_first_tokens_belong_to_prefill(
        self, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
    ) -> None:
        """Of 5 new tokens a row, 4 are decoded: 8 in 2 s. Prefill: 12 tokens in half a second."""
        clock = iter([10.0, 10.5, 11.0, 13.0]).__next__
        turn = self.turns(monkeypatch, tiny_llama, "plain", clock, new_tokens=5, times=1)
        assert (turn["tokens"], turn["decode_s"]) == (8, 2.0)
        assert (turn["prompt_tokens"], turn["prefill_s"], turn["ttft_s"]) == (12, 0.5, 0.5)
        repeat = add_turns([turn])
        assert repeat["decode_tokens_per_s"] == 4.0
        assert repeat["prefill_tokens_per_s"] == 24.0
        assert repeat["ttft_s"] == 0.5

    def test_batches_of_a_turn_add_up(
        self, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
    ) -> None:
        """Two calls: 16 tokens in 2 + 6 s, 24 prompt tokens in 1 + 3 s; first tokens 1 and 3 s."""
        clock = iter([0.0, 1.0, 1.0, 3.0, 5.0, 8.0, 8.0, 14.0]).__next__
        turn = self.turns(monkeypatch, tiny_llama, "plain", clock, new_tokens=5, times=2)
        repeat = add_turns([turn])
        assert repeat["decode_tokens_per_s"] == 2.0 and repeat["prefill_tokens_per_s"] == 6.0
        assert turn["ttft_s"] == 2.0

    def test_one_new_token_is_no_decoding(
        self, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
    ) -> None:
        clock = iter([0.0, 1.0, 1.0, 1.5]).__next__
        turn = self.turns(monkeypatch, tiny_llama, "plain", clock, new_tokens=1, times=1)
        assert turn["tokens"] == 0
        assert add_turns([turn])["decode_tokens_per_s"] is None

    def test_speculation_is_timed_alike(
        self, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
    ) -> None:
        """A clock that ticks half a second each time it is read. One row of 11 tokens in three
        rounds: it is read at the start, thrice a round and at the end, so decoding lasts 10 ticks.
        """
        ticks = itertools.count()
        turn = self.turns(
            *(monkeypatch, tiny_llama, "speculate", lambda: next(ticks) / 2),
            **{"new_tokens": 11, "times": 1, "rows": 1},
        )
        assert add_turns([turn])["decode_tokens_per_s"] == pytest.approx(10 / 5)
        counts = turn["speculation"]
        assert (counts["draft_s"], counts["verify_s"]) == (1.5, 1.5)
        assert counts["draft_length_histogram"] == {"3": 2, "1": 1}
        assert (counts["drafted"], counts["accepted"], counts["passes"]) == (7, 7, 3)
        assert counts["positions"] == [[3, 3], [2, 2], [2, 2]]

    def test_turns_are_added_before_they_are_divided(self) -> None:
        """10 tokens in 1 s and 10 in 4 s are 4 a second, not the mean of 10 and 2.5."""
        empty = {"prompt_tokens": 0, "prefill_s": 0.0, "ttft_s": 0.0}
        one = empty | {"tokens": 10, "decode_s": 1.0}
        other = empty | {"tokens": 10, "decode_s": 4.0, "ttft_s": 3.0}
        repeat = add_turns([one, other])
        assert repeat["decode_tokens_per_s"] == 4.0 and repeat["turns"] == 2
        assert repeat["prefill_tokens_per_s"] is None and repeat["ttft_s"] == 1.5
