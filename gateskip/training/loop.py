"""The training loop of all fine-tunes: parameters, text order, learning rates, checkpoints.

A fine-tune defines one step (`advance`) and the state that it adds to a checkpoint (`state`). A run
that was killed resumes from its last checkpoint, which is written atomically.

Several processes (`accelerate launch`) train one model: each reads other blocks of a step, and
gradients are averaged. By default each process holds the whole model (DDP); with `--use_fsdp` the
trained weights are sharded (sharding.py).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gateskip.kernels.autotune import is_fast_in_bfloat16
from gateskip.model.families import backbone
from gateskip.model.progress import Progress
from gateskip.quantization.packed_linear import DenseLinear, PackedLinear
from gateskip.training import sharding
from gateskip.training.objectives import distill_loss, divergence
from gateskip.training.recipe import PACKED, LoopConfig
from gateskip.training.rollouts import Rollouts, Write
from gateskip.training.scales import open_scales

Row = dict[str, float]
CHECKPOINT = "training.pt"
CHECKPOINT_S = 180.0
"""Seconds between checkpoints, at most, where steps are long."""
MOST_SAVING = 0.05
"""Share of the time that such checkpoints may take."""


def precision(setting: str) -> str:
    """Mixed precision, by accelerate's names. `auto` is bf16 where that is faster, otherwise
    `no`."""
    if setting != "auto":
        return setting
    return "bf16" if is_fast_in_bfloat16(training_device().type) else "no"


_chosen: ContextVar[str | None] = ContextVar("training_device", default=None)


@contextmanager
def training_on(device: str) -> Iterator[None]:
    """Within this context fine-tunes run on this device."""
    token = _chosen.set(device)
    try:
        yield
    finally:
        _chosen.reset(token)


def training_device() -> torch.device:
    """The device that fine-tunes run on: that of `training_on`; elsewhere the CUDA device if there
    is one, else the CPU."""
    return torch.device(_chosen.get() or ("cuda" if torch.cuda.is_available() else "cpu"))


def refuse_cpu_layers(model: nn.Module, device: torch.device) -> None:
    """Refuse to move layers to a device on which their kernels cannot compute.

    Raises ValueError, naming the first such layer, where `device` is not a CPU.
    """
    if device.type == "cpu":
        return
    for name, module in model.named_modules():
        gptq = hasattr(module, "qweight") and hasattr(module, "g_idx")
        if gptq or isinstance(module, PackedLinear):
            raise ValueError(
                f"{name} ({type(module).__name__}) is packed for kernels of a CPU, and training"
                f" would move it to {device}: train before quantizing, hide the device"
                " (CUDA_VISIBLE_DEVICES=) to train on the CPU, or heal with backbone: scales"
            )


def adapt(model: Any, config: LoopConfig, dense: Any | None = None) -> Any | None:
    """Let the config's parameters require gradients; returns peft's wrapper under `lora`.

    `dense` is the model before packing: codes that train begin near its weights.
    """
    if config.backbone in PACKED:
        open_scales(model, dense if config.backbone == "codes" else None)
        return None
    model.requires_grad_(config.backbone == "full")
    if config.backbone == "full":  # the loss passes no gradient into the LM head
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    if config.backbone != "lora":
        return None
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear as LoraLinear

    named = backbone(model).layers.named_modules()
    linears = [name for name, part in named if isinstance(part, (nn.Linear, DenseLinear))]
    rank = config.lora_rank
    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=linears, init_lora_weights=True
    )
    settings._register_custom_module({DenseLinear: LoraLinear})
    with warnings.catch_warnings():  # of layers that peft itself does not know
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
        return get_peft_model(model, settings)


class Loop:
    """The state of one fine-tune, and its steps until they are done.

    The learning-rate schedule is this project's own: transformers' linear and cosine schedules with
    warm-up begin at a rate of 0 or shift the decay by one step, and only the cosine one can end at
    a tenth. Their values would change the result of every stored step.
    """

    config: LoopConfig

    def __init__(
        self, model: Any, blocks: Tensor, config: LoopConfig, accelerator: Accelerator
    ) -> None:
        """Blocks [N, S] of token ids; the parameters that require gradients are trained."""
        refuse_cpu_layers(model, accelerator.device)
        self.model, self.blocks = model, blocks
        self.config, self.accelerator = config, accelerator
        self.step, self.curve = 0, list[Row]()
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        policy = config.on_policy
        self.rollouts = None if policy is None else Rollouts(policy, config, blocks, accelerator)
        self.optimizer: Any = None  # set by the fine-tune, which knows its groups of parameters
        self.schedule: Any = None
        self.shards: sharding.Shards | None = None
        self._saved_at, self._saving_s = time.monotonic(), 0.0

    def shard(self, module: nn.Module, replicated: Iterable[nn.Parameter] = ()) -> nn.Module:
        """The module that trains; with `--use_fsdp` each process holds a shard of it.

        `trained` then names those shards. Parameters in `replicated` stay whole in every process;
        `average` their gradients.
        """
        if not sharding.fsdp_requested() or self.accelerator.num_processes == 1:
            return module
        sharding.refuse(self.config, self.accelerator.mixed_precision)
        self.model.to(self.accelerator.device)
        self.shards = sharding.Shards(module, self.accelerator.device, replicated)
        self.trained = {name: self.shards.shard_of(p) for name, p in self.trained.items()}
        return self.shards.module  # type: ignore[no-any-return]

    def prepare(self, module: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        """Module and optimizer as accelerate trains them; a sharded module is not copied."""
        if self.shards is None:
            prepared: tuple[Any, Any] = self.accelerator.prepare(module, optimizer)
            return prepared
        single = self.accelerator.prepare_model(module, evaluation_mode=True)  # precision alone
        return single, self.accelerator.prepare(optimizer)

    def step_rates(self) -> None:
        """Advance the schedule by one, after a step of the optimizer.

        accelerate's own schedule advances by the number of processes: with two, rates would warm up
        and decay twice as fast.
        """
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()

    def average(self, parameters: Iterable[Tensor]) -> None:
        """Average over processes the gradients of parameters that no wrapper averages."""
        for parameter in parameters if self.shards is not None else ():
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def mean(self, *values: float) -> list[float]:
        """Each number's mean over all processes."""
        if self.accelerator.num_processes == 1:
            return list(values)
        numbers = torch.tensor(values, device=self.accelerator.device)
        means: list[float] = self.accelerator.reduce(numbers, "mean").tolist()
        return means

    def collect(self) -> None:
        """Write the trained weights into the model, in every process."""
        if self.shards is not None:
            self.shards.collect()

    def begin(self) -> None:
        """Work before the first step."""

    def advance(self) -> Row:
        """One optimizer step; its row of the curve."""
        raise NotImplementedError

    def writer(self, draw: float) -> Write:
        """A function that continues prompts with the model as it is now. `draw`, uniform in [0, 1),
        chooses the decode settings where there are several."""
        raise NotImplementedError

    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.config.steps

    def run(self, work: Path | None, progress: Progress | None) -> list[Row]:
        """Step until finished, starting from the last checkpoint in `work`; returns the curve."""
        self.resume(work)
        if not self.curve:
            self.begin()
        while not self.finished():
            rates = self._rates()
            started = time.perf_counter()
            if self.rollouts is not None and self.rollouts.due(self.step):
                self.collect()  # the model itself writes
                self.rollouts.renew(self.step, self.writer)
            row = self.advance()
            self.curve.append(row)
            if progress is not None:
                speed = self._tokens_of_a_step() / (time.perf_counter() - started)
                measured = {name: value for name, value in row.items() if name != "step"}
                numbers = measured | rates | {"tokens_per_s": speed}
                progress(self.step, self.config.steps, "training", detail="", **numbers)
            if work is not None and self._is_due():
                started = time.monotonic()
                self.save(work)
                self._saved_at = time.monotonic()
                self._saving_s = self._saved_at - started
        return self.curve

    def _is_due(self) -> bool:
        """Whether a checkpoint is due, by steps or by time. Several processes go by steps alone:
        their clocks differ, and all of them take part in a checkpoint."""
        if self.step % self.config.checkpoint_every == 0:
            return True
        patience = max(CHECKPOINT_S, self._saving_s / MOST_SAVING)
        late = time.monotonic() - self._saved_at > patience
        return late and self.accelerator.num_processes == 1

    def _rates(self) -> Row:
        """The learning rate of each group of parameters, by its name in a curve."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return dict(zip(("lr", "backbone_lr"), rates, strict=False))

    def _tokens_of_a_step(self) -> int:
        """Tokens that one step reads, all processes together."""
        passes = self.config.accumulate * self.accelerator.num_processes
        return int(passes * self.config.batch * self.blocks.shape[1])

    def optimizer_of(self, groups: list[dict[str, Any]]) -> tuple[Any, Any]:
        """AdamW over groups of parameters, and the schedule of their learning rates."""
        optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.95), weight_decay=self.config.weight_decay, fused=True
        )
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)

    def _rate(self, step: int) -> float:
        """Factor of the learning rates at a step: linear warm-up, then decay to a tenth."""
        rise = max(1, round(self.config.warmup * self.config.steps))
        if step < rise:
            return (step + 1) / rise
        left = max(0.0, (self.config.steps - step) / max(1, self.config.steps - rise))
        if self.config.decay == "cosine":
            left = (1 - torch.cos(torch.tensor(left * torch.pi)).item()) / 2
        return 0.1 + 0.9 * left

    def on_policy(self, part: int) -> bool:
        """Whether one pass of this step reads text that the student wrote."""
        return self.rollouts is not None and self.rollouts.reads(self.step, part)

    def distance(
        self, student: Tensor, teacher: Tensor, temperature: float, on_policy: bool
    ) -> Tensor:
        """Mean divergence of the student's logits [N, V] from the teacher's: that of distillation;
        or with `on_policy`, on text that the student wrote, the one that the config names."""
        policy = self.config.on_policy
        if policy is None or not on_policy:
            return distill_loss(student, teacher, temperature)
        return divergence(student, teacher, policy.divergence, policy.top_k)

    def _block(self, part: int) -> Tensor:
        """Blocks [batch, S] of one pass of this step."""
        rollouts = self.rollouts if self.on_policy(part) else None
        blocks = self.blocks if rollouts is None else rollouts.blocks
        return blocks[self.chosen(part, len(blocks))].to(self.accelerator.device)

    def chosen(self, part: int, count: int) -> Tensor:
        """Indices [batch] of one pass's blocks, among `count`; each epoch has a new order."""
        config = self.config
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        done = (self.step * config.accumulate + part) * world + rank
        rows = []
        for number in range(done * config.batch, (done + 1) * config.batch):
            order = torch.Generator().manual_seed(config.seed * 7_919 + number // count)
            rows.append(torch.randperm(count, generator=order)[number % count])
        return torch.stack(rows)

    # -- checkpoints

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors and plain values."""
        return {
            "step": self.step,
            "curve": self.curve,
            "trained": sharding.whole(self.trained),
            "optimizer": sharding.whole(self.optimizer.state_dict()),
            "schedule": self.schedule.state_dict(),
            "rollouts": None if self.rollouts is None else self.rollouts.blocks,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the result of `state`."""
        self.step, self.curve = state["step"], state["curve"]
        self.put_back(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.shards is not None:
            sharding.shard_state(self.optimizer.optimizer)
        self.schedule.load_state_dict(state["schedule"])
        if self.rollouts is not None:
            self.rollouts.blocks = state["rollouts"]

    def put_back(self, weights: dict[str, Tensor]) -> None:
        """Set the trained parameters to these values, by name."""
        if self.shards is not None:
            self.shards.module.reshard()  # else a forward pass would still see the old ones
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(sharding.like(weights[name], parameter))

    def save(self, work: Path) -> None:
        """Write the state; the old checkpoint stays until the new one is whole."""
        main = self.accelerator.is_main_process
        if not main and self.shards is None:
            return
        state = self.state()  # gathered from all processes, where sharded
        if not main:
            return
        work.mkdir(parents=True, exist_ok=True)
        unfinished = (work / CHECKPOINT).with_suffix(".tmp")
        torch.save(state, unfinished)
        unfinished.replace(work / CHECKPOINT)

    def resume(self, work: Path | None) -> None:
        """Restore a checkpoint in `work`, if there is one."""
        if work is not None and (work / CHECKPOINT).exists():
            self.restore(torch.load(work / CHECKPOINT, weights_only=True))
