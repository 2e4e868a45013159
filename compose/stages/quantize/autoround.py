"""The stage `autoround`: learns whether each weight is rounded up or down (arXiv 2309.05516)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compose.stages.base import ModelShape, Role, Split, Stage, StageJob, StoredBits
from compose.stages.gate_transfer import carry_gates
from compose.stages.quantize.gptq_rules import refuse_cut_groups, refuse_odd_tiles
from compose.stages.quantize.linears import Bits
from compose.units import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from gateskip.quantization.grid import Grid

ERROR_BLOCKS = 1  # calibration block on which the rounding is measured


class AutoRound(Stage):
    """Quantize the linear layers with the library auto-round, which learns whether to round each
    weight up or down.

    Signed gradient descent moves each weight by at most one step of the quantization grid, and
    adjusts the range of each group of weights. auto-round minimizes the error in the output of each
    decoder layer.
    """

    role: ClassVar[Role] = "quantize"
    on_gpu: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("auto_round",)
    reads_data: ClassVar[tuple[Split, ...]] = ("calibration",)

    use: Literal["autoround"] = "autoround"
    """The stage's name."""

    bits: Bits = 4
    """Bits of one weight."""

    group_size: Literal[32, 64, 128] = 32
    """Number of weights that share a scale. The group size must divide the number of inputs of
    every linear layer."""

    sym: bool = False
    """Whether the quantization grid is symmetric around zero. A symmetric grid is less exact, but
    is stored in the older GPTQ format, which more programs read, such as AutoGPTQ and ONNX
    Runtime's model builder."""

    iters: int = Field(default=200, ge=1)
    """Number of steps of signed gradient descent for each decoder layer. With 1000 steps, rounding
    is more exact and takes five times as long as with 200 steps."""

    batch: int = Field(default=8, ge=1)
    """Number of calibration sequences in one step of gradient descent."""

    @model_validator(mode="after")
    def _has_a_grid(self) -> Self:
        if self.bits == 8 and not self.sym:
            raise ValueError("auto-round has 8 bits only on a symmetric grid: set sym: true")
        return self

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, `group-divides` (whole groups in every layer), and `whole-tiles`."""
        super().check(shape, before)
        if shape is not None:
            refuse_odd_tiles(shape)
            refuse_cut_groups(self.group_size, shape.linear_in_features())

    def reshape(self, shape: ModelShape) -> ModelShape:
        """The same sizes, packed."""
        return replace(shape, quantized="gptq")

    def stored_bits(self, shape: ModelShape) -> StoredBits | None:
        """Codes, and for each group a float16 scale and a zero point."""
        return StoredBits(self.bits + (16 + self.bits) / self.group_size)

    def stored_as(self) -> str | None:
        """Its format, with the bits of most weights."""
        return f"{self.use} {self.bits}-bit"

    def most_bits(self) -> int:
        """The bits of all layers."""
        return self.bits

    def held(self) -> float:
        """The model in float32 and its inputs to a layer; one layer learns at a time."""
        return 12.0

    def run(self, job: StageJob) -> dict[str, Any]:
        """Learn, and save in the GPTQ format; measures the rounding errors."""
        from transformers import AutoTokenizer

        from compose.stages.quantize.errors import layer_errors
        from compose.stages.quantize.grid_folder import as_gptq, gptq_config, write_grids
        from compose.stages.text.split_text import split_blocks

        tokenizer = AutoTokenizer.from_pretrained(job.source)
        blocks = split_blocks(job, "calibration", tokenizer)
        with _counted(job.progress, f"AutoRound, {self.bits} bits, {self.iters} steps a layer"):
            grids = self._learned(job, blocks, tokenizer)
        config = gptq_config(self.bits, self.group_size, self.sym)
        stored = {name: as_gptq(grid, self.sym) for name, grid in grids.items()}
        write_grids(job, stored, config)
        carry_gates(job)
        errors = layer_errors(job, blocks[:ERROR_BLOCKS])
        return {"bits": self.bits, "blocks": len(blocks), "layer_errors": errors}

    def _learned(self, job: StageJob, blocks: Tensor, tokenizer: Any) -> dict[str, Grid]:
        """Each layer's grid by its name, learned on token blocks [N, S]."""
        import auto_round
        import torch
        from transformers import AutoModelForCausalLM

        # Codes are recovered from the rounded weights; bfloat16 is too coarse for those of 8 bits.
        exact = self.bits == 8 or job.dtype == "float32"
        dtype = torch.float32 if exact else getattr(torch, job.dtype)
        model = AutoModelForCausalLM.from_pretrained(job.source, dtype=dtype)
        rows = [
            {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in blocks
        ]
        rounding = auto_round.AutoRound(
            model,
            tokenizer=tokenizer,
            scheme=f"W{self.bits}A16",
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            iters=self.iters,
            dataset=rows,
            seqlen=blocks.shape[1],
            nsamples=len(rows),
            batch_size=min(self.batch, len(rows)),
            device_map=job.device,
            amp=not exact,
            enable_torch_compile=False,  # a compiled graph rounds differently
            low_cpu_mem_usage=False,
            seed=job.seed,
        )
        result, _ = rounding.quantize()
        layers = {name: layer for name, layer in result.named_modules() if hasattr(layer, "scale")}
        return {name: grid_of(layer, self.bits) for name, layer in layers.items()}


@contextmanager
def _counted(progress: Progress, phase: str) -> Iterator[None]:
    """Report each decoder layer that auto-round finishes. auto-round itself only moves a progress
    bar."""
    from auto_round.compressors import orchestrator

    class Reporting(orchestrator.tqdm):  # type: ignore[misc]
        def update(self, n: float = 1) -> Any:
            shown = super().update(n)
            progress(int(self.n), int(self.total), phase)
            return shown

    original = orchestrator.tqdm
    orchestrator.tqdm = Reporting
    try:
        yield
    finally:
        orchestrator.tqdm = original


def grid_of(layer: Any, bits: int) -> Grid:
    """The grid of a layer [n, k] that auto-round has finished.

    auto-round leaves the rounded weights in the type that it computed in, float16 scales [n,
    groups], which may be negative, and zero points: [n, groups], or one number for a symmetric
    grid.
    """
    import torch

    from gateskip.quantization.grid import Grid

    weight = layer.weight.detach().float().cpu()
    scale = layer.scale.detach().float().cpu().view(len(weight), -1)
    zeros = torch.as_tensor(layer.zp, dtype=torch.float32).cpu()
    zeros = zeros.view(scale.shape) if zeros.numel() > 1 else zeros.expand_as(scale)
    steps = torch.where(scale == 0, torch.ones_like(scale), scale).unsqueeze(2)
    codes = weight.unflatten(1, (scale.shape[1], -1)) / steps + zeros.unsqueeze(2)
    codes = codes.round().clamp_(0, 2**bits - 1).to(torch.uint8)
    return Grid(codes.flatten(1), scale, -zeros * scale, bits)
