"""Decoders share one method, so what holds for one is asked of all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drafts import SKIPPING
from tiny_models import save_gated

import gateskip
from compose.bench.quality.lossless import check_lossless
from gateskip.checkpoint import load_gates, save_gates
from gateskip.decoding.config import DraftConfig, SkipConfig
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.draft_length import DraftLengthController
from gateskip.decoding.rows import Lookup
from gateskip.decoding.sampling import Sampler
from gateskip.gates.kinds import make_gates
from gateskip.kernels import ops
from gateskip.quantization.folders import load_model
from gateskip.runtime.skipping import SkippingModel

native = pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here")

BUDGETS = (0.8, 0.5)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma2"])
def folder(
    request: pytest.FixtureRequest,
    make_tiny: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A tiny model with warm-started, calibrated gates."""
    target = tmp_path_factory.mktemp("gated") / request.param
    return save_gated(make_tiny(request.param), target, BUDGETS)


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return gateskip.load(folder)


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(3, 30, (count,), generator=generator).tolist()
    return [torch.randint(3, 512, (size,), generator=generator).tolist() for size in sizes]


def test_plain_is_transformers_greedy(decoder: Decoder, folder: Path) -> None:
    model = load_model(folder)
    for prompt in prompts(4):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert decoder.generate([prompt], 24).tokens == [theirs[0, len(prompt) :].tolist()]


@pytest.mark.parametrize("length", [1, 3, 8, 16, "auto"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_speculation_is_lossless(decoder: Decoder, length: Any, budget: float) -> None:
    for prompt in prompts(4):
        plain = decoder.generate([prompt], 40)
        settings = SKIPPING | {"draft_budget": budget, "draft_length": length}
        own = decoder.generate([prompt], 40, "speculate", **settings)
        assert own.tokens == plain.tokens
        assert own.stats.passes + own.stats.accepted >= 39
        if length != "auto":
            assert own.stats.drafted > 0


def test_two_meanings_of_full_compute(make_tiny: Callable[..., Path]) -> None:
    """Gates that scale change the model; at full compute it can be asked for without them."""
    folder = make_tiny("llama")
    dense, model = gateskip.load(folder), load_model(folder, "float32")
    gates = make_gates("vector", 8, 64, scales=True).requires_grad_(False)
    for part in gates.parameters():
        part.normal_(generator=torch.Generator().manual_seed(1))
    decoder = Decoder(SkippingModel(model, gates), dense.tokenizer, {0.5: [0.5] * 8})
    texts = {}
    for target in ("gated", "original"):
        plain = decoder.generate(prompts(3), 24, target=target).tokens
        own = decoder.generate(
            prompts(3), 24, "speculate", draft_length=3, target=target, **SKIPPING
        )
        assert own.tokens == plain and own.stats.drafted
        texts[target] = plain
    assert texts["original"] == dense.generate(prompts(3), 24).tokens != texts["gated"]
    with pytest.raises(ValueError, match="gated or original"):
        decoder.generate(prompts(1), target="both")  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", ["own", "int4-head", "nf4", "int4"])
@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("length", [4, "auto"])
@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_every_kind_of_draft_is_lossless(
    decoder: Decoder, weights: Any, lookup: bool, length: Any, budget: float
) -> None:
    settings: dict[str, Any] = {"draft_weights": weights, "lookup": lookup, "draft_length": length}
    rows = [*prompts(2), [5, 6, 7, 8, 9] * 5]
    plain = decoder.generate(rows, 32)
    own = decoder.generate(rows, 32, "speculate", draft_budget=budget, **settings)
    assert own.tokens == plain.tokens
    if length == 4 and budget == 1.0 and weights == "own":
        assert own.stats.accepted > 0
    reached, stood = zip(*own.stats.positions, strict=True) if own.stats.positions else ((), ())
    assert sum(stood) == own.stats.accepted and list(reached) == sorted(reached, reverse=True)


@pytest.mark.parametrize("honest", [True, False])
def test_what_is_looked_up_is_verified(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, honest: bool
) -> None:
    (prompt,) = prompts(1)
    plain = decoder.generate([prompt], 25).tokens[0]

    def proposed(_: Lookup, text: list[int], count: int) -> list[int]:
        following = plain[len(text) - len(prompt) :][:count]
        return following if honest else [7 for _ in following]

    monkeypatch.setattr(Lookup, "propose", proposed)
    own = decoder.generate([prompt], 25, "speculate", draft_weights="own", draft_length=4)
    assert own.tokens == [plain]
    assert own.stats.looked_up == own.stats.drafted > 0
    assert (own.stats.accepted == own.stats.drafted) == honest


def test_rows_speculate_side_by_side(decoder: Decoder) -> None:
    rows = prompts(8)
    settings = SKIPPING | {"draft_length": 3}
    together = decoder.generate(rows, 24, "speculate", **settings)
    alone = [decoder.generate([row], 24, "speculate", **settings).tokens[0] for row in rows]
    assert together.tokens == alone


SAMPLER = Sampler(temperature=0.8, top_k=20, top_p=0.95)


@pytest.mark.parametrize("mode", ["plain", "skip", "speculate"])
def test_a_seed_gives_the_same_text(decoder: Decoder, mode: Any) -> None:
    def text(seed: int) -> list[list[int]]:
        return decoder.generate(
            prompts(2), 24, mode, draft_length=3, sampler=SAMPLER, seed=seed, **SKIPPING
        ).tokens

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_penalties_hold_in_speculation_too(decoder: Decoder) -> None:
    penalty = Sampler(repetition_penalty=1.8)
    for prompt in prompts(3):
        plain = decoder.generate([prompt], 32, sampler=penalty)
        assert plain.tokens != decoder.generate([prompt], 32).tokens
        own = decoder.generate(
            [prompt], 32, "speculate", draft_length=4, sampler=penalty, **SKIPPING
        )
        assert own.tokens == plain.tokens


@pytest.mark.parametrize("mode", ["plain", "speculate"])
def test_a_stop_string_ends_the_row(decoder: Decoder, mode: Any) -> None:
    (prompt,) = prompts(1)
    whole = decoder.generate([prompt], 24).tokens[0]
    stop = decoder.tokenizer.decode(whole[6:8])
    found = decoder.generate([prompt], 24, mode, stop=[stop], **SKIPPING).tokens[0]
    assert found == whole[: len(found)] and len(found) <= 8
    assert stop in decoder.tokenizer.decode(found)


def test_what_was_said_before_is_looked_up() -> None:
    assert Lookup().propose([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert Lookup().propose([7, 2, 3, 9, 8, 1, 2, 3], 3) == [9, 8, 1], "two tokens are enough"
    assert Lookup().propose([1, 2, 3, 4], 2) == [] == Lookup().propose([1, 1, 1, 1], 0)


@pytest.mark.parametrize("step", [1, 4])
def test_a_growing_text_is_looked_up_as_if_searched(step: int) -> None:
    """What the last earlier occurrence of three tokens, else of two, was followed by."""
    text = torch.randint(0, 4, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    lookup, hits = Lookup(), 0
    for length in range(1, len(text) + 1, step):
        own, wanted = text[:length], list[int]()
        for n in (2, 3):
            for start in range(length - n):
                if own[start : start + n] == own[-n:]:
                    wanted = own[start + n : start + n + 5]
        assert lookup.propose(own, 5) == wanted
        hits += bool(wanted)
    assert hits > 10


def test_a_useless_draft_is_lossless_too(decoder: Decoder) -> None:
    shut = {0.5: [float("inf")] * len(decoder.skipping.branches)}
    useless = Decoder(decoder.skipping, decoder.tokenizer, shut)
    for prompt in prompts(3):
        own = useless.generate([prompt], 32, "speculate", draft_length=4, **SKIPPING)
        assert own.tokens == decoder.generate([prompt], 32).tokens
        assert own.stats.acceptance_rate is not None and own.stats.acceptance_rate < 0.5


def test_drafts_verified_at_a_budget_are_checked_against_skipping(decoder: Decoder) -> None:
    settings = {"draft_weights": "int4", "draft_budget": 0.8, "verify_budget": 0.8}
    settings |= {"lookup": True, "target": "gated", "draft_length": "auto"}
    checked = check_lossless(decoder, settings, prompts(4), 16)
    assert checked["lossless"] and checked["acceptance_rate"] > 0
    skipped = decoder.generate(prompts(4), 16, "skip", 0.8).tokens
    assert skipped != decoder.generate(prompts(4), 16).tokens
    generate = decoder.generate

    def other(*asked: Any, **given: Any) -> Any:
        return generate(*asked, **given | ({"budget": 0.5} if given.get("mode") == "skip" else {}))

    with pytest.MonkeyPatch.context() as patch:  # another text to compare with
        patch.setattr(decoder, "generate", other)
        wrong = check_lossless(decoder, settings, prompts(4), 16)
    assert not wrong["lossless"] and wrong["first_divergence"]["margin"] >= 0


def test_a_wrong_verifier_is_noticed(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losslessness tests can fail: accepting every draft changes the text of a batch."""
    monkeypatch.setattr(
        "gateskip.decoding.speculation.accept_or_resample",
        lambda draft, drawn, wanted, generator: (len(draft), list(wanted)[-1]),
    )
    shut = {0.5: [float("inf")] * len(decoder.skipping.branches)}
    careless = Decoder(decoder.skipping, decoder.tokenizer, shut)
    rows = prompts(4)
    own = careless.generate(rows, 32, "speculate", draft_length=4, **SKIPPING)
    assert own.tokens != decoder.generate(rows, 32).tokens


@native
def test_a_wrong_verifier_of_one_row_is_noticed(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a native pass that skips go unnoticed."""
    shut, real = torch.full((len(decoder.skipping.branches),), float("inf")), ops.speculate

    def skips(model: Any, cache: Any, step: Any, *others: Any) -> None:
        step.thresholds = shut.data_ptr()
        real(model, cache, step, *others)

    plain = [decoder.generate([p], 32).tokens for p in prompts(4)]
    monkeypatch.setattr(ops, "speculate", skips)
    assert plain != [decoder.generate([p], 32, "speculate", **SKIPPING).tokens for p in prompts(4)]


@pytest.mark.parametrize("mode", ["plain", "skip"])
def test_a_batch_gives_each_row_its_own_text(decoder: Decoder, mode: Any) -> None:
    rows = prompts(8)
    together = decoder.generate(rows, 24, mode, budget=0.8).tokens
    assert together == [decoder.generate([row], 24, mode, budget=0.8).tokens[0] for row in rows]


@pytest.mark.parametrize("mode", ["plain", "skip", "speculate"])
def test_an_ending_token_ends_its_row_alone(decoder: Decoder, mode: Any) -> None:
    rows = prompts(3)
    free = decoder.generate(rows, 24, mode, draft_length=3, **SKIPPING).tokens
    end = free[0][5]
    seen: list[tuple[int, int]] = []
    cut = decoder.generate(
        rows,
        24,
        mode,
        draft_length=3,
        eos=[end],
        on_token=lambda r, t: seen.append((r, t)),
        **SKIPPING,
    ).tokens
    for row, (whole, short) in enumerate(zip(free, cut, strict=True)):
        expected = whole[: whole.index(end) + 1] if end in whole else whole
        assert short == expected == [token for r, token in seen if r == row]


def test_skipping_really_skips(decoder: Decoder) -> None:
    usage = decoder.skipping.usage
    usage.clear()
    decoder.generate(prompts(1), 24, "skip", budget=0.5)
    saved = decoder.saved(usage, 0.5)
    assert 0.2 < saved.gross < 0.8
    assert saved.model < saved.net < saved.gross


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "at least one token"),
        ({"prompts": [[]]}, "at least one token"),
        ({"prompts": [[5]], "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompts": [[5]], "mode": "speculate", "draft_length": 17}, "draft_length"),
        ({"prompts": [[5]], "mode": "skip", "budget": 0.1}, "lowest is 0.5"),
        ({"prompts": [[5]], "mode": "fast"}, "plain, skip, speculate"),
    ],
)
def test_mistakes_are_named(decoder: Decoder, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder.generate(**arguments)


@pytest.mark.parametrize(
    ("mode", "keywords", "groups"),
    [
        ("skip", {"budget": 0.5}, {"skip": SkipConfig(budget=0.5)}),
        (
            "skip",
            {"budget": 0.5, "prompt": "full", "hold": True},
            {"skip": SkipConfig(budget=0.5, prompt="full", hold=True)},
        ),
        (
            "speculate",
            {"draft_length": 3, "lookup": False, **SKIPPING},
            {"draft": DraftConfig(length=3, lookup=False, budget=0.5, weights="own")},
        ),
        (
            "speculate",
            {"verify_budget": 0.8, "draft_length": 4, "prompt": "full", **SKIPPING},
            {
                "draft": DraftConfig(
                    verify_budget=0.8, length=4, budget=0.5, weights="own", lookup=False
                ),
                "skip": SkipConfig(prompt="full"),
            },
        ),
    ],
)
def test_settings_one_by_one_and_in_groups_are_the_same(
    decoder: Decoder, mode: Any, keywords: dict[str, Any], groups: dict[str, Any]
) -> None:
    wanted = decoder.generate(prompts(2), 16, mode, **keywords)
    written = decoder.generate(prompts(2), 16, mode, **groups)
    assert written.tokens == wanted.tokens
    if mode == "speculate":  # the drafts were the same, not only what they come to
        assert written.stats.drafted == wanted.stats.drafted > 0
    else:
        assert written.usage == wanted.usage
    both = decoder.generate(prompts(2), 16, mode, **groups, **keywords)
    assert both.tokens == wanted.tokens, "what is said twice is no contradiction"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"skip": SkipConfig(budget=0.5), "budget": 0.8},
            ValueError,
            "budget=0.8 contradicts skip=SkipConfig.*give one of them",
        ),
        (
            {"draft": DraftConfig(), "draft_weights": "own"},
            ValueError,
            "draft_weights='own' contradicts draft=DraftConfig",
        ),
        ({"drafts": 3}, TypeError, "unexpected keyword argument 'drafts'"),
    ],
)
def test_contradicting_settings_are_named(
    decoder: Decoder, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        decoder.generate(prompts(1), 4, "skip", **given)


def test_a_model_without_gates_cannot_skip(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="no gates"):
        gateskip.load(tiny_llama).generate([[5]], 4, "skip")


def test_gates_survive_the_disk(folder: Path, tmp_path: Path) -> None:
    first = load_gates(folder)
    assert first is not None
    save_gates(tmp_path, first)
    second = load_gates(tmp_path)
    assert second is not None and second.grid == first.grid and second.kv_rule == first.kv_rule
    assert torch.equal(second.gates.weight, first.gates.weight)


class TestDraftLengthController:
    """The draft length follows what drafting is measured to cost and to bring."""

    def run(self, draft_s: float, row_s: float, accepts: float, rounds: int = 300) -> list[int]:
        controller, tried, generator = DraftLengthController(), [], torch.Generator().manual_seed(0)
        for _ in range(rounds):
            k = controller.draft_length()
            tried.append(k)
            hits = torch.rand(k, generator=generator) < accepts
            accepted = int(hits.long().cumprod(0).sum())
            controller.observe(k, [accepted] if k else [], k * draft_s, 1.0 + k * row_s)
        return tried

    def test_cheap_good_drafts_are_long(self) -> None:
        assert sum(self.run(0.1, 0.02, 0.95)[-50:]) / 50 > 5

    def test_dear_drafts_are_given_up(self) -> None:
        tried = self.run(0.9, 0.3, 0.5)
        assert tried[-50:].count(0) > 40
        assert any(tried[20:]), "speculation is tried again later"

    def test_plain_steps_in_one_call_bring_the_next_trial_when_single_ones_would(self) -> None:
        """Until then nobody asks for the draft length; a timed step is a part of its call."""
        one, many, trials = DraftLengthController(), DraftLengthController(), []
        for controller in (one, many):
            steps, at = 0, []
            while steps < 600:
                k, drafts = controller.draft_length(), controller.drafts()
                assert k == 0 or drafts == DraftLengthController.TRIED
                count = min(32, controller.rounds()) if controller is many else 1
                at += [steps] * k
                steps += 1 if k else count
                controller.observe(k, [0] if k else [], 0.9 * k, 1.3 if k else 1.0 * count, count)
            trials.append(at)
            assert controller.plain == pytest.approx(1.0)
        assert len(trials[0]) == len(trials[1]) > 2
        for a, b in zip(*trials, strict=True):  # the first steps are timed together
            assert abs(a - b) <= DraftLengthController.TIMED

    def test_a_machine_that_changes_is_noticed(self) -> None:
        """Drafts that paid while plain steps were slow stop when those are fast again."""
        controller = DraftLengthController()
        for _ in range(100):
            k = controller.draft_length()
            controller.observe(k, [k] if k else [], k * 0.3, 1.0)
        assert k > 0
        tried = []
        for _ in range(200):
            k = controller.draft_length()
            tried.append(k)
            controller.observe(k, [k // 2] if k else [], k * 0.3, 0.3)
        assert tried[-50:].count(0) > 40

    @pytest.mark.parametrize(
        ("draft_s", "row_s", "accepts"), [(0.6, 0.1, 0.3), (0.6, 0.1, 0.6), (0.8, 0.3, 0.5)]
    )
    def test_finding_out_that_drafts_do_not_pay_is_cheap(
        self, draft_s: float, row_s: float, accepts: float
    ) -> None:
        """Of 32 tokens, the first that a decoder ever writes, trials may lose 2 %. Mean of ten."""
        speeds = []
        for seed in range(10):
            controller, generator = DraftLengthController(), torch.Generator().manual_seed(seed)
            seconds = tokens = 0.0
            while tokens < 32:
                k = controller.draft_length()
                hits = torch.rand(k, generator=generator) < accepts
                accepted = int(hits.long().cumprod(0).sum())
                noise = 1 + 0.05 * float(torch.randn((), generator=generator).clamp(-2, 2))
                drafting, verifying = k * draft_s * noise, (1 + k * row_s) * noise
                controller.observe(k, [accepted] if k else [], drafting, verifying)
                seconds, tokens = seconds + drafting + verifying, tokens + accepted + 1
            speeds.append(tokens / seconds)
        assert sum(speeds) / 10 > 0.98, "plain decoding has one token a second"

    def test_useless_drafts_are_given_up(self) -> None:
        assert self.run(0.3, 0.02, 0.0)[-50:].count(0) > 40
