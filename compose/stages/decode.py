"""Decode stages: how a gated model is run. They make no new weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compose.errors import RuleBroken
from compose.stages.base import UNPACKED, ModelShape, Role, Stage

COPY_BITS = {"int4": 4, "nf4": 4, "int3": 3, "int2": 2}
"""Bits of a weight in each copy that drafts."""


PromptBudget = Annotated[float, Field(gt=0, le=1)] | None


class DecodeStage(Stage):
    """A setting of the decoder; where it skips, it needs gates to decide by."""

    acts: ClassVar[Literal["weights", "decode"]] = "decode"
    role: ClassVar[Role] = "decode"

    kv_cache: Literal["model", "int8"] = "model"
    """How keys and values are kept: in the model's float type, or in 8 bits with a scale for each
    token and head, about half of what bfloat16 takes. What is scored attends to the same."""

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, and `decode-needs-gates`: a gate stage came before."""
        super().check(shape, before)
        if self.skips() and not any(stage.role == "gate" for stage in before):
            raise RuleBroken("decode-needs-gates", f"no gate stage comes before {self.use}")

    def skips(self) -> bool:
        """Whether any branch is skipped."""
        return True

    def compared_with(self) -> DecodeStage | None:
        """How the cell decodes that this one is compared with; None is plain decoding."""
        return None


class Plain(DecodeStage):
    """Compute every branch; what is set is how keys and values are kept."""

    use: Literal["plain"] = "plain"
    """The stage's name."""

    kv_cache: Literal["model", "int8"] = "int8"
    """How keys and values are kept: in 8 bits with a scale for each token and head, or in the
    model's float type, as without this stage."""

    def skips(self) -> bool:
        """None is."""
        return False


class Skip(DecodeStage):
    """Skip branches where the gates stay under the thresholds of a budget."""

    use: Literal["skip"] = "skip"
    """The stage's name."""

    budget: float = Field(default=0.8, gt=0, le=1)
    """The share of the branches' multiply-adds that is computed; 1 where only `prompt_budget` is
    given."""

    prompt_budget: PromptBudget = None
    """The share that the tokens of a prompt compute, all but the last, by thresholds that keep what
    answers need of them: the gate stage calibrates these for its `prompt_budgets`. Without it,
    `budget` is for prompts, too."""

    prompt: Literal["budget", "full"] = "budget"
    """What prompts are computed at: the budget, or full compute."""

    answer: Literal["budget", "full"] = "budget"
    """What is written is computed at: the budget, or full compute."""

    hold: bool = False
    """Whether every row holds the budget: its thresholds move with what its own earlier tokens
    kept, every 16 tokens at first and every 64 later. Prompts are then read in as many pieces,
    which is slower."""

    @model_validator(mode="before")
    @classmethod
    def _answers_are_whole(cls, data: Any) -> Any:
        alone = isinstance(data, dict) and data.get("prompt_budget") is not None
        return {"budget": 1.0, **data} if alone else data

    @model_validator(mode="after")
    def _some_phase_skips(self) -> Self:
        if self.prompt == self.answer == "full":
            raise ValueError("prompt: full and answer: full skip nothing: leave one of them out")
        if self.prompt == "full" and self.prompt_budget is not None:
            raise ValueError("prompt: full and prompt_budget say two things: leave one of them out")
        return self

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """All decoders' rules, and `budget-calibrated`."""
        super().check(shape, before)
        require_prompt_budgets(self.prompt_budget, before)


class Speculate(DecodeStage):
    """Draft tokens cheaply, verify them with the whole model: the same text, sooner."""

    example: ClassVar[Mapping[str, Any]] = {"target": "original"}

    use: Literal["speculate"] = "speculate"
    """The stage's name."""

    draft_budget: float = Field(default=1.0, gt=0, le=1)
    """The share of multiply-adds that a draft computes; 1 skips nothing."""

    draft_weights: Literal["own", "int4-head", "nf4", "int4", "int3", "int2", "learned", "auto"] = (
        "auto"
    )
    """What drafts: the model's own weights; these but for a 4-bit copy of the LM head
    (`int4-head`); or a copy of all of them that is made while loading, of packed weights too:
    bitsandbytes' `nf4`, or integers of 4, 3 or 2 bits (`int4`, `int3`, `int2`), whose rounding is
    fitted to what the model reads; or the small network that the stage `draft-network` trained
    (`learned`), which skips nothing. `auto` is the draft that is fastest on the machine, which is
    measured once for each model; where none beats plain decoding, nothing is drafted."""

    lookup: bool = True
    """Whether what followed the last tokens earlier in the text is proposed ahead of a draft."""

    draft_length: Literal["auto"] | Annotated[int, Field(ge=1, le=16)] = "auto"
    """Tokens drafted before each verification; `auto` sets it from measured cost and acceptance."""

    verify_budget: float = Field(default=1.0, gt=0, le=1)
    """The share of multiply-adds that verification computes. Below 1 the text is that of a stage
    `skip` of this budget, which the pipeline needs, too: it is what the cell is compared with.
    Drafts then compute this share as well, unless `draft_budget` says otherwise."""

    prompt_budget: PromptBudget = None
    """The share that the tokens of a prompt compute, all but the last: as in the stage `skip`. The
    text is then that of a stage `skip` with the same one."""

    target: Literal["gated", "original"] = "gated"
    """What verifies: the model with its gates at full compute, or the one that they were put on.
    The two are one unless gates scale; a backbone that learned along cannot be undone."""

    @model_validator(mode="before")
    @classmethod
    def _budgets_fit(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("draft_weights") == "learned":
            if data.get("draft_budget", 1) != 1:
                raise ValueError("a draft network skips nothing: leave draft_budget out")
            return data | {"draft_budget": 1.0}
        return {"draft_budget": data["verify_budget"], **data} if "verify_budget" in data else data

    @model_validator(mode="after")
    def _the_original_skips_nothing(self) -> Self:
        if self.target == "original" and min(self.verify_budget, self.prompt_budget or 1) < 1:
            raise ValueError(
                "the original model skips nothing: leave verify_budget and prompt_budget out, or"
                " target"
            )
        return self

    def skips(self) -> bool:
        """Only drafts, verification and prompts below a budget of 1 do."""
        return min(self.draft_budget, self.verify_budget, self.prompt_budget or 1) < 1

    def compared_with(self) -> DecodeStage | None:
        """What has the same text without drafts: plain decoding, or skipping at `verify_budget` and
        `prompt_budget`."""
        if self.verify_budget == 1 and self.prompt_budget is None:
            return None
        return Skip(
            budget=self.verify_budget, prompt_budget=self.prompt_budget, kv_cache=self.kv_cache
        )

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """All decoders' rules, `budget-calibrated`, `learned-needs-network`,
        `draft-of-packed`, `original-is-gone`."""
        super().check(shape, before)
        require_prompt_budgets(self.prompt_budget, before)
        if self.draft_weights == "learned" and not any(stage.role == "draft" for stage in before):
            raise RuleBroken(
                "learned-needs-network",
                "draft_weights: learned, and no draft-network stage comes before",
                fix="put draft-network before, after all other weight stages",
            )
        bits, most = COPY_BITS.get(self.draft_weights), _most_bits(shape, before)
        if bits is not None and most <= bits:
            raise RuleBroken(
                "draft-of-packed",
                f"a copy in {bits} bits of weights in {most} bits is no cheaper to draft with",
                fix=f"set draft_weights: {_cheaper(most)}",
            )
        trained = [stage for stage in before if getattr(stage, "backbone", "frozen") != "frozen"]
        if self.target == "original" and any(stage.role == "gate" for stage in trained):
            raise RuleBroken(
                "original-is-gone",
                "target: original after gates whose backbone learned along",
                fix="set backbone: frozen in the gate stage, or leave target out",
            )


def require_prompt_budgets(budget: float | None, before: tuple[Stage, ...]) -> None:
    """Raise RuleBroken where a prompt budget is asked of gates that calibrate none so low."""
    gates = [stage for stage in before if stage.role == "gate"]
    if budget is None or budget == 1 or not gates:
        return
    budgets: tuple[float, ...] = getattr(gates[-1], "prompt_budgets", ())
    if min(budgets, default=1.0) > budget:
        stated = f"down to {min(budgets):g}" if budgets else "for none"
        raise RuleBroken(
            "budget-calibrated",
            f"prompt_budget: {budget:g}, and the gates are calibrated {stated}",
            fix=f"set prompt_budgets: [{budget:g}] in the gate stage, or more of them",
        )


def _most_bits(shape: ModelShape | None, before: tuple[Stage, ...]) -> int:
    """Bits of the model's largest weights: of the last quantizer, or as its config states them."""
    quantizers = [stage for stage in before if stage.role == "quantize"]
    if quantizers:
        return quantizers[-1].most_bits()
    return (shape and shape.packed_bits) or UNPACKED


def _cheaper(most: int) -> str:
    """Drafts for weights of so many bits, in words."""
    copies = [name for name, bits in COPY_BITS.items() if bits < most]
    return ", ".join([*copies, "int4-head", "own"]) + " or auto"
