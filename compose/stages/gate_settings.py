"""The settings of the stage `gate`, in the three groups in which a pipeline file may write them.

    gates:
      use: gate
      gate: {kind: scalar, shortcut: 32}
      train: {steps: 300, budget: 0.6, backbone: frozen}
      calibrate: {budgets: [0.9, 0.8, 0.7]}

The names are the same with and without their group, and so is the key of the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from compose.stages.on_policy import OnPolicyText
from gateskip.calibration.settings import DEFAULT_BUDGETS, Allocation, PromptOrder
from gateskip.training.recipe import TrainConfig

GateKind = Literal[
    "scalar", "vector", "low-rank", "shared", "mlp", "random", "static", "router", "exit"
]
Budget = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Rank = Annotated[int, Field(ge=0)]
WARM, OPEN = "warm", "open"
TRAIN = TrainConfig()  # each default stands there, once


class _Group(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class ShortcutRanks(_Group):
    """Ranks of shortcuts by kind of branch: an MLP costs three times what attention does."""

    attention: Rank
    """Of attention branches."""

    mlp: Rank
    """Of MLP branches."""


class GateSettings(_Group):
    """What a gate is, and what stands in for a branch that is skipped."""

    kind: GateKind = "scalar"
    """What a gate computes from a branch's input; `scalar` is one number a token and branch. The
    last four are baselines: a coin, a constant a branch, Mixture-of-Depths, CALM."""

    rank: int = Field(default=8, ge=2)
    """Width of the bottleneck of `low-rank` and `mlp` gates."""

    shortcut: Rank | ShortcutRanks = 32
    """Rank of the linear map that replaces a branch where it is skipped; 0 is nothing, as
    published. Fitted to the branch by least squares, then trained with the gates. `{attention: 32,
    mlp: 128}` gives each kind of branch its own."""

    scales: bool = False
    """Whether gates also multiply what an entered branch adds; then the full model is a gated one.
    """

    place: Literal["after", "before"] = "after"
    """Whether gates that scale multiply a branch's output, or its input (an ablation)."""

    init: str = Field(default=WARM, min_length=1)
    """`warm` (from measured contributions), `open` (random, almost 1, as published), or the path of
    a gates.safetensors to go on from."""

    kv: Literal["project", "copy"] = "project"
    """Keys and values of a skipped token: projected by its own layer, or the layer below's."""


class TrainSettings(_Group):
    """How gates, and the model beside them, are fine-tuned."""

    steps: int = Field(default=TRAIN.steps, ge=0)
    """Optimizer steps of the fine-tune; 0 leaves the gates as `init` made them."""

    budget: Budget = 0.8
    """Share of the branches' multiply-adds that the fine-tune ends at: its lowest."""

    schedule: Literal["sampled", "linear", "cosine"] = TRAIN.schedule
    """How the budget runs from 1 to `budget`: drawn above a falling bound, or falling itself."""

    loss: Literal["distill", "cross-entropy", "both"] = TRAIN.loss
    """Match the dense model's logits, predict the text, or the sum of both."""

    loss_temperature: float = Field(default=TRAIN.loss_temperature, gt=0)
    """Temperature of the distillation."""

    hidden_weight: float = Field(default=TRAIN.hidden_weight, ge=0)
    """Weight of the distance between final hidden states of the model and the dense one."""

    sparsity: Literal["none", "l1", "l2", "kl"] = TRAIN.sparsity
    """A pull on the gates themselves; with `none` the budgets alone make them rank."""

    sparsity_weight: float = Field(default=TRAIN.sparsity_weight, ge=0)
    """Weight of that pull."""

    masks: Literal["straight-through", "soft", "hard"] = TRAIN.masks
    """How thresholds mask while training; `hard` passes no gradient, so gates must scale."""

    ranking: Literal["global", "uniform", "rows"] = TRAIN.ranking
    """One threshold for all branches while training, or the same kept share for each; or one for
    all in every row, so that easy texts do not skip for hard ones, as `skip: {hold: true}` decodes:
    a pass more a step."""

    branches: Literal["both", "attention", "mlp"] = TRAIN.branches
    """Which branches may be skipped."""

    reading: bool = TRAIN.reading
    """Whether gates learn for prompts alone: each block is cut into a prompt, which skips at the
    step's budget, and an answer at full compute, which alone is compared with the dense model's."""

    backbone: Literal["frozen", "lora", "full"] = "full"
    """What of the model's own weights learns along: nothing, low-rank updates (merged at the end),
    or all but the embeddings."""

    lora_rank: int = Field(default=TRAIN.lora_rank, ge=1)
    """Rank of those updates."""

    lr: float = Field(default=TRAIN.lr, gt=0)
    """Learning rate of the gates."""

    backbone_lr: float = Field(default=TRAIN.backbone_lr, gt=0)
    """Learning rate of the model's own weights; unused when they are frozen."""

    weight_decay: float = Field(default=TRAIN.weight_decay, ge=0)
    """Weight decay of the model's own weights."""

    warmup: Share = TRAIN.warmup
    """Share of the steps over which the learning rates rise."""

    decay: Literal["linear", "cosine"] = TRAIN.decay
    """How they fall afterwards, to a tenth."""

    length: int = Field(default=256, ge=8)
    """Tokens in one training sequence."""

    batch: int = Field(default=TRAIN.batch, ge=1)
    """Sequences in one pass."""

    accumulate: int = Field(default=TRAIN.accumulate, ge=1)
    """Passes in one optimizer step."""

    checkpointing: bool = TRAIN.checkpointing
    """Recompute branches in the backward pass: less memory, more time."""

    precision: Literal["auto", "no", "bf16", "fp16"] = TRAIN.precision
    """Mixed precision of the training, as accelerate names it; `auto` is bf16 where the device is
    fast at it."""

    on_policy: OnPolicyText | None = None
    """A second phase, in which the skipping model writes some of the text itself and the dense one
    corrects it; `{}` is that phase with its defaults."""

    validate_every: int = Field(default=100, ge=0)
    """Steps between validations on two blocks of the calibration text; 0 validates at the end."""


class CalibrateSettings(_Group):
    """How thresholds are calibrated."""

    allocation: Allocation = "global"
    """How a budget is shared out: one threshold for all, the same for each, or by measured harm."""

    least: Share = 0.0
    """Share of tokens that every branch keeps at any budget."""

    most: Share = 1.0
    """Share of tokens that a branch keeps at most."""

    budgets: tuple[Budget, ...] = Field(default=DEFAULT_BUDGETS, min_length=1)
    """The budgets for which thresholds are calibrated and stored; gaps wider than 0.1 between them,
    and to full compute, are filled with others."""

    prompt_budgets: tuple[Budget, ...] = ()
    """Budgets for which thresholds are calibrated that tokens of prompts may have instead, all but
    the last: `skip: {prompt_budget: 0.8}`. What answers need of prompts is measured first, on the
    calibration text cut in two."""

    prompt_order: PromptOrder = "harm"
    """Which branches tokens of prompts skip first: those that answers need least for what they
    cost, measured; or the last ones, as depth-wise early exits do."""

    calibration_blocks: int = Field(default=16, ge=1)
    """Sequences of `length` tokens on which thresholds are calibrated."""

    calibrate_on: Literal["text", "written", "both"] = "text"
    """What thresholds are calibrated on: the calibration text; answers that the model writes itself
    while it skips at each budget; or both. Prompts are those of the calibration text or of the
    training text, where one has any, else what the model itself asks in a user's place."""

    written_prompts: int = Field(default=32, ge=1)
    """Prompts that are answered at each budget."""

    written_tokens: int = Field(default=64, ge=2)
    """Tokens of an answer, at most."""

    @field_validator("budgets", "prompt_budgets")
    @classmethod
    def _distinct(cls, budgets: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if len(set(budgets)) < len(budgets):
            raise ValueError(f"{info.field_name} names a budget twice")
        return budgets


GROUPS: dict[str, type[BaseModel]] = {
    "gate": GateSettings,
    "train": TrainSettings,
    "calibrate": CalibrateSettings,
}
"""The groups, by the key that opens each."""


def without_groups(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with those of each group beside the others, as a file may write them, too.

    Raises:
        PydanticCustomError: a group is no mapping, a setting stands twice, or in another group's
            place; `within` of its context is the place of the mistake.
    """
    flat = {name: value for name, value in values.items() if name not in GROUPS}
    for group, model in GROUPS.items():
        inside = values.get(group, {})
        if not isinstance(inside, Mapping):
            raise _mistake((group,), "expected a mapping of settings")
        for name, value in inside.items():
            if name in values:
                raise _mistake((group, name), f"{name} stands twice: here, and beside {group}")
            if name not in model.model_fields and (home := _home_of(name)) is not None:
                raise _mistake((group, name), f"{name} belongs {home}")
            flat[name] = value
    return flat


def _home_of(name: str) -> str | None:
    """Where a setting stands, in words; None where there is none of that name."""
    if name in ("use", "recipe"):
        return "beside the groups"
    return next(
        (f"in {group}" for group, settings in GROUPS.items() if name in settings.model_fields), None
    )


def _mistake(place: tuple[str, ...], message: str) -> PydanticCustomError:
    return PydanticCustomError("grouped", "{message}", {"message": message, "within": place})
