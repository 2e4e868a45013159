"""Quantization: packed weights by bitsandbytes or GPTQ."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from compose.errors import RuleBroken
from compose.stages.base import ModelShape, Role, Split, Stage, StageJob

GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)  # the ones that GPTQ kernels are written for
WHOLE_ROW = -1


class Bnb(Stage):
    """Round the weights of the linear layers with bitsandbytes; needs no calibration."""

    role: ClassVar[Role] = "quantize"

    use: Literal["bnb"] = "bnb"
    """The stage's name."""

    format: Literal["nf4", "int8"]
    """`nf4`: 4 bits in blocks of 64; `int8`: 8 bits with outlier columns kept apart."""

    def reshape(self, shape: ModelShape) -> ModelShape:
        """The same sizes, packed."""
        return replace(shape, quantized="bitsandbytes")

    def run(self, job: StageJob) -> dict[str, Any]:
        """Load through bitsandbytes and save what it made."""
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        dtype = getattr(torch, job.dtype)
        config = (
            BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
            if self.format == "nf4"
            else BitsAndBytesConfig(load_in_8bit=True)
        )
        job.progress(0, 1, f"packing to {self.format}")
        model = AutoModelForCausalLM.from_pretrained(
            job.source, dtype=dtype, quantization_config=config
        )
        model.save_pretrained(job.target)
        carry_gates(job)
        return {"format": self.format}


class Gptq(Stage):
    """Quantize the linear layers one by one, making up for each rounding in the next weights."""

    role: ClassVar[Role] = "quantize"
    reads_data: ClassVar[tuple[Split, ...]] = ("calibration",)

    use: Literal["gptq"] = "gptq"
    """The stage's name."""

    bits: Literal[2, 3, 4, 8] = 4
    """Bits of one weight."""

    group_size: Literal[-1, 16, 32, 64, 128, 256, 512, 1024] = 64
    """Weights that share a scale; it must divide every linear layer's inputs. -1: a whole row."""

    sym: bool = True
    """Whether the grid is symmetric around zero, which more kernels can read."""

    act_order: bool = False
    """Whether columns are quantized by falling activation; more exact, slower to decode."""

    damp: float = Field(default=0.01, gt=0, lt=1)
    """Share of the Hessian's mean diagonal that is added to its diagonal."""

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, and `group-divides`: whole groups in every linear layer."""
        super().check(shape, before)
        if shape is None or self.group_size == WHOLE_ROW:
            return
        widths = shape.linear_in_features()
        cut = {name: width for name, width in widths.items() if width % self.group_size}
        if cut:
            name, width = next(iter(cut.items()))
            raise RuleBroken(
                "group-divides",
                f"group_size {self.group_size} does not divide the {width} inputs of {name}",
                fix=f"set group_size: {_nearest_group(self.group_size, widths)}",
            )

    def reshape(self, shape: ModelShape) -> ModelShape:
        """The same sizes, packed."""
        return replace(shape, quantized="gptq")

    def run(self, job: StageJob) -> dict[str, Any]:
        """Quantize through optimum, whose GPTQ is gptqmodel's; saved in the AutoGPTQ format."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

        tokenizer = AutoTokenizer.from_pretrained(job.source)
        texts = self._texts(job, tokenizer)
        job.progress(0, 1, f"GPTQ, {self.bits} bits on {len(texts)} texts")
        assert job.calibration is not None
        config = GPTQConfig(
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            desc_act=self.act_order,
            damp_percent=self.damp,
            dataset=texts,
            tokenizer=tokenizer,
            model_seqlen=job.calibration.length,
            batch_size=1,
            format="gptq",
        )
        model = AutoModelForCausalLM.from_pretrained(
            job.source, dtype=getattr(torch, job.dtype), quantization_config=config
        )
        model.save_pretrained(job.target)
        forget_texts(job)
        carry_gates(job)
        return {"bits": self.bits, "group_size": self.group_size, "texts": len(texts)}

    def _texts(self, job: StageJob, tokenizer: Any) -> list[str]:
        """Calibration blocks as text: optimum tokenizes again, so blocks are decoded."""
        blocks = job.blocks("calibration", tokenizer)
        return [tokenizer.decode(block, skip_special_tokens=True) for block in blocks]


def carry_gates(job: StageJob) -> None:
    """Gates stay in full precision: their files go along unchanged."""
    for name in ("gates.safetensors", "gateskip.json"):
        if (job.source / name).is_file():
            shutil.copyfile(job.source / name, job.target / name)


def forget_texts(job: StageJob) -> None:
    """Take the calibration texts, and what is no business of a checkpoint, out of the configs."""
    import json

    for name in ("config.json", "quantize_config.json"):
        path = job.target / name
        if not path.is_file():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        section = content.get("quantization_config", content)
        for private in ("dataset", "tokenizer"):
            section.pop(private, None)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _nearest_group(wanted: int, widths: dict[str, int]) -> int:
    """The group size nearest to `wanted` that divides all `widths`; a whole row when none does."""
    common = math.gcd(*widths.values())
    fitting = [size for size in GROUP_SIZES if common % size == 0]
    return min(fitting, key=lambda size: abs(size - wanted), default=WHOLE_ROW)
