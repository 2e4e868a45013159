"""Tokens that the kernels draw: transformers' distribution, alone as in a batch and in one call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gateskip
from gateskip.decoding.sampling import Sampler
from gateskip.kernels import abi, ops

pytestmark = [
    pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here"),
    pytest.mark.usefixtures("no_gradients"),
]

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.9},
    {"top_p": 0.01},
    {"min_p": 0.2},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.95, "min_p": 0.05},
]


def logits(size: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def chosen(scores: Tensor, sampler: Sampler, uniform: float) -> int:
    assert sampler.draws is not None
    return ops.sample(scores, abi.Sampling(*sampler.draws), uniform, torch.empty(len(scores) + 8))


def of_transformers(sampler: Sampler, scores: Tensor) -> Tensor:
    return torch.softmax(sampler._chain(torch.tensor([[1]]), scores.unsqueeze(0))[0], -1)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("size", [8, 301, 1000, 1536])
def test_numbers_spread_evenly_give_the_distribution(settings: dict[str, Any], size: int) -> None:
    """With 4000 numbers each share comes out to one of them, whatever the number of parts."""
    sampler = Sampler(**{"temperature": 1.0, **settings})
    scores, count = logits(size, seed=size), 4000
    wanted = of_transformers(sampler, scores)
    torch.testing.assert_close(sampler.distribution(scores, [1]), wanted, atol=1e-6, rtol=1e-4)
    tokens = [chosen(scores, sampler, (i + 0.5) / count) for i in range(count)]
    found = torch.bincount(torch.tensor(tokens), minlength=size) / count
    assert tokens == sorted(tokens), "a larger number never gives an earlier token"
    torch.testing.assert_close(found, wanted, atol=1.01 / count, rtol=0)
    assert not found[wanted == 0].any(), "what is filtered out is never drawn"


def test_ends_of_the_range() -> None:
    sampler, scores = Sampler(temperature=1.0, top_k=3), logits(50)
    kept = sorted(scores.topk(3).indices.tolist())
    assert chosen(scores, sampler, 0.0) == kept[0]
    assert chosen(scores, sampler, 1.0 - 1e-16) == kept[-1]
    assert chosen(torch.full((50,), -3.0), Sampler(temperature=1.0), 0.999) == 49


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_row_alone_is_the_row_in_a_batch(make_tiny: Callable[..., Path], family: str) -> None:
    """The call that makes several tokens draws as the steps do; soft caps are applied first."""
    decoder = gateskip.load(make_tiny(family), backend="native")
    sampler = Sampler(temperature=0.9, top_p=0.95, top_k=50)
    prompts = [torch.randint(3, 512, (n,)).tolist() for n in (9, 17, 4)]
    told: list[int] = []
    alone = decoder.generate(
        prompts[:1], 70, sampler=sampler, seed=5, on_token=lambda _, token: told.append(token)
    ).tokens
    together = decoder.generate(prompts, 70, sampler=sampler, seed=5).tokens
    assert together[0] == alone[0] == told and len(told) == 70
    other = decoder.generate(prompts[:1], 70, sampler=sampler, seed=6).tokens
    assert other != alone


def test_what_transformers_has_to_filter_is_drawn_in_torch(make_tiny: Callable[..., Path]) -> None:
    decoder = gateskip.load(make_tiny("llama"), backend="native")
    penalty = Sampler(temperature=1.0, top_k=1, repetition_penalty=5.0)
    assert penalty.draws is None and Sampler().draws is None
    tokens = decoder.generate([[5, 6, 7]], 20, sampler=penalty).tokens[0]
    assert len(set(tokens)) == 20, "no token comes twice"
