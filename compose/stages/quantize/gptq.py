"""The stage `gptq`: packs weights by GPTQ, calibrated on text (arXiv 2210.17323)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compose.errors import RuleBroken
from compose.stages.base import (
    AS_STORED,
    UNPACKED,
    ModelShape,
    Role,
    Split,
    Stage,
    StageJob,
    StoredBits,
)
from compose.stages.gate_transfer import carry_gates
from compose.stages.quantize.gptq_rules import WHOLE_ROW, refuse_cut_groups, refuse_odd_tiles
from compose.stages.quantize.linears import (
    Bits,
    linear_names,
    matching,
    refuse_tied_head,
)

if TYPE_CHECKING:
    from torch import Tensor

UNKNOWN = ("phi3", "gpt_neox")
"""Architectures among our families that gptqmodel cannot quantize from the file: its tables lack
Phi3's MLP, and it does not write GPT-NeoX's LM head. Others that its tables lack are found when the
stage runs."""

ERROR_BLOCKS = 1  # calibration block on which GPTQ's rounding is measured


class Gptq(Stage):
    """Quantize the linear layers with GPTQ, which adjusts the remaining weights of a layer to
    compensate for each rounding error."""

    role: ClassVar[Role] = "quantize"
    on_gpu: ClassVar[bool] = True
    version: ClassVar[int] = 3
    libraries: ClassVar[tuple[str, ...]] = ("gptqmodel", "optimum")
    reads_data: ClassVar[tuple[Split, ...]] = ("calibration",)

    use: Literal["gptq"] = "gptq"
    """The stage's name."""

    bits: Bits = 4
    """Bits of one weight."""

    group_size: Literal[-1, 32, 64, 128, 256, 512, 1024] = 32
    """Number of weights that share a scale. The group size must divide the number of inputs of
    every linear layer. With `group_size: -1`, all weights of a row share a scale."""

    sym: bool = False
    """Whether the quantization grid is symmetric around zero. A symmetric grid is less exact, but
    is stored in the older GPTQ format, which more programs read, such as AutoGPTQ and ONNX
    Runtime's model builder."""

    act_order: bool = False
    """Whether weight columns with large activations are quantized first, which is more exact but
    makes decoding slower."""

    damp: float = Field(default=0.01, gt=0, lt=1)
    """Damping of GPTQ: the mean of the Hessian's diagonal, times `damp`, is added to the diagonal.
    """

    foem: float | None = Field(default=None, gt=0, le=1)
    """The parameter beta of FOEM, a variant of GPTQ that also compensates for first-order errors.
    The authors of FOEM use a beta of 0.1 to 0.25. Without `foem`, the stage uses plain GPTQ."""

    skip: tuple[str, ...] = ()
    """Linear layers that are not quantized in any decoder layer, identified by the end of their
    names, such as `down_proj` or `self_attn.v_proj`."""

    mixed: dict[str, Bits] = Field(default_factory=dict)
    """Linear layers that get other numbers of bits, identified by the end of their names, such as
    `{down_proj: 8}` or `{layers.0.self_attn.v_proj: 8}`. gptqmodel, vLLM and gateskip can load a
    folder with mixed bits, but transformers without gptqmodel cannot."""

    lm_head: Bits | None = None
    """Bits of the LM head. Without `lm_head`, the LM head is not quantized. An LM head that shares
    its weights with the embedding cannot be quantized. transformers without gptqmodel cannot load a
    folder with a quantized LM head."""

    batch: int = Field(default=1, ge=1)
    """Number of calibration sequences that are processed together."""

    @model_validator(mode="after")
    def _has_a_kernel(self) -> Self:
        if self.group_size == WHOLE_ROW and not self.sym:
            raise ValueError(
                "a scale for a whole row (group_size: -1) needs a symmetric grid (sym: true):"
                " gptqmodel's CPU kernel gives wrong products on other grids"
            )
        return self

    def groups_know_activation(self) -> bool:
        """Whether groups are quantized in order of activation while columns keep their order."""
        return not self.act_order and self.group_size != WHOLE_ROW

    def is_mixed(self) -> bool:
        """Whether layers differ in bits, or the LM head is one of them."""
        return bool(self.mixed or self.lm_head)

    def beyond_optimum(self) -> bool:
        """Whether gptqmodel has to be called directly: optimum has no mixed bits and no FOEM."""
        return self.is_mixed() or self.foem is not None

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, `group-divides` (whole groups in every layer), and `whole-tiles`."""
        super().check(shape, before)
        if shape is None:
            return
        widths = shape.linear_in_features(self.skip)
        refuse_odd_tiles(shape)
        if self.beyond_optimum() and shape.model_type in UNKNOWN:
            raise self._unknown(shape.model_type)
        if self.lm_head:
            widths["lm_head"] = shape.hidden_size
            refuse_tied_head(shape)
        refuse_cut_groups(self.group_size, widths)

    def reshape(self, shape: ModelShape) -> ModelShape:
        """The same sizes, packed."""
        return replace(shape, quantized="gptq")

    def stored_as(self) -> str | None:
        """Its format, with the bits of most weights."""
        return f"{self.use} {self.bits}-bit"

    def most_bits(self) -> int:
        """The most bits of any layer; 16 where some are not packed."""
        return UNPACKED if self.skip else max([self.bits, *self.mixed.values()])

    def stored_bits(self, shape: ModelShape) -> StoredBits | None:
        """Codes, and for each group a float16 scale and a zero point."""
        if self.is_mixed() or self.skip:
            return None
        shared = 0.0 if self.group_size == WHOLE_ROW else (16 + self.bits) / self.group_size
        return StoredBits(self.bits + shared)

    def held(self) -> float:
        """The source as a mapped file, and the packed result, whose errors are measured at the end.
        The embedding is not packed."""
        return AS_STORED + max(1.0, self.most_bits() / 8)

    def worked_on(self, shape: ModelShape, length: int) -> float:
        """The widest matrix and its second moments in float32; through optimum, the whole model."""
        whole = 5.0 * shape.weights if shape.model_type in UNKNOWN else 0.0
        inner, outer = shape.intermediate_size, shape.hidden_size
        return whole + 4.0 * inner * (inner + outer)

    def run(self, job: StageJob) -> dict[str, Any]:
        """Quantize, and save in the AutoGPTQ format; measures the rounding errors."""
        from transformers import AutoTokenizer

        from compose.artifacts.folder import require_model
        from compose.stages.quantize.by_gptqmodel import has_table_of, quantize_by_gptqmodel
        from compose.stages.quantize.counted import counted
        from compose.stages.quantize.errors import layer_errors
        from compose.stages.text.split_text import split_blocks

        blocks = split_blocks(job, "calibration", AutoTokenizer.from_pretrained(job.source))
        with counted(job.progress, self._count(job), f"GPTQ, {self.bits} bits"):
            kind = require_model(job.source)["model_type"]
            beyond = self.beyond_optimum()
            if has_table_of(kind) and (beyond or kind not in UNKNOWN):
                quantize_by_gptqmodel(self, job, blocks)
            elif beyond:
                raise self._unknown(kind)
            else:
                self._through_optimum(job, blocks)
        carry_gates(job)
        errors = layer_errors(job, blocks[:ERROR_BLOCKS])
        return {"bits": self.bits, "blocks": len(blocks), "layer_errors": errors}

    @staticmethod
    def _unknown(model_type: str) -> RuleBroken:
        """The error for an architecture that gptqmodel does not know."""
        return RuleBroken(
            "layout-known",
            "mixed, lm_head and foem need gptqmodel's own reader, which does not know the layers"
            f" of {model_type}",
            fix="leave mixed, lm_head and foem out",
        )

    def _count(self, job: StageJob) -> int:
        """How many linear layers are quantized."""
        linears, head = linear_names(job)
        inside = [name for name in linears if name not in head]
        return len(inside) - len(matching(self.skip, inside)) + (self.lm_head is not None)

    def _through_optimum(self, job: StageJob, blocks: Tensor) -> None:
        """Quantize all layers to the same bits. optimum finds the layers and calls gptqmodel; it
        holds the whole model in memory."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            job.source,
            dtype=getattr(torch, job.dtype),
            quantization_config=self._config(job, blocks),
        )
        as_autogptq(model)
        model.save_pretrained(job.target)

    def _config(self, job: StageJob, blocks: Tensor) -> Any:
        """The settings as transformers takes them; calibration blocks [N, S] go in as tokens."""
        import torch
        from transformers import GPTQConfig

        rows = blocks.unsqueeze(1)  # [N, 1, S]
        texts: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
        return GPTQConfig(
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            desc_act=self.act_order,
            act_group_aware=self.groups_know_activation(),
            damp_percent=self.damp,
            dataset=texts,
            model_seqlen=blocks.shape[1],
            batch_size=self.batch,
            pad_token_id=0,  # required with batches; blocks have one length, so nothing is padded
            format="gptq",
            modules_in_block_to_quantize=self._modules(job),
        )

    def _modules(self, job: StageJob) -> list[list[str]] | None:
        """The linear layers of a decoder layer that are quantized, in order; None for all."""
        if not self.skip:
            return None
        linears, _ = linear_names(job)
        inside = [name.partition(".0.")[2] for name in linears if ".0." in name]
        skipped = matching(self.skip, inside)
        return [[name] for name in inside if name not in skipped]


def as_autogptq(model: Any) -> None:
    """Store zero points and config in the form that AutoGPTQ and related software read.

    optimum packs for gptqmodel's own format, whose zero points are one higher. On a symmetric grid
    they can be stored in the older form. On another grid a zero point of 0 has no older form, and
    the config keeps `gptq_v2`. The calibration text is removed from the config.
    """
    from gptqmodel.utils.model import hf_convert_gptq_v2_to_v1_format

    gptq, config = model.hf_quantizer.optimum_quantizer, model.config.quantization_config
    _, converted = hf_convert_gptq_v2_to_v1_format(
        model, gptq.sym, gptq.bits, gptq.quant_linear, gptq.format, gptq.meta
    )
    if converted:
        config.format = "gptq"
    config.dataset, config.tokenizer = None, None
