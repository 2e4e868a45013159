"""SmolLM2 among 32 requests: each has the tokens of `generate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from served import WARM, Listener

import gateskip
from gateskip.decoding.config import DraftConfig
from gateskip.kernels import ops
from gateskip.serving.requests import Request, ServeLimits
from gateskip.serving.scheduler import Scheduler

ROOT = Path(__file__).resolve().parents[3]
WAYS: list[dict[str, Any]] = [
    {},
    {"sampler": WARM, "seed": 3},
    {"mode": "speculate", "draft": DraftConfig(weights="int4", length=3)},
    {"logprobs": 1},
]


@pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here")
@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_32_requests_have_the_tokens_of_generate(
    smollm2: Path,
    grid_folder: Callable[..., Path],
    serve: Callable[..., Scheduler],
    weights: str,
) -> None:
    """Prompts of 20 to 340 tokens, the second half of which begin as one before does."""
    folder = grid_folder(smollm2, "int8", calibrate=False) if weights == "int8" else smollm2
    decoder = gateskip.load(folder, "bfloat16", "native")
    ids = decoder.tokenizer((ROOT / "README.md").read_text()).input_ids
    prompts = [tuple(ids[30 * i : 30 * i + 20 + 20 * i]) for i in range(16)]
    prompts += [prompt[: len(prompt) // 2] + tuple(ids[-9:]) for prompt in prompts]
    requests = [
        Request(prompt=prompt, max_new_tokens=12, **WAYS[i % len(WAYS)])
        for i, prompt in enumerate(prompts)
    ]
    wanted = [
        decoder.generate([r.prompt], 12, sampler=r.sampler, seed=r.seed).tokens[0] for r in requests
    ]
    scheduler, heard = serve(decoder, ServeLimits(context=512)), [Listener() for _ in requests]
    for request, listener in zip(requests, heard, strict=True):
        scheduler.submit(request, listener)
    assert scheduler.drain(600)
    assert [listener.tokens for listener in heard] == wanted
    reused = sum(listener.end.receipt.reused_tokens for listener in heard)
    assert reused > 1000 if decoder.skipping.any_pieces else not reused
