"""Gate fine-tuning: it learns, it resumes, and every option of it trains."""

from __future__ import annotations

import math
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from gateskip.calibration.thresholds import calibrate
from gateskip.gates.kinds import make_gates
from gateskip.gates.learned import ScalarGates
from gateskip.kernels import build
from gateskip.model.reference import masked_forward
from gateskip.quantization.folders import load_model
from gateskip.training import loop as loop_module
from gateskip.training import sharding
from gateskip.training.budget_price import BudgetPrice
from gateskip.training.gate_finetune import _Session, train_gates
from gateskip.training.heal import _Healing
from gateskip.training.loop import Loop
from gateskip.training.masks import TrainMask
from gateskip.training.recipe import OnPolicy, TrainConfig

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def blocks() -> torch.Tensor:
    return torch.randint(3, 512, (8, 64), generator=torch.Generator().manual_seed(4))


class TestTrain:
    CONFIG = TrainConfig(steps=12, budget=0.6, backbone="frozen", checkpoint_every=4)

    def fresh(self, folder: Path) -> tuple[Any, ScalarGates]:
        model = load_model(folder, "float32")
        torch.manual_seed(0)
        return model, ScalarGates(8, model.config.hidden_size)

    def test_training_brings_the_skipping_model_nearer(
        self, tiny_llama: Path, blocks: torch.Tensor
    ) -> None:
        model, gates = self.fresh(tiny_llama)
        config = TrainConfig(steps=60, budget=0.6, backbone="frozen", lr=1e-2)
        before = [p.clone() for p in model.parameters()]

        def distance() -> float:
            thresholds = calibrate(model, gates.requires_grad_(False), blocks, (0.7,))[0].thresholds
            with torch.inference_mode():
                dense = model.lm_head(masked_forward(model, blocks)).log_softmax(-1)
                skipping = model.lm_head(
                    masked_forward(
                        model, blocks, gates, lambda b, z: (z >= thresholds[b.index]).float()
                    )
                ).log_softmax(-1)
            return float((dense.exp() * (dense - skipping)).sum(-1).mean())

        untrained = distance()
        curve = train_gates(model, gates.requires_grad_(True), blocks, config)
        assert distance() < 0.9 * untrained
        assert [row["step"] for row in curve] == list(range(1, 61))
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    def test_the_backbone_trains_when_asked(self, tiny_llama: Path, blocks: torch.Tensor) -> None:
        model, gates = self.fresh(tiny_llama)
        teacher = load_model(tiny_llama, "float32")
        config = TrainConfig(steps=3, backbone="full", backbone_lr=1e-3)
        before = model.model.layers[0].mlp.up_proj.weight.clone()
        train_gates(model, gates, blocks, config, teacher)
        assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)
        with pytest.raises(ValueError, match="teacher"):
            train_gates(model, gates, blocks, config)

    @pytest.mark.parametrize("policy", [None, OnPolicy(after=0.3, every=3, tokens=12)])
    def test_a_broken_run_ends_as_an_unbroken_one(
        self, tiny_llama: Path, blocks: torch.Tensor, tmp_path: Path, policy: OnPolicy | None
    ) -> None:
        config = replace(self.CONFIG, on_policy=policy)
        model, whole = self.fresh(tiny_llama)
        curve = train_gates(model, whole, blocks, config)

        class Killed(Exception):
            pass

        def kill(done: int, total: int, phase: str, **_: Any) -> None:
            if done == 7:
                raise Killed

        model, broken = self.fresh(tiny_llama)
        with pytest.raises(Killed):
            train_gates(model, broken, blocks, config, work=tmp_path, progress=kill)
        model, again = self.fresh(tiny_llama)
        rest: list[int] = []
        resumed = train_gates(
            model,
            again,
            blocks,
            config,
            work=tmp_path,
            progress=lambda done, total, phase, **_: rest.append(done),
        )
        assert rest[0] == 5, "goes on after the checkpoint at step 4"
        assert torch.equal(whole.weight, again.weight) and torch.equal(whole.bias, again.bias)
        assert resumed == curve

    def test_long_steps_leave_checkpoints_by_time(
        self,
        tiny_llama: Path,
        blocks: torch.Tensor,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """None is due by steps; where a step takes longer than the patience, each leaves one."""
        saved: list[int] = []
        save = Loop.save

        def noted(loop: Loop, work: Path) -> None:
            saved.append(loop.step)
            save(loop, work)

        monkeypatch.setattr(Loop, "save", noted)
        config = replace(self.CONFIG, steps=3, checkpoint_every=100)
        model, gates = self.fresh(tiny_llama)
        train_gates(model, gates, blocks, config, work=tmp_path)
        assert saved == []
        monkeypatch.setattr(loop_module, "CHECKPOINT_S", 0.0)
        monkeypatch.setattr(loop_module, "MOST_SAVING", 1e9)
        model, gates = self.fresh(tiny_llama)
        train_gates(model, gates, blocks, config, work=tmp_path)
        assert saved == [1, 2, 3]


OPTIONS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"loss": "cross-entropy"},
    "both losses": {"loss": "both", "loss_temperature": 2.0, "hidden_weight": 0.5},
    "l1": {"sparsity": "l1"},
    "l2": {"sparsity": "l2"},
    "kl": {"sparsity": "kl"},
    "soft": {"masks": "soft", "schedule": "cosine"},
    "uniform": {"ranking": "uniform", "schedule": "linear"},
    "rows": {"ranking": "rows", "batch": 2},
    "attention": {"branches": "attention"},
    "mlp": {"branches": "mlp"},
    "full": {"backbone": "full", "backbone_lr": 1e-3, "weight_decay": 0.1, "decay": "cosine"},
    "lora": {"backbone": "lora", "backbone_lr": 1e-2, "lora_rank": 4},
    "accumulate": {"accumulate": 2, "batch": 2},
    "bf16": {"precision": "bf16"},
    "copy": {"kv_rule": "copy"},
}


class TestTrainOptions:
    """Every option trains: numbers stay finite, and what should learn has moved."""

    def run(
        self, folder: Path, blocks: torch.Tensor, gates: Any, **options: Any
    ) -> tuple[Any, list[dict[str, float]]]:
        model, teacher = load_model(folder, "float32"), load_model(folder, "float32")
        config = TrainConfig(**{"steps": 3, "budget": 0.6, "backbone": "frozen", **options})
        return model, train_gates(model, gates, blocks, config, teacher, validation=blocks[:1])

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_it_trains(
        self, tiny_llama: Path, blocks: torch.Tensor, options: dict[str, Any]
    ) -> None:
        torch.manual_seed(0)
        gates = make_gates("scalar", 8, 64)
        before = gates.weight.detach().clone()  # type: ignore[operator]
        model, curve = self.run(tiny_llama, blocks, gates, **options)
        assert len(curve) == 3 and all(math.isfinite(row["loss"]) for row in curve)
        assert not torch.equal(before, gates.weight)
        dense = load_model(tiny_llama, "float32")
        pairs = zip(model.parameters(), dense.parameters(), strict=True)
        still = all(torch.equal(a, b) for a, b in pairs)
        assert still == (options.get("backbone", "frozen") == "frozen")
        assert math.isfinite(curve[-1]["valid"]) and curve[-1]["kl@0.75"] >= 0
        assert not any("lora" in name for name, _ in model.named_parameters()), "merged"

    def test_weights_that_are_cast_once_teach_the_same(
        self, tiny_llama: Path, blocks: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def learned() -> tuple[torch.Tensor, list[dict[str, float]]]:
            torch.manual_seed(0)
            gates = make_gates("scalar", 8, 64)
            _, curve = self.run(tiny_llama, blocks, gates, precision="bf16")
            return torch.cat([each.flatten() for each in gates.parameters()]), curve

        once, curve = learned()
        monkeypatch.setattr("gateskip.training.gate_finetune.cast_once", lambda model, _: model)
        anew, same = learned()
        assert torch.equal(once, anew) and curve == same

    def test_every_row_keeps_the_budget_by_itself(self, tiny_llama: Path) -> None:
        """One row has few words and the other many: a common threshold treats them unlike."""
        torch.manual_seed(0)
        model, gates = load_model(tiny_llama, "float32"), make_gates("scalar", 8, 64)
        block = torch.stack((torch.randint(3, 6, (64,)), torch.randint(3, 512, (64,))))
        config = TrainConfig(ranking="rows", backbone="frozen", batch=2)
        session = _Session(model, gates, block, config, model, Accelerator(cpu=True), None)
        session._rank(block)
        common = session._thresholds(0.7)
        own = session._of_rows(block, common, 0.7)
        logits = session._logits(block, common).view(8, 2, -1)

        def kept(thresholds: torch.Tensor) -> list[float]:
            entered = (logits >= thresholds.unsqueeze(-1)).float().mean(-1)  # [branches, rows]
            return (entered * session.costs.unsqueeze(1)).sum(0).tolist()

        assert own.shape == (8, 2) and kept(own) == pytest.approx([0.7, 0.7], abs=0.03)
        few, many = kept(common.unsqueeze(1))
        assert abs(few - many) > 0.05

    def test_gates_of_one_kind_of_branch_alone_learn(
        self, tiny_llama: Path, blocks: torch.Tensor
    ) -> None:
        torch.manual_seed(0)
        gates = make_gates("scalar", 8, 64)
        before = gates.weight.detach().clone()  # type: ignore[operator]
        self.run(tiny_llama, blocks, gates, branches="mlp")
        moved = [not torch.equal(a, b) for a, b in zip(before, gates.weight, strict=True)]
        assert moved == [False, True] * 4

    def test_the_published_recipe_trains_gates_that_scale(
        self, tiny_llama: Path, blocks: torch.Tensor
    ) -> None:
        torch.manual_seed(0)
        gates = make_gates("vector", 8, 64, scales=True)
        before = gates.weight.detach().clone()  # type: ignore[operator]
        _, curve = self.run(
            tiny_llama,
            blocks,
            gates,
            loss="cross-entropy",
            sparsity="l2",
            masks="hard",
            ranking="uniform",
            schedule="linear",
            backbone="full",
            kv_rule="copy",
        )
        assert not torch.equal(before, gates.weight)
        assert curve[0]["kept"] > curve[-1]["kept"], "the budget falls"

    def test_checkpointing_changes_no_gradient(
        self, tiny_llama: Path, blocks: torch.Tensor
    ) -> None:
        found = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            gates = make_gates("scalar", 8, 64)
            self.run(tiny_llama, blocks, gates, backbone="full", checkpointing=checkpointing)
            found.append(gates.weight.detach().clone())  # type: ignore[operator]
        torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


ALONE = {"GATESKIP_NATIVE": "0"}
"""Students write on torch's kernels: compiling others takes longer than all that is tested here."""
PROCESSES = Path(__file__).parent / "two_processes.py"
TRAININGS = (
    *("gate-frozen", "gate-full", "gate-lora", "gate-on-policy"),
    *("heal", "heal-on-policy", "heal-resumed"),
)


@pytest.fixture(scope="module")
def together(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes, and one with the same global batch, made of `two_processes.py`."""
    out = tmp_path_factory.mktemp("together")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--num_processes=2"]
    where = ["--num_machines=1", "--main_process_port=0"]
    plain = ["--mixed_precision=no", "--dynamo_backend=no"]
    script = [str(PROCESSES), str(tiny_llama), str(out)]
    done = subprocess.run(
        [*launch, *where, *plain, *script],
        capture_output=True,
        text=True,
        env={**os.environ, **ALONE, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with pytest.MonkeyPatch.context() as patch:  # one process: this one, which has its libraries
        replaced = ((Loop, "_block"), (_Session, "advance"), (_Healing, "advance"))
        for loop, method in (*replaced, (_Healing, "writer")):
            patch.setattr(loop, method, getattr(loop, method))
        for name, value in ALONE.items():
            patch.setenv(name, value)
        build._loaded.cache_clear()
        patch.setattr(sys, "argv", script)
        patch.setenv(sharding.VARIABLE, "false")
        AcceleratorState._reset_state()
        runpy.run_path(str(PROCESSES), run_name="__main__")
        sharding.fsdp_requested.cache_clear()
        AcceleratorState._reset_state()
    build._loaded.cache_clear()
    return out


@pytest.mark.slow
@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_as_one_with_their_batch(
    together: Path, how: str, training: str
) -> None:
    if (how, training) == ("fsdp", "gate-frozen"):
        pytest.skip("refused: nothing but gates trains")
    one = torch.load(together / f"ddp-{training}-1-0.pt")
    ranks = [torch.load(together / f"{how}-{training}-2-{rank}.pt") for rank in range(2)]
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name]), f"both processes have one {name}"
    apart = [(weight - ranks[0]["weights"][name]).abs() for name, weight in one["weights"].items()]
    mean = float(torch.cat([each.flatten() for each in apart]).mean())
    assert mean < 2e-6, "a fiftieth of one step: learning rates, too, are those of one process"
    assert ranks[0]["curve"] == ranks[1]["curve"]
    assert ranks[0]["seen"] != ranks[1]["seen"], "each process has blocks of its own"
    assert len(one["curve"]) == len(ranks[0]["curve"]) >= 4
    for row, wanted in zip(ranks[0]["curve"], one["curve"], strict=True):
        assert row.keys() == wanted.keys()
        for name, value in row.items():
            # Validation of gates is under hard masks: a token at its threshold is in or out
            masked = "@" in name or (name == "valid" and "gate" in training)
            assert value == pytest.approx(wanted[name], abs=0.05 if masked else 1e-3), name
    assert any(not torch.equal(w, one["before"][n]) for n, w in one["weights"].items())


@pytest.mark.slow
def test_a_shared_out_student_writes_with_the_weights_that_it_has_by_then(together: Path) -> None:
    wrote = [
        torch.load(together / f"{run}.pt")["wrote"]
        for run in ("ddp-heal-on-policy-1-0", "ddp-heal-on-policy-2-0", "fsdp-heal-on-policy-2-0")
    ]
    one, ddp, fsdp = (found[0] for found in wrote)
    before = torch.load(together / "ddp-heal-2-0.pt")["harmed"]
    assert ddp == pytest.approx(one, abs=1e-3) and fsdp == pytest.approx(ddp, abs=1e-5)
    assert abs(ddp - before) > 1e-4, "it has trained"


@pytest.mark.slow
def test_what_each_process_holds_of_a_shared_out_model(together: Path) -> None:
    held = torch.load(together / "fsdp-heal-2-0.pt")["held"]
    whole = torch.load(together / "ddp-heal-2-0.pt")["held"]
    assert 0.45 * whole < held < 0.6 * whole, "weights and moments of what trains"


@pytest.mark.slow
def test_what_cannot_be_shared_out_is_refused(together: Path) -> None:
    told = torch.load(together / "refused-2-0.pt")
    assert "launch without --use_fsdp" in told["frozen"] and "trains only gates" in told["frozen"]
    assert "packed weights" in told["scales"]
    assert "fp16 is not supported" in told["fp16"]


class TestPrice:
    """What a branch pays for the compute it takes."""

    def learned(self, gains: list[float], costs: list[float]) -> torch.Tensor:
        """Gradients of gate biases when entering branch i lowers the loss by `gains[i]`."""
        bias = torch.nn.Parameter(torch.zeros(3))
        prices = torch.tensor(costs)
        rule = TrainMask(prices, torch.zeros(3), prices=prices)
        gained = torch.zeros(())
        for index, gain in enumerate(gains):
            mask = rule(SimpleNamespace(index=index), bias[index].expand(1, 20))  # type: ignore[arg-type]
            gained = gained + gain * mask.mean()
        price = BudgetPrice([bias])
        price.add_cost(rule)
        (-gained).backward()
        price.add_loss(rule)
        price.apply(Accelerator(cpu=True))
        assert bias.grad is not None
        return bias.grad

    def test_what_would_move_all_gates_is_taken_out(self) -> None:
        gradients = self.learned([3.0, 2.0, 1.0], [0.5, 0.25, 0.25])
        assert abs(float(gradients.sum())) < 1e-6
        assert gradients[1] < 0 < gradients[2], "dearer by the multiply-add rises, cheaper falls"

    def test_branches_of_equal_worth_rest(self) -> None:
        torch.testing.assert_close(self.learned([2.0, 1.0, 1.0], [0.5, 0.25, 0.25]), torch.zeros(3))
