"""Decode stages: how a gated model is run. They make no new weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from compose.errors import RuleBroken
from compose.stages.base import UNPACKED, ModelShape, Role, Stage

COPY_BITS = {"int4": 4, "nf4": 4, "int3": 3, "int2": 2}
"""Bits of a weight in each quantized draft copy."""

WITHOUT_BUDGET = {"learned": "a draft network", "model": "a draft model"}
"""Values of `draft_weights` that compute all of their branches, and their names in messages."""

PromptBudget = Annotated[float, Field(gt=0, le=1)] | None


class DecodeStage(Stage):
    """A setting of the decoder. One that skips needs gates."""

    acts: ClassVar[Literal["weights", "decode"]] = "decode"
    role: ClassVar[Role] = "decode"

    kv_cache: Literal["model", "int8"] = "model"
    """Format of the KV cache: the float type of the model (`model`), or 8-bit integers with a scale
    for each token and head (`int8`), about half the size of bfloat16. Quality is measured with the
    same KV cache format as speed."""

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, and `decode-needs-gates`: a gate stage must come before."""
        super().check(shape, before)
        if self.skips() and not any(stage.role == "gate" for stage in before):
            raise RuleBroken("decode-needs-gates", f"no gate stage comes before {self.use}")

    def skips(self) -> bool:
        """Whether any branch is skipped."""
        return True

    def compared_with(self) -> DecodeStage | None:
        """The decode setting of the cell that this one is compared with; None is plain decoding."""
        return None


class Plain(DecodeStage):
    """Decode without skipping and without drafts (plain decoding), and set the format of the KV
    cache."""

    use: Literal["plain"] = "plain"
    """The stage's name."""

    kv_cache: Literal["model", "int8"] = "int8"
    """Format of the KV cache: 8-bit integers with a scale for each token and head (`int8`), or the
    float type of the model (`model`). Without the stage `plain`, the KV cache has the float type of
    the model."""

    def skips(self) -> bool:
        """Nothing is skipped."""
        return False


class Skip(DecodeStage):
    """Decode with skipping: each token skips the attention and MLP branches whose gates give a
    value below a calibrated threshold."""

    use: Literal["skip"] = "skip"
    """The stage's name."""

    budget: float = Field(default=0.8, gt=0, le=1)
    """Share of the attention and MLP multiply-adds that is computed; the rest is skipped. If
    `prompt_budget` is given and `budget` is not, `budget` is 1."""

    prompt_budget: PromptBudget = None
    """Share of the attention and MLP multiply-adds that is computed for prompt tokens, except the
    last prompt token. `prompt_budget` works only if the setting `prompt_budgets` of the gate stage
    is set. Without `prompt_budget`, prompt tokens skip at `budget`."""

    prompt: Literal["budget", "full"] = "budget"
    """Whether prompt tokens skip branches as `budget` sets (`budget`) or skip nothing (`full`)."""

    answer: Literal["budget", "full"] = "budget"
    """Whether answer tokens skip branches as `budget` sets (`budget`) or skip nothing (`full`)."""

    hold: bool = False
    """Whether the decoder keeps each text of a batch at the budget, and not only the average of the
    texts. With `hold: true`, the decoder adjusts the thresholds of each text to the share of
    compute that its earlier tokens used, first every 16 tokens and later every 64 tokens. `hold:
    true` makes prefill slower, because the prompt is processed in pieces of 16 to 64 tokens."""

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
            raise ValueError(
                "prompt: full and prompt_budget contradict each other: leave one of them out"
            )
        return self

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """All decoders' rules, and `budget-calibrated`."""
        super().check(shape, before)
        require_prompt_budgets(self.prompt_budget, before)


class Speculate(DecodeStage):
    """Decode with drafts (speculative decoding): a cheap method proposes tokens, and the whole
    model verifies them. Drafts do not change the decoded text."""

    example: ClassVar[Mapping[str, Any]] = {"target": "original"}

    use: Literal["speculate"] = "speculate"
    """The stage's name."""

    draft_budget: float = Field(default=1.0, gt=0, le=1)
    """Share of the attention and MLP multiply-adds that is computed for drafted tokens. With
    `draft_budget: 1`, drafted tokens skip no branch."""

    draft_weights: Literal[
        "own", "int4-head", "nf4", "int4", "int3", "int2", "learned", "model", "auto"
    ] = "auto"
    """The weights that draft tokens: the model's own weights (`own`), the model's own weights with
    a 4-bit copy of the LM head (`int4-head`), a quantized copy of all weights (bitsandbytes' `nf4`,
    or `int4`, `int3`, `int2`), the small network of the stage `draft-network` (`learned`), the
    model that `draft_model` names (`model`), or the fastest of these (`auto`). Quantized copies for
    drafts are made while the model is loaded. With `draft_weights: auto`, the speed of each kind of
    draft is measured once for each model and machine. If no draft is faster than plain decoding,
    `draft_weights: auto` decodes without drafts. If `draft_model` is given, the default of
    `draft_weights` is `model`."""

    draft_model: str | None = Field(default=None, min_length=1)
    """Another model that drafts tokens: a folder or a GGUF file (path relative to the pipeline
    file), a hub id or a short name. The draft model needs the same tokenizer as the pipeline's
    model, and the same numbers of embeddings and logits. The draft model may be compressed. Gates
    and drafts of the draft model itself are not used."""

    lookup: bool = True
    """Whether drafts are first looked up in the text: the decoder searches for an earlier
    occurrence of the last tokens, and proposes the tokens that followed there. The draft model
    proposes tokens only if look-up in the text finds nothing."""

    draft_length: Literal["auto"] | Annotated[int, Field(ge=1, le=16)] = "auto"
    """Number of tokens in each draft. With `draft_length: auto`, the decoder chooses the number of
    tokens from the measured cost and acceptance of drafts."""

    verify_budget: float = Field(default=1.0, gt=0, le=1)
    """Share of the attention and MLP multiply-adds that is computed while drafted tokens are
    verified. With `verify_budget` below 1, the decoded text equals the text of a `skip` stage with
    the same `budget`. A pipeline file with `verify_budget` below 1 must also contain a `skip` stage
    with the same `budget`, because the two variants are compared. Unless `draft_budget` is given,
    drafting computes the same share as verification."""

    prompt_budget: PromptBudget = None
    """Share of the attention and MLP multiply-adds that is computed for prompt tokens, except the
    last prompt token. The decoded text then equals the text of a `skip` stage with the same
    `prompt_budget`."""

    target: Literal["gated", "original"] = "gated"
    """The model that verifies drafted tokens: the model with gates, skipping nothing (`gated`), or
    the model before gates were added (`original`). `gated` and `original` differ only if the gates
    have `scales: true`. `target: original` is refused if the gate stage also trained the model's
    weights."""

    @model_validator(mode="before")
    @classmethod
    def _budgets_fit(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("draft_model") is not None:
            data = {"draft_weights": "model", **data}
        if (draft := data.get("draft_weights")) in WITHOUT_BUDGET:
            if data.get("draft_budget", 1) != 1:
                raise ValueError(f"{WITHOUT_BUDGET[draft]} skips nothing: leave draft_budget out")
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

    @model_validator(mode="after")
    def _the_draft_model_drafts(self) -> Self:
        if self.draft_weights == "model" and self.draft_model is None:
            raise ValueError("draft_weights: model needs draft_model, the model that drafts")
        if self.draft_model is not None and self.draft_weights not in ("model", "auto"):
            raise ValueError(
                f"draft_weights: {self.draft_weights} does not use draft_model: leave one of them"
                " out"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_before_draft_models(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The parameters; without a draft model those of earlier versions, whose keys stay."""
        values: dict[str, Any] = handler(self)
        if self.draft_model is None:
            values.pop("draft_model", None)
        return values

    def identity(self, file_sha256: Mapping[str, str]) -> dict[str, Any]:
        """As for every stage; the hash of the draft model, where it is given, replaces its name."""
        identity = super().identity(file_sha256)
        if (sha256 := file_sha256.get("draft_model")) is not None:
            identity["params"]["draft_model"] = {"sha256": sha256}
        return identity

    def skips(self) -> bool:
        """Whether drafts, verification or prompts have a budget below 1."""
        return min(self.draft_budget, self.verify_budget, self.prompt_budget or 1) < 1

    def compared_with(self) -> DecodeStage | None:
        """The decode setting with the same text but without drafts: plain decoding, or skipping at
        `verify_budget` and `prompt_budget`."""
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
                "draft_weights: learned needs a draft-network stage before it",
                fix="add draft-network after all other stages that change weights",
            )
        bits, most = COPY_BITS.get(self.draft_weights), _most_bits(shape, before)
        if bits is not None and most <= bits:
            raise RuleBroken(
                "draft-of-packed",
                f"a {bits}-bit copy of {most}-bit weights drafts no faster than the weights",
                fix=f"set draft_weights: {_cheaper(most)}",
            )
        trained = [stage for stage in before if getattr(stage, "backbone", "frozen") != "frozen"]
        if self.target == "original" and any(stage.role == "gate" for stage in trained):
            raise RuleBroken(
                "original-is-gone",
                "target: original, but the gate stage also trained the backbone",
                fix="set backbone: frozen in the gate stage, or leave target out",
            )


def require_prompt_budgets(budget: float | None, before: tuple[Stage, ...]) -> None:
    """Raise RuleBroken where the gates are not calibrated for a prompt budget this low."""
    gates = [stage for stage in before if stage.role == "gate"]
    if budget is None or budget == 1 or not gates:
        return
    budgets: tuple[float, ...] = getattr(gates[-1], "prompt_budgets", ())
    if min(budgets, default=1.0) > budget:
        stated = f"down to {min(budgets):g} only" if budgets else "for no prompt budget"
        raise RuleBroken(
            "budget-calibrated",
            f"prompt_budget is {budget:g}, but the gates are calibrated {stated}",
            fix=f"add {budget:g} to prompt_budgets of the gate stage",
        )


def _most_bits(shape: ModelShape | None, before: tuple[Stage, ...]) -> int:
    """Bits of the model's largest weights: those of the last quantizer, or those that the model's
    config states."""
    quantizers = [stage for stage in before if stage.role == "quantize"]
    if quantizers:
        return quantizers[-1].most_bits()
    return (shape and shape.packed_bits) or UNPACKED


def _cheaper(most: int) -> str:
    """The draft copies that have fewer bits than such weights, in words."""
    copies = [name for name, bits in COPY_BITS.items() if bits < most]
    return ", ".join([*copies, "int4-head", "own"]) + " or auto"
