"""What answers need of prompts: measured sensitivity, thresholds by it, and where they are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from compose.analysis.metrics import over_seeds
from compose.analysis.relate import relate
from compose.bench.quality.lossless import check_lossless
from compose.bench.quality.scored import Scored
from compose.bench.quality.text import score_blocks
from compose.results.parts import Perplexity, Quality, SeedRun
from compose.results.schema import CellResult, Results
from compose.stages.gate import Gate
from gateskip.calibration.budgets import CalibratedBudgets
from gateskip.calibration.fit_shortcuts import fit_shortcuts
from gateskip.calibration.reading import calibrate_prompts, prompt_sensitivity
from gateskip.calibration.thresholds import calibrate_everywhere
from gateskip.calibration.warm_start import warm_start
from gateskip.checkpoint import GateFile, load_gates, read_gates, save_gates
from gateskip.decoding.decoder import Decoder
from gateskip.model.families import head
from gateskip.model.gating import ANCHORS
from gateskip.model.reference import masked_forward
from gateskip.quantization.folders import load_model
from gateskip.runtime.skipping import SkippingModel
from gateskip.training.gate_finetune import train_gates
from gateskip.training.masks import TrainMask
from gateskip.training.recipe import OnPolicy, TrainConfig

BUDGETS = (0.9, 0.7, 0.5)


@pytest.fixture(scope="module")
def made(make_tiny: Callable[..., Path]) -> Any:
    """A tiny model, gates with shortcuts, and blocks."""
    model = load_model(make_tiny("llama"), "float32")
    blocks = torch.randint(3, 512, (6, 48), generator=torch.Generator().manual_seed(1))
    gates, _ = warm_start(model, blocks)
    gates.shortcuts = fit_shortcuts(model, blocks, 4)
    gates.requires_grad_(False)
    gates.prompt_sensitivity = prompt_sensitivity(model, gates, blocks[:3])
    return model, gates, blocks


@pytest.mark.parametrize("kv_rule", ["project", "copy"])
def test_harm_is_the_kl_of_whole_passes(made: Any, kv_rule: str) -> None:
    """Measured from the layer on that a branch is in, and here with all layers and a fixed cut."""
    model, gates, blocks = made
    found = prompt_sensitivity(model, gates, blocks[:1], kv_rule, seed=4)
    least, most = 12, 42
    cut = int(torch.randint(least, most + 1, (), generator=torch.Generator().manual_seed(4)))

    def predicted(mask: Any) -> torch.Tensor:
        hidden = masked_forward(model, blocks[:1], gates, mask, kv_rule)
        return F.log_softmax(head(model, hidden)[0, cut:], -1)

    with torch.no_grad():
        dense = predicted(lambda branch, z: torch.ones_like(z))
        for skipped in range(gates.branches):

            def mask(branch: Any, z: torch.Tensor, skipped: int = skipped) -> torch.Tensor:
                places = torch.arange(z.shape[1])
                gone = (places >= ANCHORS) & (places < cut) & (branch.index == skipped)
                return (~gone).to(z).expand_as(z)

            kl = (dense.exp() * (dense - predicted(mask))).sum(-1).mean()
            assert float(found[skipped]) == pytest.approx(float(kl), rel=1e-2, abs=1e-6)
    assert float(found[-1]) < 1e-6 < float(found[0]), "nothing reads what the last MLP adds"


def test_budgets_are_kept(made: Any) -> None:
    model, gates, blocks = made
    found = calibrate_prompts(model, gates, blocks, BUDGETS)
    for budget in BUDGETS:
        assert abs(found.kept[budget] - budget) < 0.03


def kept_shares(made: Any, thresholds: Sequence[float]) -> list[float]:
    """Share of the blocks' tokens that enter each branch."""
    model, gates, blocks = made
    kept = list[float]()

    def rule(branch: Any, z: torch.Tensor) -> torch.Tensor:
        mask = (z >= thresholds[branch.index]).to(z)
        kept.append(float(mask[:, ANCHORS:].mean()))
        return mask

    masked_forward(model, blocks, gates, rule)
    return kept


@pytest.mark.parametrize("harmless", [1, 3, 5])
def test_what_harms_least_goes_first(made: Any, harmless: int) -> None:
    """An MLP is a sixth of what four layers of this model compute."""
    model, gates, blocks = made
    before, gates.prompt_sensitivity = gates.prompt_sensitivity, torch.ones(gates.branches)
    gates.prompt_sensitivity[harmless] = 1e-5
    try:
        thresholds = calibrate_prompts(model, gates, blocks, (0.9,)).thresholds[0.9]
    finally:
        gates.prompt_sensitivity = before
    kept = kept_shares(made, thresholds)
    assert kept[harmless] < 0.6 and all(
        share > 0.9 for branch, share in enumerate(kept) if branch != harmless
    )


def test_by_depth_the_last_branches_go_first(made: Any) -> None:
    """Whole, but for the one in which the budget ends; no sensitivity has to be measured."""
    model, gates, blocks = made
    before, gates.prompt_sensitivity = gates.prompt_sensitivity, None
    try:
        found = calibrate_prompts(model, gates, blocks, (0.7,), order="depth")
    finally:
        gates.prompt_sensitivity = before
    shares = kept_shares(made, found.thresholds[0.7])
    assert abs(found.kept[0.7] - 0.7) < 0.03
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1 and shares[-1] == 0
    assert sum(0 < share < 1 for share in shares) <= 1


def test_branches_that_save_nothing_never_skip(made: Any) -> None:
    """Shortcuts as costly as what they replace."""
    model, gates, blocks = made
    dear = fit_shortcuts(model, blocks, 60)
    before, gates.shortcuts = gates.shortcuts, dear
    try:
        found = calibrate_prompts(model, gates, blocks, (0.8,))
        attention = found.thresholds[0.8][0]
        entered = calibrate_everywhere(model, gates, blocks, (0.8,)).thresholds[0.8][0]
        assert attention < entered
    finally:
        gates.shortcuts = before


def test_they_survive_a_folder(made: Any, tmp_path: Path) -> None:
    model, gates, blocks = made
    text = calibrate_everywhere(model, gates, blocks, (0.9, 0.8))
    prompts = calibrate_prompts(model, gates, blocks, BUDGETS)
    budgets = CalibratedBudgets(text.thresholds, text.kept, text.between, prompts=prompts)
    save_gates(tmp_path, GateFile.of(gates, "project", budgets))
    file = load_gates(tmp_path)
    assert (
        file is not None and file.prompts is not None and file.gates.prompt_sensitivity is not None
    )
    assert file.budgets.for_prompts().kept == prompts.kept
    assert file.budgets.for_prompts().at(0.7) == pytest.approx(list(prompts.thresholds[0.7]))
    assert torch.equal(file.gates.prompt_sensitivity, gates.prompt_sensitivity)
    alone = read_gates(tmp_path / "gates.safetensors")
    assert alone.prompt_sensitivity is not None and torch.equal(
        alone.rows([2, 3]).prompt_sensitivity, gates.prompt_sensitivity[2:4]
    )


@pytest.fixture
def decoder(made: Any) -> Decoder:
    model, gates, blocks = made
    text = calibrate_everywhere(model, gates, blocks, BUDGETS)
    prompts = calibrate_prompts(model, gates, blocks, BUDGETS)
    budgets = CalibratedBudgets(text.thresholds, text.kept, text.between, prompts=prompts)
    return Decoder(SkippingModel(model, gates), None, budgets)


def test_answers_are_scored_as_they_are_written(decoder: Decoder, made: Any) -> None:
    """Greedy answers are the argmax of the states that score them, and unlike full compute's."""
    prompts = [made[2][row, : 9 + 7 * row].tolist() for row in range(3)] + [[7]]
    model = Scored(decoder, 1.0, prompt_budget=0.5)
    answers = decoder.generate(prompts, 12, "skip", 1.0, prompt_budget=0.5).tokens
    model.clear_used()
    led = model.answer_logits(prompts, answers)
    assert [logits.argmax(-1).tolist() for logits in led] == answers
    assert model.used["prompt"].seen == sum(map(len, prompts))
    assert model.used["answer"].seen == 4 * 11
    whole = Scored(decoder, None).answer_logits(prompts, answers)
    assert not torch.allclose(whole[2], led[2], atol=1e-3)
    torch.testing.assert_close(whole[3], led[3], atol=1e-4, rtol=1e-4)


def test_text_is_scored_after_prompts_that_skip(decoder: Decoder, made: Any) -> None:
    """The second half of each block, as an answer to the first, beside the dense model there."""
    blocks = made[2][:3]
    model = Scored(decoder, 1.0, prompt_budget=0.5)
    with torch.inference_mode():
        dense = Scored(decoder, None).hidden(blocks, None)
        read = model.read_of(48)
        scores = score_blocks(model, blocks, (dense, model.head), after=read)
        whole = score_blocks(Scored(decoder, None), blocks, (dense, model.head))
    assert read == 24 and scores.tokens == 3 * 23 and scores.kl and scores.kl > 1e-5
    for row, (block, nll) in enumerate(zip(blocks.tolist(), scores.dense_nll, strict=True)):
        logits = model.answer_logits([block[:25]], [block[25:]])[0].log_softmax(-1)
        own = -logits.gather(1, torch.tensor(block[25:]).unsqueeze(1)).mean()
        assert scores.block_nll[row] == pytest.approx(float(own), abs=1e-4)
        plain = Scored(decoder, None).answer_logits([block[:25]], [block[25:]])[0].log_softmax(-1)
        wanted = -plain.gather(1, torch.tensor(block[25:]).unsqueeze(1)).mean()
        assert nll == pytest.approx(float(wanted), abs=1e-4)
    assert whole.kl == pytest.approx(0, abs=1e-9) and whole.dense_nll == ()


def test_ratios_are_of_the_same_tokens() -> None:
    """Of a cell that scored a part of each block, whatever the baseline had on all of it."""
    base = Perplexity(dataset="text", value=30.0, tokens=94, block_nll=(3.0, 3.6))
    own = Perplexity(
        dataset="text", value=25.0, tokens=46, block_nll=(3.1, 3.3), dense_nll=(3.0, 3.2)
    )
    other = own.model_copy(update={"value": 26.0, "block_nll": (3.2, 3.4)})
    cells = [
        CellResult(name=name, chain=(), status="ok", quality=Quality(perplexity=each))
        for name, each in (("dense", base), ("read", own))
    ]
    more = SeedRun(seed=1, quality=Quality(perplexity=other))
    cells[1] = cells[1].model_copy(update={"seeds": (more,)})
    results = Results(run="x", environment={}, command="", cells=tuple(cells), baseline="dense")
    related = relate(results)
    ratios = over_seeds(related, "perplexity-ratio", related.cell("read"))
    assert ratios == pytest.approx((math.exp(0.1), math.exp(0.2)))
    found = related.cell("read").quality
    assert found is not None and found.perplexity is not None
    assert found.perplexity.ratio_to_baseline == pytest.approx(math.exp(0.1))
    assert found.perplexity.ratio_ci95 == pytest.approx((math.exp(0.1),) * 2)


def test_endings_are_scored_after_prompts_that_skip(decoder: Decoder, made: Any) -> None:
    prompts = [made[2][row, : 9 + 7 * row].tolist() for row in range(2)]
    endings = [made[2][5, :4].tolist(), made[2][4, :2].tolist(), []]
    model = Scored(decoder, 1.0, prompt_budget=0.5)
    after, within = model.branch(prompts, endings, [0, 1, 1])
    head_of = decoder.skipping.head
    wanted = model.answer_logits([prompts[0]], [[*endings[0], 3]])[0]
    found = head_of(torch.cat((after[:1], within[0])))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_drafts_after_prompts_that_skip_are_lossless(decoder: Decoder, made: Any) -> None:
    """Compared with the same prompts and no drafts; full compute writes something else."""
    prompts = [made[2][row, :30].tolist() for row in range(3)]
    settings: dict[str, Any] = {"prompt_budget": 0.5, "draft_length": 3, "target": "gated"}
    settings |= {"draft_weights": "own", "draft_budget": 0.7, "lookup": False}
    found = check_lossless(decoder, settings, prompts, 24)
    assert found["lossless"] and found["tokens"] == 72
    plain = decoder.generate(prompts, 24).tokens
    assert decoder.generate(prompts, 24, prompt_budget=0.5).tokens != plain
    drafted = decoder.generate
    decoder.generate = lambda rows, count, *args, **how: drafted(  # type: ignore[method-assign]
        rows, count, *args, **{**how, "prompt_budget": None if args else 0.5}
    )
    wrong = check_lossless(decoder, settings, prompts, 24)
    assert not wrong["lossless"] and wrong["divergences"][0]["margin"] >= 0


# -- gates that learn for prompts --------------------------------------------------------------


def test_what_comes_after_the_cut_enters_and_counts_nowhere() -> None:
    costs = torch.tensor([0.25, 0.75])
    rule = TrainMask(costs, torch.zeros(2), cut=3)
    branch = SimpleNamespace(index=1)
    z = torch.tensor([[-1.0, -1.0, 2.0, -1.0, -1.0]], requires_grad=True)
    assert rule(branch, z).tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0]]  # type: ignore[arg-type]
    assert float(rule.share) == pytest.approx(0.75 / 3)
    assert rule.logits[0].tolist() == [-1.0, 2.0]
    (gradient,) = torch.autograd.grad(rule.paid, z)
    assert (gradient[0] != 0).tolist() == [True, True, True, False, False]


def test_gates_learn_what_answers_need(made: Any, tmp_path: Path) -> None:
    """The KL of answers falls while prompts skip; a run that goes on from a checkpoint ends the
    same."""
    model, gates, blocks = made
    config = TrainConfig(
        steps=40,
        batch=2,
        lr=1e-2,
        budget=0.5,
        backbone="frozen",
        reading=True,
        ranking="rows",
        validate_every=20,
        validate_budgets=(0.6,),
        checkpoint_every=20,
    )
    start = deepcopy(gates).requires_grad_(True)
    start.prompt_sensitivity = torch.ones(gates.branches)  # nothing is known of the branches
    learned, again = deepcopy(start), deepcopy(start)
    before = train_gates(
        model, deepcopy(start), blocks, replace(config, steps=1, lr=1e-9), validation=blocks
    )
    curve = train_gates(model, learned, blocks, config, work=tmp_path, validation=blocks)
    assert curve[-1]["valid"] < 0.9 * before[-1]["valid"]
    resumed = train_gates(model, again, blocks, config, work=tmp_path, validation=blocks)
    assert resumed == curve and torch.equal(again.weight, learned.weight)


def test_reading_asks_for_measured_harm(made: Any) -> None:
    model, gates, blocks = made
    bare = deepcopy(gates)
    bare.prompt_sensitivity = None
    config = TrainConfig(steps=1, backbone="frozen", reading=True)
    with pytest.raises(ValueError, match=r"needs gates\.prompt_sensitivity"):
        train_gates(model, bare, blocks, config)
    with pytest.raises(ValueError, match="leave on_policy out"):
        train_gates(model, gates, blocks, replace(config, on_policy=OnPolicy()))
    with pytest.raises(ValidationError, match="set prompt_budgets"):
        Gate(reading=True)
    with pytest.raises(ValidationError, match="ranks branches by sensitivity"):
        Gate(reading=True, prompt_budgets=(0.8,), prompt_order="depth")
    with pytest.raises(ValidationError, match="depth applies to prompts"):
        Gate(prompt_order="depth")
    with pytest.raises(ValidationError, match="leave on_policy out"):
        Gate.model_validate({"reading": True, "prompt_budgets": [0.8], "on_policy": {}})
