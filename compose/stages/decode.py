"""Decode stages: how a gated model is run. They make no new weights."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compose.errors import RuleBroken
from compose.stages.base import ModelShape, Role, Stage


class DecodeStage(Stage):
    """A setting of the decoder; where it skips, it needs gates to decide by."""

    acts: ClassVar[Literal["weights", "decode"]] = "decode"
    role: ClassVar[Role] = "decode"

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, and `decode-needs-gates`: a gate stage came before."""
        super().check(shape, before)
        if self.skips() and not any(stage.role == "gate" for stage in before):
            raise RuleBroken("decode-needs-gates", f"no gate stage comes before {self.use}")

    def skips(self) -> bool:
        """Whether any branch is skipped."""
        return True


class Skip(DecodeStage):
    """Skip branches where the gates stay under the thresholds of a budget."""

    use: Literal["skip"] = "skip"
    """The stage's name."""

    budget: float = Field(default=0.8, gt=0, le=1)
    """The share of the branches' multiply-adds that is computed."""


class Speculate(DecodeStage):
    """Draft tokens cheaply, verify them with the whole model: the same text, sooner."""

    use: Literal["speculate"] = "speculate"
    """The stage's name."""

    draft_budget: float = Field(default=0.5, gt=0, le=1)
    """The share of multiply-adds that a draft computes; 1 skips nothing."""

    draft_weights: Literal["own", "int4-head", "nf4", "int4"] = "own"
    """What drafts: the model's own weights; these but for a 4-bit copy of the LM head
    (`int4-head`); or a 4-bit copy of all of them that is made while loading: bitsandbytes' `nf4`,
    or `int4`, whose rounding is fitted to what the model reads."""

    lookup: bool = False
    """Whether what followed the last tokens earlier in the text is proposed ahead of a draft."""

    draft_length: Literal["auto"] | Annotated[int, Field(ge=1, le=16)] = "auto"
    """Tokens drafted before each verification; `auto` sets it from measured cost and acceptance."""

    target: Literal["gated", "original"] = "gated"
    """What verifies: the model with its gates at full compute, or the one that they were put on.
    The two are one unless gates scale; a backbone that learned along cannot be undone."""

    def skips(self) -> bool:
        """Only drafts below a budget of 1 do."""
        return self.draft_budget < 1

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """As for all decoders, and `draft-of-packed`, `original-is-gone`."""
        super().check(shape, before)
        copied = self.draft_weights in ("nf4", "int4")
        if copied and any(stage.role == "quantize" for stage in before):
            raise RuleBroken(
                "draft-of-packed",
                "after a quantizer, no 4-bit copy can draft",
                fix="set draft_weights: own or int4-head",
            )
        trained = [stage for stage in before if getattr(stage, "backbone", "frozen") != "frozen"]
        if self.target == "original" and any(stage.role == "gate" for stage in trained):
            raise RuleBroken(
                "original-is-gone",
                "target: original after gates whose backbone learned along",
                fix="set backbone: frozen in the gate stage, or leave target out",
            )
