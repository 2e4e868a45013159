"""Speculative sampling keeps the target's distribution, and the test would notice if it did not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gateskip.decoding.sampling import GREEDY, Distribution, Sampler, accept_or_resample, draw

DRAWS, VOCABULARY = 100_000, 6
LIMIT = 30.0  # chi-square with 5 and 11 degrees of freedom exceeds it once in 70,000 and 600 times


def distribution(seed: int, sharp: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(VOCABULARY, generator=generator) * sharp, -1)


def chi_square(counts: torch.Tensor, wanted: torch.Tensor) -> float:
    expected = wanted * counts.sum()
    return float(((counts - expected).square() / expected).sum())


DRAFTS: dict[str, Callable[[], Distribution]] = {
    "alike": lambda: distribution(1),
    "other": lambda: distribution(2, 2.0),
    "sure": lambda: distribution(3, 8.0),
    "looked up": lambda: 2,
    "never wanted": lambda: torch.nn.functional.one_hot(torch.tensor(4), VOCABULARY).float(),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRAFTS)
def test_the_first_token_is_drawn_as_from_the_target(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    target, source = distribution(1), DRAFTS[kind]()
    counts = torch.zeros(VOCABULARY)
    for _ in range(DRAWS):
        token = draw(source, generator)
        accepted, following = accept_or_resample([token], [source], [target, target], generator)
        counts[token if accepted else following] += 1
    assert chi_square(counts, target) < LIMIT


def test_a_wrong_rule_is_noticed() -> None:
    """Accepting whenever the target could have said it: the distribution is the draft's."""
    generator = torch.Generator().manual_seed(0)
    target, source = distribution(1), distribution(2, 2.0)
    counts = torch.bincount(
        torch.multinomial(source, DRAWS, replacement=True, generator=generator),
        minlength=VOCABULARY,
    ).float()
    assert chi_square(counts, target) > 100 * LIMIT


def test_greedy_counts_the_agreeing_prefix() -> None:
    generator = torch.Generator()
    wanted = [1, 2, 3, 4]
    assert accept_or_resample([1, 2, 3], [1, 2, 3], wanted, generator) == (3, 4)
    assert accept_or_resample([1, 0, 3], [1, 0, 3], wanted, generator) == (1, 2)
    assert accept_or_resample([], [], wanted[:1], generator) == (0, 1)


def test_no_distribution_is_computed_after_a_rejection() -> None:
    asked = []

    def distributions() -> object:
        for token in (1, 9, 9):
            asked.append(token)
            yield token

    assert accept_or_resample([0, 9], [0, 9], distributions(), torch.Generator()) == (0, 1)  # type: ignore[arg-type]
    assert asked == [1]


def test_a_distribution_is_what_transformers_samples_from() -> None:
    from transformers.generation import logits_process as theirs

    logits, ids = torch.randn(1, 50), torch.tensor([[3, 4, 3]])
    scores = theirs.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    scores = theirs.TemperatureLogitsWarper(0.7)(ids, scores)
    scores = theirs.TopKLogitsWarper(20)(ids, scores)
    scores = theirs.TopPLogitsWarper(0.9)(ids, scores)
    sampler = Sampler(temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.3)
    found = sampler.distribution(logits[0], ids[0].tolist())
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, scores.softmax(-1)[0])
    assert GREEDY.distribution(logits[0], []) == int(logits.argmax())


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"min_p": 2}, {"repetition_penalty": 0}]
)
def test_impossible_settings_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Sampler(**wrong)  # type: ignore[arg-type]
