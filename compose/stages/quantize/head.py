"""The stage `pack-head`: the LM head in 8 bits, whatever the format of the other weights."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from compose.errors import RuleBroken
from compose.stages.base import ModelShape, Role, Stage, StageJob


class PackHead(Stage):
    """Round the LM head to 8 bits while the model is loaded, so that decoding reads half as many
    bytes of the LM head.

    The stored weights do not change, so other programs can still load the model folder. The LM head
    is a large share of the weights of a small model, so the gain in speed is often worth the loss
    of quality.
    """

    role: ClassVar[Role] = "head"

    use: Literal["pack-head"] = "pack-head"
    """The stage's name."""

    format: Literal["int8"] = "int8"
    """Format of the LM head: 8-bit integers with one scale for every 32 weights."""

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, `head-packed-twice`, and `whole-tiles`: a head has whole groups."""
        super().check(shape, before)
        if any(getattr(stage, "lm_head", None) for stage in before):
            raise RuleBroken(
                "head-packed-twice",
                "an earlier quantizer has packed the LM head",
                fix="leave pack-head out, or lm_head of the quantizer",
            )
        if shape is not None and shape.hidden_size % 32:
            raise RuleBroken(
                "whole-tiles", f"the LM head has {shape.hidden_size} inputs, not a multiple of 32"
            )

    def run(self, job: StageJob) -> dict[str, Any]:
        """Write the same files and a note; record the rounded head's relative error."""
        from compose.artifacts.folder import copy_source
        from compose.store import write_json
        from gateskip.quantization.folders import load_model
        from gateskip.quantization.head import HEAD_FILE, rounded

        copy_source(job.source, job.target, job.dtype, link=True)
        weight = load_model(job.source).get_output_embeddings().weight.detach().float()
        error = (rounded(weight) - weight).norm() / weight.norm()
        write_json(job.target / HEAD_FILE, {"format": self.format})
        return {"format": self.format, "relative_error": round(float(error), 6)}
