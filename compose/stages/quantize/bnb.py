"""The stage `bnb`: packs weights by bitsandbytes, without calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compose.errors import RuleBroken
from compose.stages.base import UNPACKED, ModelShape, Role, Stage, StageJob, StoredBits
from compose.stages.gate_transfer import carry_gates
from compose.stages.quantize.linears import DeviceMap, linear_names, matching, refuse_tied_head

BLOCK_INPUTS = 64  # that share a scale in bitsandbytes' 4-bit formats


class Bnb(Stage):
    """Quantize the linear layers with the library bitsandbytes, without calibration text."""

    role: ClassVar[Role] = "quantize"
    version: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("bitsandbytes",)
    example: ClassVar[Mapping[str, Any]] = {"format": "nf4"}

    use: Literal["bnb"] = "bnb"
    """The stage's name."""

    format: Literal["nf4", "fp4", "int8"]
    """Format of the quantized weights: 4-bit values for normally distributed weights (`nf4`), 4-bit
    floats (`fp4`), or 8-bit integers with outlier columns in 16 bits (`int8`). In the formats `nf4`
    and `fp4`, 64 weights share a scale."""

    double_quant: bool = False
    """Whether the scales of `nf4` and `fp4` weights are quantized, too, which saves 0.4 bits per
    weight."""

    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type in which products with 4-bit weights are computed; by default, the data type of the
    model."""

    threshold: float | None = Field(default=None, ge=0)
    """Absolute value above which an activation counts as an outlier; applies only to `format:
    int8`. Without `threshold`, activations above 6 count as outliers."""

    lm_head: bool = False
    """Whether the LM head is quantized, too. An LM head that shares its weights with the embedding
    cannot be quantized."""

    skip: tuple[str, ...] = ()
    """Linear layers that are not quantized, identified by the end of their names, such as
    `down_proj` or `0.mlp.up_proj`."""

    device_map: DeviceMap | None = None
    """The argument `device_map` of `from_pretrained`, used while the layers are quantized. With
    `device_map: auto`, the model is placed in GPU memory first, then in main memory."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.format == "int8" and (self.double_quant or self.compute_dtype):
            raise ValueError("double_quant and compute_dtype apply only to nf4 and fp4")
        if self.format != "int8" and self.threshold is not None:
            raise ValueError("threshold applies only to int8")
        return self

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, `whole-tiles`, and `head-is-tied`."""
        super().check(shape, before)
        if shape is None:
            return
        for name, width in shape.linear_in_features(self.skip).items():
            if self.format != "int8" and width % BLOCK_INPUTS:
                raise RuleBroken(
                    "whole-tiles",
                    f"{name} has {width} inputs, not a multiple of {BLOCK_INPUTS}",
                    fix=f"set round_to: {BLOCK_INPUTS} where it was pruned, or use gptq or int8",
                )
        if self.lm_head:
            refuse_tied_head(shape)

    def reshape(self, shape: ModelShape) -> ModelShape:
        """The same sizes, packed."""
        return replace(shape, quantized="bitsandbytes")

    def stored_as(self) -> str | None:
        """Its format, with the bits of most weights."""
        return self.format

    def most_bits(self) -> int:
        """8 or 4; 16 where some layers are not packed."""
        packed = 8 if self.format == "int8" else 4
        return UNPACKED if self.skip else packed

    def stored_bits(self, shape: ModelShape) -> StoredBits | None:
        """Codes and float32 scales: one per row, or one for 64 weights, which `double_quant` packs
        into 8 bits."""
        if self.skip or self.lm_head:
            return None
        if self.format == "int8":
            return StoredBits(8.0)
        scales = 8 / BLOCK_INPUTS if self.double_quant else 32 / BLOCK_INPUTS
        return StoredBits(4 + scales)

    def run(self, job: StageJob) -> dict[str, Any]:
        """Load through bitsandbytes, save the result, and measure the rounding errors."""
        import torch
        from transformers import AutoModelForCausalLM

        from compose.artifacts.folder import probe_ids
        from compose.stages.quantize.errors import layer_errors

        job.progress(0, 1, f"packing to {self.format}")
        model = AutoModelForCausalLM.from_pretrained(
            job.source,
            dtype=getattr(torch, job.dtype),
            quantization_config=self._config(job),
            device_map=self.device_map,
        )
        model.save_pretrained(job.target)
        carry_gates(job)
        return {"format": self.format, "layer_errors": layer_errors(job, probe_ids(job.source))}

    def _config(self, job: StageJob) -> Any:
        """The settings as transformers takes them."""
        from transformers import BitsAndBytesConfig

        linears, head = linear_names(job)
        skipped = matching(self.skip, linears)
        settings: dict[str, Any] = {}
        if self.skip or self.lm_head:  # else transformers leaves out the head by itself
            settings["llm_int8_skip_modules"] = skipped + ([] if self.lm_head else head)
        if self.format == "int8":
            outliers = {} if self.threshold is None else {"llm_int8_threshold": self.threshold}
            return BitsAndBytesConfig(load_in_8bit=True, **outliers, **settings)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.format,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=self.compute_dtype or job.dtype,
            **settings,
        )
