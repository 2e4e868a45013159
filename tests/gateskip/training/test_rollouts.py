"""On-policy training: what the student writes, when it is read, and that it can be resumed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from compose.errors import UserError
from compose.stages.gate import Gate
from compose.stages.on_policy import OnPolicyText, require_room
from gateskip.decoding.sampling import GREEDY, Sampler
from gateskip.gates.kinds import make_gates
from gateskip.model.reference import masked_forward
from gateskip.quantization.folders import load_model
from gateskip.training.gate_finetune import train_gates
from gateskip.training.heal import heal
from gateskip.training.objectives import distill_loss, divergence
from gateskip.training.recipe import HealConfig, LoopConfig, OnPolicy, TrainConfig
from gateskip.training.rollouts import Rollouts, rollout_writer

POLICY = OnPolicy(after=0.5, share=0.5, every=3, tokens=12)


@pytest.fixture(scope="module")
def blocks() -> torch.Tensor:
    return torch.randint(3, 512, (8, 48), generator=torch.Generator().manual_seed(4))


def numbered(prompts: list[list[int]], count: int, sampler: Sampler, seed: int) -> list[list[int]]:
    """Writes the numbers from 0 on, whatever it is asked."""
    return [list(range(count)) for _ in prompts]


def rollouts(blocks: torch.Tensor, **settings: Any) -> Rollouts:
    passes = LoopConfig(steps=20, batch=2, accumulate=2, seed=3)
    return Rollouts(OnPolicy(**settings), passes, blocks, Accelerator(cpu=True))


class TestRollouts:
    def test_a_block_is_text_up_to_what_the_student_writes(self, blocks: torch.Tensor) -> None:
        made = rollouts(blocks, tokens=10)
        made.renew(10, lambda draw: numbered)
        assert made.blocks.shape[1] == 48
        texts = {tuple(row) for row in blocks[:, :38].tolist()}
        assert all(tuple(row[:38]) in texts for row in made.blocks.tolist())
        assert made.blocks[:, 38:].tolist() == [list(range(10))] * len(made.blocks)

    def test_it_writes_every_so_many_steps_of_its_phase(self, blocks: torch.Tensor) -> None:
        made = rollouts(blocks, after=0.5, every=4, tokens=10)
        assert [step for step in range(20) if made.due(step)] == [10, 14, 18]

    def test_its_share_of_the_passes_reads_it_and_none_before(self, blocks: torch.Tensor) -> None:
        made = rollouts(blocks, after=0.5, share=0.3, tokens=10)
        made.passes = LoopConfig(steps=4000, accumulate=2, seed=3)
        made.first = 2000
        reads = [made.reads(step, part) for step in range(4000) for part in (0, 1)]
        assert not any(reads[:4000])
        assert abs(sum(reads[4000:]) / 4000 - 0.3) < 0.03

    def test_a_block_must_be_longer_than_what_is_written(self, blocks: torch.Tensor) -> None:
        with pytest.raises(ValueError, match="48 tokens at the end of blocks of 48"):
            rollouts(blocks, tokens=48)
        with pytest.raises(UserError, match="300 tokens at the end of blocks of length 256"):
            require_room(OnPolicyText(tokens=300), 256)

    def test_the_stage_refuses_it_without_a_teacher(self) -> None:
        with pytest.raises(ValueError, match="on_policy learns from the dense model"):
            Gate(loss="cross-entropy", on_policy=OnPolicyText())


def test_the_student_writes_what_its_masked_forward_says(
    tiny_llama: Path, blocks: torch.Tensor
) -> None:
    """Token by token, greedily, under the same thresholds as in training."""
    torch.manual_seed(1)
    model, gates = load_model(tiny_llama, "float32"), make_gates("scalar", 8, 64)
    thresholds = [0.0] * 8
    prompts = blocks[:2, :20].tolist()
    written = rollout_writer(model, gates, "project", thresholds)(prompts, 8, GREEDY, 0)
    for prompt, own in zip(prompts, written, strict=True):
        ids = torch.tensor([[*prompt, *own]])
        with torch.no_grad():
            hidden = masked_forward(
                model, ids, gates, lambda b, z: (z >= thresholds[b.index]).float()
            )
            logits = model.lm_head(hidden)
        assert logits[0, 19:-1].argmax(-1).tolist() == own
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-3)
    assert rollout_writer(model, gates, "project", thresholds)(prompts, 8, GREEDY, 0) != written


class TestTraining:
    def fresh(self, folder: Path) -> tuple[Any, Any]:
        model = load_model(folder, "float32")
        torch.manual_seed(0)
        return model, make_gates("scalar", 8, model.config.hidden_size)

    def test_the_student_text_is_read_and_changes_the_gates(
        self, tiny_llama: Path, blocks: torch.Tensor
    ) -> None:
        found = []
        for policy in (None, POLICY):
            model, gates = self.fresh(tiny_llama)
            config = TrainConfig(steps=8, budget=0.6, backbone="frozen", on_policy=policy)
            curve = train_gates(model, gates, blocks, config)
            assert all(math.isfinite(row["loss"]) for row in curve)
            found.append((gates.weight.detach().clone(), curve))
        (plain, first), (own, second) = found
        assert first[:4] == second[:4], "the first phase is the same"
        assert not torch.equal(plain, own)

    def test_healing_reads_it_too(self, tiny_llama: Path, blocks: torch.Tensor) -> None:
        teacher, weights = load_model(tiny_llama, "float32"), []
        for policy in (
            None,
            OnPolicy(after=0.0, share=1.0, tokens=12, divergence="mixed", top_k=8),
        ):
            model = load_model(tiny_llama, "float32")
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight.mul_(0.5)
            heal(model, teacher, blocks, HealConfig(steps=3, validate_every=0, on_policy=policy))
            weights.append(model.model.layers[1].mlp.up_proj.weight.detach())
        assert not torch.equal(*weights)


class TestDivergence:
    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        draws = torch.Generator().manual_seed(2)
        return torch.randn(5, 30, generator=draws), torch.randn(5, 30, generator=draws)

    def test_each_kind_is_what_its_name_says(self) -> None:
        student, teacher = self.logits()
        q, p = F.softmax(student, -1), F.softmax(teacher, -1)
        forward = float((p * (p / q).log()).sum(-1).mean())
        reverse = float((q * (q / p).log()).sum(-1).mean())
        assert float(divergence(student, teacher, "forward")) == pytest.approx(forward, rel=1e-5)
        assert float(divergence(student, teacher, "reverse")) == pytest.approx(reverse, rel=1e-5)
        mean = (forward + reverse) / 2
        assert float(divergence(student, teacher, "mixed")) == pytest.approx(mean, rel=1e-5)

    def test_the_most_likely_tokens_and_one_place_for_the_rest(self) -> None:
        student, teacher = self.logits()
        q, p = F.softmax(student, -1), F.softmax(teacher, -1)
        kept = p.topk(4).indices
        parts = [each.gather(-1, kept) for each in (q, p)]
        q, p = (torch.cat((each, 1 - each.sum(-1, keepdim=True)), -1) for each in parts)
        wanted = float((q * (q / p).log()).sum(-1).mean())
        assert float(divergence(student, teacher, "reverse", 4)) == pytest.approx(wanted, rel=1e-4)

    def test_all_of_a_small_vocabulary_is_the_whole_divergence(self) -> None:
        student, teacher = self.logits()
        whole = float(distill_loss(student, teacher))
        assert float(divergence(student, teacher, "forward", 29)) == pytest.approx(whole, rel=1e-4)
