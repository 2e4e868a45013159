"""Draft lengths, rounding, losses and samplers beside numbers that were worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gateskip.decoding.draft_length import DraftLengthController
from gateskip.decoding.sampling import GREEDY, Sampler, accept_or_resample, draw
from gateskip.quantization.rounding import GROUP, USUAL_CUTS, round_to_grid
from gateskip.training import objectives


def measured(
    acceptance: float, plain: float = 1.0, draft_step: float = 0.1, per_row: float = 0.05
) -> DraftLengthController:
    """A controller that has timed all it asks for."""
    controller = DraftLengthController()
    controller.acceptance, controller.plain = acceptance, plain
    controller.draft_step, controller.per_row = draft_step, per_row
    return controller


class TestDraftLength:
    def test_tokens_a_second(self) -> None:
        """Two drafts accepted half the time: 1 + 0.5 + 0.25 tokens in 1 + 2 x 0.15 seconds."""
        controller = measured(0.5)
        assert controller._tokens_per_s(0) == 1.0
        assert controller._tokens_per_s(1) == pytest.approx(1.5 / 1.15)
        assert controller._tokens_per_s(2) == pytest.approx(1.75 / 1.3)
        assert controller._tokens_per_s(3) == pytest.approx(1.875 / 1.45)
        assert controller.draft_length() == 2

    def test_never_surer_than_99_in_100(self) -> None:
        controller = measured(1.0, plain=2.0)
        assert controller._tokens_per_s(0) == 0.5
        assert controller._tokens_per_s(2) == pytest.approx((1 + 0.99 + 0.99**2) / 2.3)
        assert controller.draft_length() == 8, "the longest that there is"

    def test_first_a_plain_step_then_a_trial(self) -> None:
        controller = DraftLengthController()
        assert controller.draft_length() == 0
        controller.observe(0, [], 0.0, 1.0)
        assert controller.draft_length() == 1
        controller.observe(1, [1], 0.1, 1.05)
        # acceptance 0.6 -> 0.64; 0.1 and 0.05 seconds a draft
        assert controller.acceptance == pytest.approx(0.64)
        assert controller.draft_step == pytest.approx(0.1)
        assert controller.per_row == pytest.approx(0.05)
        assert controller.draft_length() == 3  # 2.312 tokens in 1.45 s; a fourth: 2.479 in 1.6

    def test_a_first_trial_that_took_too_long_is_made_good_by_the_second(self) -> None:
        controller = DraftLengthController()
        controller.observe(0, [], 0.0, 1.0)
        controller.observe(controller.draft_length(), [1], 5.0, 9.0)
        lengths = []
        for _ in range(34):
            lengths.append(controller.draft_length())
            n = lengths[-1]
            controller.observe(n, [n] if n else [], 0.1 * n, 1 + 0.05 * n)
        assert lengths[:32] == [0] * 31 + [1] and min(lengths[32:]) > 1

    def test_plain_steps_are_timed_again_after_48_rounds(self) -> None:
        controller = measured(0.9)
        lengths = []
        for _ in range(98):
            lengths.append(controller.draft_length())
            n = lengths[-1]
            controller.observe(n, [n] if n else [], 0.1 * n, 1 + 0.05 * n)
        assert [i for i, n in enumerate(lengths) if n == 0] == [48, 97]

    def test_pauses_grow_while_drafts_do_not_pay(self) -> None:
        """After 31 plain steps a trial, then after 63, and so on to 511; drafts that pay end it."""
        controller = measured(0.1, draft_step=1.0)

        def length() -> int:
            controller.waited()
            return controller.draft_length()

        assert controller.draft_length() == 0
        for zeros in (30, 63, 127, 255, 511, 511):
            assert [length() for _ in range(zeros + 1)] == [0] * zeros + [1]
            controller.observe(1, [0], 1.0, 1.05)
        controller.draft_step, controller.acceptance = 0.01, 0.9
        assert controller.draft_length() == 8
        controller.draft_step, controller.acceptance = 1.0, 0.1
        assert [length() for _ in range(32)] == [0] * 31 + [1]

    def test_a_trial_waits_until_something_is_proposed(self) -> None:
        """A text that proposes nothing says nothing of look-up: no longer pause follows."""
        controller = measured(0.1, draft_step=1.0)
        controller.draft_length()
        controller.waited(controller.PAUSE - 1)
        for _ in range(3):
            assert (controller.draft_length(), controller.drafts()) == (1, controller.TRIED)
            for _ in range(controller.TRIED):
                controller.observe(0, [], 0.0, 1.0)
        controller.observe(1, [0], 1.0, 1.05)
        assert controller.draft_length() == 0 and controller.rounds() == 2 * controller.PAUSE - 1

    def test_the_first_round_of_a_trial_may_be_slow(self) -> None:
        """After a pause it finds nothing in the caches; those after it say what drafting costs."""
        controller = DraftLengthController()
        controller.observe(0, [], 0.0, 1.0)
        assert controller.draft_length() == 1
        for slow in (1.0, *[0.0] * (controller.drafts() - 1)):
            controller.observe(1, [0], 0.05 + slow, 1.05 + slow)
        assert controller.draft_step == pytest.approx(0.05) == controller.per_row
        assert controller.draft_length() == 2, "at an acceptance of 0.39"

    def test_a_gain_of_less_than_two_percent_is_none(self) -> None:
        """One draft at 0.5: 1.5 tokens in 1 + cost; two percent are gained at 1.4706."""
        assert measured(0.5, draft_step=0.46, per_row=0.0).draft_length() == 1
        assert measured(0.5, draft_step=0.48, per_row=0.0).draft_length() == 0

    def test_the_margin_is_relative(self) -> None:
        """Plain steps of 2 s: 0.5 tokens a second, and drafts that cost nothing give 0.75."""
        assert measured(0.1, plain=2.0, draft_step=0.1, per_row=0.0).draft_length() == 1
        assert measured(0.1, plain=0.5, draft_step=0.1, per_row=0.0).draft_length() == 0

    def test_what_is_not_timed_yet_is_tried(self) -> None:
        for unknown in ("draft_step", "per_row"):
            part = measured(0.0)
            setattr(part, unknown, None)
            assert part.draft_length() == 1

    def test_what_a_draft_must_be_worth(self) -> None:
        assert measured(0.5, plain=2.0).min_acceptance() == pytest.approx(0.075)
        assert DraftLengthController().min_acceptance() == 0.0
        for unknown in ("plain", "draft_step", "per_row"):
            part = measured(0.5)
            setattr(part, unknown, None)
            assert part.min_acceptance() == 0.0

    def test_acceptance_by_the_drafts_own_probability(self) -> None:
        controller = DraftLengthController()
        assert controller.expected(0.0) == pytest.approx(0.525)
        assert controller.expected(0.37) == pytest.approx(0.675)
        assert controller.expected(1.0) == controller.expected(0.95) == pytest.approx(0.975)
        controller.learn([0.37, 0.99, 0.55], 1)
        assert controller.expected(0.31) == pytest.approx(0.675 + 0.05 * 0.325)
        assert controller.expected(0.91) == pytest.approx(0.975 - 0.05 * 0.975)
        assert controller.expected(0.55) == pytest.approx(0.775), "nothing after a rejected one"

    def test_costs_are_medians(self) -> None:
        controller = DraftLengthController()
        controller.observe(0, [], 9.0, 2.0)
        controller.observe(0, [], 9.0, 1.0)
        assert controller.plain == 1.0 and controller.draft_step is None  # the lower one of two
        controller.observe(3, [1, 0], 0.6, 2.3)
        assert controller.draft_step == pytest.approx(0.2)
        assert controller.per_row == pytest.approx(1.3 / 3)
        # one accepted and one not, then one that is not: 0.6 -> 0.64 -> 0.576 -> 0.5184
        assert controller.acceptance == pytest.approx(0.5184)
        controller.observe(3, [3], 0.3, 0.9)  # faster than a plain step: drafts cost no less than 0
        assert (controller.draft_step, controller.per_row) == (pytest.approx(0.1), 0.0)
        controller.observe(3, [3], 0.9, 1.9)
        assert controller.draft_step == pytest.approx(0.2)
        assert controller.per_row == pytest.approx(0.3)
        assert controller.since_plain == 3
        controller.observe(0, [], 0.0, 1.7, steps=1)
        assert controller.since_plain == 0 and controller.plain == 1.7  # of 1, 1.7 and 2
        for _ in range(4):
            controller.observe(0, [], 0.0, 1.5, steps=1)
        assert controller.plain == 1.5, "five are kept"

    def test_without_a_plain_step_rows_cost_nothing(self) -> None:
        controller = DraftLengthController()
        controller.observe(2, [2], 0.2, 5.0)
        assert controller.per_row == 0.0 and controller.draft_step == pytest.approx(0.1)


# -- rounding ---------------------------------------------------------------------------------


def bf16(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).to(torch.bfloat16))


def rounded_by_hand(weights: list[float], importance: list[float]) -> tuple[float, list[float]]:
    """Weighted squared error of the best of all ranges, and the rounded weights: one number at a
    time, as the docstring of `round_to_grid` says it, before scales and minima are put in steps."""
    best: tuple[float, list[float]] = (math.inf, [])
    for cut in USUAL_CUTS:
        low, high = min(0.0, *weights), max(0.0, *weights)
        margin = (high - low) * cut / 2
        low, high = low + margin, high - margin
        scale = (high - low) / 15
        codes = [min(15, max(0, round((w - low) / scale))) for w in weights]
        total = sum(importance)
        code = sum(i * c for i, c in zip(importance, codes, strict=True)) / total
        mean = sum(i * w for i, w in zip(importance, weights, strict=True)) / total
        pairs = list(zip(importance, codes, weights, strict=True))
        fitted = sum(i * (c - code) * (w - mean) for i, c, w in pairs)
        scale = bf16(fitted / sum(i * (c - code) ** 2 for i, c, _ in pairs))
        low = min(0.0, max(mean - scale * code, -15 * scale))
        step = 2.0 ** (math.frexp(max(-low, 8 * scale))[1] - 8)  # of the eighth bit
        low = round(low / step) * step
        codes = [min(15, max(0, round((w - low) / scale))) for w in weights]
        values = [scale * c + low for c in codes]
        error = sum(i * (v - w) ** 2 for i, v, w in zip(importance, values, weights, strict=True))
        best = min(best, (error, values))
    return best


class TestRounding:
    def test_a_grid_is_found_again(self) -> None:
        """Weights 0.5 c - 3 of codes c: scale 0.5 and minimum -3."""
        codes = torch.arange(GROUP).remainder(16).repeat(3, 2)
        codes[:, GROUP:] = codes[:, GROUP:].flip(1)
        found = round_to_grid(codes * 0.5 - 3, torch.ones(2 * GROUP))
        assert found.codes.dtype == torch.uint8 and torch.equal(found.codes.long(), codes)
        assert torch.equal(found.scale, torch.full((3, 2), 0.5))
        assert found.minimum is not None
        assert torch.equal(found.minimum, torch.full((3, 2), -3.0))

    @pytest.mark.parametrize("seed", range(3))
    def test_the_best_range_by_weighted_error(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(4, 2 * GROUP, generator=generator)
        weights[:, ::7] *= 4  # some far out, so that cutting a range pays
        squares = torch.rand(2 * GROUP, generator=generator).square() * 10
        grid = round_to_grid(weights, squares, in_steps=False)
        values = grid.weight().unflatten(1, (-1, GROUP))
        importance = (squares / squares.mean()).view(2, GROUP)
        for row in range(4):
            for group in range(2):
                own = weights[row].view(2, GROUP)[group]
                error, wanted = rounded_by_hand(own.tolist(), importance[group].tolist())
                found = float((importance[group] * (values[row, group] - own).square()).sum())
                assert found == pytest.approx(error, rel=1e-3)
                torch.testing.assert_close(
                    values[row, group], torch.tensor(wanted), atol=1e-2, rtol=0
                )

    @pytest.mark.parametrize("size", [1e-7, 1e7])
    def test_the_size_of_all_inputs_does_not_matter(self, size: float) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(4, 2 * GROUP, generator=generator)
        squares = torch.rand(2 * GROUP, generator=generator).square() + 0.1
        one, other = round_to_grid(weights, squares), round_to_grid(weights, squares * size)
        assert torch.equal(one.weight(), other.weight())

    def test_inputs_that_are_never_there_count_nothing(self) -> None:
        """All squares 0: every weight counts alike, and nothing is divided by 0."""
        weights = torch.linspace(-1, 1, GROUP).view(1, GROUP)
        one, other = (
            round_to_grid(weights, torch.zeros(GROUP)),
            round_to_grid(weights, torch.ones(GROUP)),
        )
        torch.testing.assert_close(one.weight(), other.weight())

    def test_a_constant_group(self) -> None:
        """Weights of 0.5 come back, and so do weights of 0."""
        for value in (0.5, -0.5, 0.0):
            grid = round_to_grid(torch.full((1, GROUP), value), torch.ones(GROUP))
            torch.testing.assert_close(
                grid.weight(), torch.full((1, GROUP), value), rtol=0.01, atol=0
            )


# -- losses -----------------------------------------------------------------------------------


class TestLosses:
    def test_distillation_of_two_tokens(self) -> None:
        """Teacher (3/4, 1/4) and (1/2, 1/2), student (1/2, 1/2) and (1/4, 3/4), in nats."""
        teacher = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
        student = torch.tensor([[1.0, 1.0], [1.0, 3.0]]).log()
        first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
        second = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
        found = objectives.distill_loss(student, teacher)
        assert float(found) == pytest.approx((first + second) / 2, rel=1e-5)
        assert float(objectives.distill_loss(student[None], teacher[None])) == pytest.approx(
            float(found)
        )

    def test_temperature(self) -> None:
        """At 2, odds of 9 become 3, and the loss counts 4 times."""
        teacher, student = torch.tensor([[9.0, 1.0]]).log(), torch.zeros(1, 2)
        wanted = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
        assert float(objectives.distill_loss(student, teacher, 2.0)) == pytest.approx(
            wanted, rel=1e-5
        )

    @pytest.mark.parametrize("rows", [1, objectives.CHUNK, 2 * objectives.CHUNK + 5])
    def test_chunks_add_up(self, rows: int) -> None:
        """The sum of w h^2 over rows, and its gradient 2 w h, doubled by what follows."""
        hidden = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        weights = torch.arange(1.0, rows + 1).unsqueeze(1)
        sizes: list[int] = []

        def loss_of(part: torch.Tensor, place: slice) -> torch.Tensor:
            sizes.append(len(part))
            return (weights[place] * part.square()).sum()

        found = objectives.in_chunks(hidden, loss_of)
        (2 * found).backward()
        assert found.shape == () and found.dtype == torch.float32
        torch.testing.assert_close(found, (weights * hidden.detach().square()).sum())
        torch.testing.assert_close(hidden.grad, 4 * weights * hidden.detach())
        assert sum(sizes) == rows and max(sizes) <= objectives.CHUNK

    def test_chunks_of_bfloat16_add_up_in_float32(self) -> None:
        hidden = torch.ones(3, 2, dtype=torch.bfloat16).requires_grad_()
        found = objectives.in_chunks(hidden, lambda part, rows: part.sum())
        assert found.dtype == torch.float32 and float(found.detach()) == 6.0

    def test_the_teacher_and_a_student_without_gradient(self) -> None:
        teacher = torch.randn(3, 5, requires_grad=True)
        loss = objectives.distill_loss(torch.randn(3, 5, requires_grad=True), teacher)
        loss.backward()
        assert teacher.grad is None
        assert not objectives.distill_loss(torch.randn(3, 5), torch.randn(3, 5)).requires_grad

    def test_next_tokens(self) -> None:
        """Probabilities 3/4 and 1/5 of what follows; a third token does not count."""
        logits = torch.tensor([[3.0, 1.0], [4.0, 1.0], [1.0, 1.0]]).log()
        following = torch.tensor([0, 1, -100])
        wanted = -(math.log(0.75) + math.log(0.2)) / 2
        assert float(objectives.next_token_loss(logits.bfloat16(), following)) == pytest.approx(
            wanted, rel=1e-2
        )
        assert float(objectives.next_token_loss(logits, following)) == pytest.approx(wanted)
        assert objectives.next_token_loss(logits.bfloat16(), following).dtype == torch.float32

    def test_hidden_states(self) -> None:
        """Squared distances 1 and 4 of states whose squares are 4 and 16: 5 / 20."""
        student, teacher = torch.tensor([[[3.0, 2.0]]]), torch.tensor([[[2.0, 4.0]]])
        assert float(objectives.hidden_loss(student, teacher)) == pytest.approx(0.25)
        assert objectives.hidden_loss(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32

    def test_sparsity(self) -> None:
        gates = torch.tensor([[0.2, 0.4], [0.6, 0.8]])
        assert float(objectives.SPARSITY["l1"](gates, 0.5)) == pytest.approx(0.5)
        assert float(objectives.SPARSITY["l2"](gates, 0.5)) == pytest.approx(0.3)
        kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
        assert float(objectives.SPARSITY["kl"](gates, 0.25)) == pytest.approx(kl)
        assert float(objectives.SPARSITY["kl"](gates, 0.5)) == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize(("budget", "mean"), [(0.0, 1.0), (1.0, 0.0)])
    def test_the_ends_of_a_bernoulli_are_finite(self, budget: float, mean: float) -> None:
        """Budgets are kept 1e-4 from the ends, means 1e-6: ln 1e6 and a little."""
        found = float(objectives.bernoulli_kl(torch.full((4,), mean), budget))
        wanted = (1 - 1e-4) * math.log((1 - 1e-4) / 1e-6) + 1e-4 * math.log(1e-4)
        assert found == pytest.approx(wanted, rel=5e-3)


# -- distributions of the next token ----------------------------------------------------------

LOGITS = torch.tensor([[8.0, 4.0, 2.0], [1.0, 5.0, 3.0], [3.0, 2.0, 1.0]]).log()
"""After a text, and after one and two drafted tokens: probabilities 8/14, 1/9, 3/6 of token 0."""


class TestSampler:
    @pytest.mark.parametrize(
        "edge",
        [
            *({"temperature": 0}, {"top_k": 0}, {"repetition_penalty": 0.5}),
            *({"top_p": 1.0}, {"min_p": 0.0}, {"min_p": 1.0}, {"top_p": 0.01}),
        ],
    )
    def test_what_is_just_allowed(self, edge: dict[str, float]) -> None:
        assert getattr(Sampler(**edge), next(iter(edge))) == next(iter(edge.values()))  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            *(({"temperature": -0.1}, "^temperature"), ({"top_k": -1}, "or less$")),
            *(({"repetition_penalty": 0.0}, "^temperature and top_k"), ({"top_p": 0.0}, "^top_p")),
            *(({"top_p": 1.01}, r"in \[0, 1\]$"), ({"min_p": -0.1}, "^top_p must lie")),
            ({"min_p": 1.01}, "^top_p must lie"),
        ],
    )
    def test_what_is_just_refused(self, wrong: dict[str, float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Sampler(**wrong)  # type: ignore[arg-type]

    def test_greedy_ones(self) -> None:
        assert list(GREEDY.distributions(LOGITS, [1], [0, 1])) == [0, 1, 0]
        assert next(GREEDY.distributions(LOGITS, [1], [0, 1])) == 0

    def test_sampled_ones(self) -> None:
        wanted = torch.tensor(
            [[8 / 14, 4 / 14, 2 / 14], [1 / 9, 5 / 9, 3 / 9], [3 / 6, 2 / 6, 1 / 6]]
        )
        found = list(Sampler(temperature=1.0).distributions(LOGITS, [1], [0, 1]))
        torch.testing.assert_close(torch.stack(found), wanted)  # type: ignore[arg-type]
        halved = Sampler(temperature=0.5).distribution(LOGITS[1].bfloat16().float(), [1])
        torch.testing.assert_close(halved, torch.tensor([1, 25, 9]) / 35, atol=5e-3, rtol=0)

    def test_each_setting_alone(self) -> None:
        """Of 8, 4 and 2 in 14: the two likeliest, three quarters, and a half of the likeliest."""
        for settings, wanted in (
            ({"top_k": 2}, [8 / 12, 4 / 12, 0]),
            ({"top_k": 1}, [1.0, 0, 0]),
            ({"top_p": 0.75}, [8 / 12, 4 / 12, 0]),
            ({"top_p": 0.99}, [8 / 14, 4 / 14, 2 / 14]),
            ({"min_p": 0.4}, [8 / 12, 4 / 12, 0]),
            ({"min_p": 0.1}, [8 / 14, 4 / 14, 2 / 14]),
        ):
            found = Sampler(temperature=1.0, **settings).distribution(LOGITS[0], [1])  # type: ignore[arg-type]
            torch.testing.assert_close(found, torch.tensor(wanted))

    def test_a_penalty_reads_the_draft_too(self) -> None:
        """Logits of 2 and 1.5: halved where the text has token 0, so that token 1 is the likelier;
        and where the draft has it, too, both are halved."""
        logits = torch.tensor([[2.0, 1.5, 0.5]] * 3)
        penalty = Sampler(repetition_penalty=2.0)
        assert list(penalty.distributions(logits, [2], [0, 1])) == [0, 1, 0]
        assert list(penalty.distributions(logits, [0], [2, 1])) == [1, 1, 0]

    def test_drawing(self) -> None:
        generator = torch.Generator().manual_seed(0)
        assert draw(7, generator) == 7
        drawn = [draw(torch.tensor([0.0, 0.25, 0.75]), generator) for _ in range(400)]
        assert 0 not in drawn and 60 < drawn.count(1) < 140
        again = torch.Generator().manual_seed(0)
        assert drawn == [draw(torch.tensor([0.0, 0.25, 0.75]), again) for _ in range(400)]

    def test_drafts_and_their_distributions_pair(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            accept_or_resample([1, 2], [1], [1, 2, 3], torch.Generator())

    @pytest.mark.parametrize("target", [0.3, 1.0])
    def test_all_chance_is_the_rows_own(self, target: float) -> None:
        """Another seed of torch's global stream changes nothing: not what is accepted, nor what
        replaces it, nor what follows."""
        left = (1 - target) / 2
        wanted, drawn = torch.tensor([left, target, left]), torch.tensor([0.0, 1.0, 0.0])
        found = []
        for elsewhere in (1, 2):
            generator = torch.Generator().manual_seed(7)
            torch.manual_seed(elsewhere)
            free = torch.full((50,), 1 / 50)
            found.append(
                [accept_or_resample([1], [drawn], [wanted, free], generator) for _ in range(60)]
            )
        assert found[0] == found[1]

    def test_single_tokens_against_probabilities(self) -> None:
        """A looked-up token is accepted as often as the target draws it, and then another comes."""
        target = torch.tensor([0.2, 0.5, 0.3])
        generator = torch.Generator().manual_seed(3)
        found = [accept_or_resample([1], [1], [target, 2], generator) for _ in range(2000)]
        kept = sum(accepted for accepted, _ in found)
        assert kept / 2000 == pytest.approx(0.5, abs=0.04)
        assert {token for accepted, token in found if accepted} == {2}
        instead = [token for accepted, token in found if not accepted]
        assert set(instead) == {0, 2} and instead.count(0) / len(instead) == pytest.approx(
            0.4, abs=0.05
        )
