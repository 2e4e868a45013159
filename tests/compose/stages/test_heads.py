"""An LM head in 8 bits: near the full one, the same in torch and natively, and last in a chain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gateskip
from compose.artifacts.folder import copy_companions
from compose.errors import RuleBroken
from compose.stages.registry import Gate, Gptq, PackHead, PruneWidth, Speculate, StageJob
from gateskip.quantization.head import head_format, rounded


@pytest.fixture
def packed(
    make_tiny: Callable[..., Path], make_job: Callable[..., StageJob], tmp_path: Path
) -> Path:
    source, target = make_tiny("llama"), tmp_path / "packed"
    target.mkdir()
    record = PackHead().run(make_job(source, target))
    copy_companions(source, target)
    assert 0 < record["relative_error"] < 0.02
    return target


def test_it_is_near_and_the_same_everywhere(packed: Path, make_tiny: Callable[..., Path]) -> None:
    assert head_format(packed) == "int8" and head_format(make_tiny("llama")) is None
    full, own = gateskip.load(make_tiny("llama")), gateskip.load(packed)
    eager = gateskip.load(packed, backend="gathered")
    assert own.skipping.engine.rounded and not full.skipping.engine.rounded
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact, fast, slow = (each.skipping.head(hidden) for each in (full, own, eager))
    size = exact.norm()
    assert 0 < (slow - exact).norm() < 0.02 * size
    assert (fast - slow).norm() < 0.02 * size, "natively, activations are rounded, too"
    prompt = [list(range(3, 20))]
    plain = own.generate(prompt, 24).tokens
    drafted = own.generate(prompt, 24, "speculate", draft_weights="int4", lookup=False)
    assert drafted.tokens == plain and drafted.stats.drafted


def test_the_weights_stay_what_they_were(packed: Path, make_tiny: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 20).unsqueeze(0)
    models = [AutoModelForCausalLM.from_pretrained(each) for each in (packed, make_tiny("llama"))]
    with torch.inference_mode():
        assert torch.equal(*(model(ids).logits for model in models))


def test_rounding_is_to_the_nearest() -> None:
    weight = torch.tensor([[1.27, -1.27, 0.004, 0.006] + [0.0] * 28])
    torch.testing.assert_close(rounded(weight)[0, :4], weight[0, :4], atol=0.006, rtol=0)
    assert torch.equal(rounded(torch.zeros(2, 32)), torch.zeros(2, 32))


def test_nothing_but_decoding_comes_after_it() -> None:
    for stage in (PruneWidth(ratio=0.2), Gate(), Gptq(), PackHead()):
        with pytest.raises(RuleBroken) as refused:
            stage.check(None, (PackHead(),))
        assert refused.value.rule == "head-last"
    Speculate(draft_budget=1, draft_weights="int4").check(None, (PackHead(),))
    PackHead().check(None, (Gate(), Gptq()))
