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
    """Ranks of shortcuts for attention branches and for MLP branches. An MLP has about three times
    the multiply-adds of attention."""

    attention: Rank
    """Rank for attention branches."""

    mlp: Rank
    """Rank for MLP branches."""


class GateSettings(_Group):
    """Settings of the gates, and of the shortcut that replaces a skipped branch."""

    kind: GateKind = "scalar"
    """How a gate computes its output from the input of the branch. `scalar` gates give one number
    for each token and branch. `random`, `static` (one constant for each branch), `router`
    (Mixture-of-Depths) and `exit` (CALM) are baselines for comparisons."""

    rank: int = Field(default=8, ge=2)
    """Rank of `low-rank` gates, and width of the hidden layer of `mlp` gates."""

    shortcut: Rank | ShortcutRanks = 32
    """Rank of the linear map (shortcut) that replaces a skipped branch. With 0, a skipped branch
    adds nothing, as in the GateSkip paper. The map is fitted to the branch by least squares, then
    trained with the gates. `{attention: 32, mlp: 128}` sets the ranks of both kinds of branches."""

    scales: bool = False
    """Whether gates also scale the output of branches that are not skipped. With `true`, gates
    change the model even if nothing is skipped."""

    place: Literal["after", "before"] = "after"
    """With `scales: true`: whether gates multiply a branch's output (`after`) or its input
    (`before`)."""

    init: str = Field(default=WARM, min_length=1)
    """Initial gates: `warm` (computed from measured contributions of the branches), `open` (random,
    with outputs near 1, as in the GateSkip paper), or the path of a gates.safetensors."""

    kv: Literal["project", "copy"] = "project"
    """Keys and values of a token that skips an attention branch: computed in this layer
    (`project`), or copied from the layer below (`copy`)."""


class TrainSettings(_Group):
    """How gates are trained, alone or together with the model's weights (backbone)."""

    steps: int = Field(default=TRAIN.steps, ge=0)
    """Number of optimizer steps. With 0, the gates stay as `init` sets them."""

    budget: Budget = 0.8
    """Lowest budget in training: the share of the branches' multiply-adds that is computed at the
    end of training."""

    schedule: Literal["sampled", "linear", "cosine"] = TRAIN.schedule
    """How the training budget changes from 1 to `budget`: it falls (`linear`, `cosine`), or each
    step draws a random budget above a falling lower bound (`sampled`)."""

    loss: Literal["distill", "cross-entropy", "both"] = TRAIN.loss
    """Training loss: distance from the dense model's predictions (`distill`), loss of the text
    (`cross-entropy`), or their sum (`both`)."""

    loss_temperature: float = Field(default=TRAIN.loss_temperature, gt=0)
    """Temperature of the distillation loss."""

    hidden_weight: float = Field(default=TRAIN.hidden_weight, ge=0)
    """Weight of the distance between the final hidden states of the model and those of the dense
    model."""

    sparsity: Literal["none", "l1", "l2", "kl"] = TRAIN.sparsity
    """Penalty on the gates' outputs. With `none`, gates learn to skip only from the training
    budgets."""

    sparsity_weight: float = Field(default=TRAIN.sparsity_weight, ge=0)
    """Weight of the penalty `sparsity` in the loss."""

    masks: Literal["straight-through", "soft", "hard"] = TRAIN.masks
    """How thresholds mask branches during training. `hard` masks pass no gradient, so they need
    `scales: true`."""

    ranking: Literal["global", "uniform", "rows"] = TRAIN.ranking
    """How training chooses the tokens that skip: by one threshold for all branches (`global`), the
    same share of tokens in each branch (`uniform`), or one threshold for each text of a batch
    (`rows`). With `rows`, every text meets the budget, as with `skip: {hold: true}`, and each step
    needs a second pass."""

    branches: Literal["both", "attention", "mlp"] = TRAIN.branches
    """Which branches get gates and can be skipped."""

    reading: bool = TRAIN.reading
    """Whether gates are trained for skipping in prompts only. Each block of text is cut into a
    prompt, which skips, and an answer, which skips nothing. The loss counts only the answer."""

    backbone: Literal["frozen", "lora", "full"] = "full"
    """Which weights of the model are trained: none (`frozen`), low-rank updates that are merged at
    the end (`lora`), or all weights except the embeddings (`full`)."""

    lora_rank: int = Field(default=TRAIN.lora_rank, ge=1)
    """Rank of the low-rank updates of `backbone: lora`."""

    lr: float = Field(default=TRAIN.lr, gt=0)
    """Learning rate of the gates."""

    backbone_lr: float = Field(default=TRAIN.backbone_lr, gt=0)
    """Learning rate of the model's weights; without effect if they are frozen."""

    weight_decay: float = Field(default=TRAIN.weight_decay, ge=0)
    """Weight decay of the model's weights."""

    warmup: Share = TRAIN.warmup
    """Share of the steps in which the learning rates rise (warm-up)."""

    decay: Literal["linear", "cosine"] = TRAIN.decay
    """How the learning rates fall to a tenth after the warm-up."""

    length: int = Field(default=256, ge=8)
    """Tokens in one training sequence."""

    batch: int = Field(default=TRAIN.batch, ge=1)
    """Number of sequences in one pass."""

    accumulate: int = Field(default=TRAIN.accumulate, ge=1)
    """Number of passes in one optimizer step (gradient accumulation)."""

    checkpointing: bool = TRAIN.checkpointing
    """Whether branches are computed again in the backward pass (gradient checkpointing): less
    memory, more time."""

    precision: Literal["auto", "no", "bf16", "fp16"] = TRAIN.precision
    """Mixed precision of the training, by accelerate's names. `auto` is bf16 if the device computes
    bf16 fast."""

    on_policy: OnPolicyText | None = None
    """A second training phase, in which the skipping model writes part of the training text and
    learns the dense model's predictions on it. `{}` turns this phase on with default settings."""

    validate_every: int = Field(default=100, ge=0)
    """Number of steps between validations on two blocks of the calibration text. With 0, there is
    one validation at the end."""


class CalibrateSettings(_Group):
    """How thresholds are calibrated."""

    allocation: Allocation = "global"
    """How a budget is distributed over branches: one threshold for all branches (`global`), the
    same share of tokens for each branch (`uniform`), or shares that depend on the measured
    sensitivity of each branch (`sensitivity`)."""

    least: Share = 0.0
    """Minimum share of tokens for which each branch is computed, at any budget."""

    most: Share = 1.0
    """Maximum share of tokens for which a branch is computed."""

    budgets: tuple[Budget, ...] = Field(default=DEFAULT_BUDGETS, min_length=1)
    """Budgets for which thresholds are calibrated and stored. If two neighbouring budgets, or the
    highest budget and 1, differ by more than 0.1, budgets between them are added."""

    prompt_budgets: tuple[Budget, ...] = ()
    """Budgets for which thresholds for prompt tokens (except the last token) are calibrated.
    `skip: {prompt_budget: 0.8}` needs them. The calibration first measures how much skipping each
    branch in the prompt changes the predictions of the answer."""

    prompt_order: PromptOrder = "harm"
    """Which branches prompt tokens skip first: branches with the smallest measured effect on
    answers for their cost (`harm`), or the branches of the last layers (`depth`), as early exits
    do."""

    calibration_blocks: int = Field(default=16, ge=1)
    """Number of sequences, of `length` tokens each, on which thresholds are calibrated."""

    calibrate_on: Literal["text", "written", "both"] = "text"
    """Text on which thresholds are calibrated: the calibration text (`text`), answers that the
    model writes while it skips (`written`), or both. The prompts for these answers come from the
    calibration text or the training text. If neither has prompts, a chat model writes them."""

    written_prompts: int = Field(default=32, ge=1)
    """Number of prompts that the model answers at each budget."""

    written_tokens: int = Field(default=64, ge=2)
    """Maximum number of tokens in an answer."""

    @field_validator("budgets", "prompt_budgets")
    @classmethod
    def _distinct(cls, budgets: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if len(set(budgets)) < len(budgets):
            raise ValueError(f"{info.field_name} lists a budget twice")
        return budgets


GROUPS: dict[str, type[BaseModel]] = {
    "gate": GateSettings,
    "train": TrainSettings,
    "calibrate": CalibrateSettings,
}
"""The groups, by the key that opens each."""


def without_groups(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with those of each group moved beside the others. A file may write them either
    way.

    Raises:
        PydanticCustomError: a group is not a mapping, a setting is given twice, or it belongs to
            another group; `within` of its context is the place of the mistake.
    """
    flat = {name: value for name, value in values.items() if name not in GROUPS}
    for group, model in GROUPS.items():
        inside = values.get(group, {})
        if not isinstance(inside, Mapping):
            raise _mistake((group,), "expected a mapping of settings")
        for name, value in inside.items():
            if name in values:
                raise _mistake((group, name), f"{name} is given twice: here and outside {group}")
            if name not in model.model_fields and (home := _home_of(name)) is not None:
                raise _mistake((group, name), f"{name} belongs {home}")
            flat[name] = value
    return flat


def _home_of(name: str) -> str | None:
    """Where a setting belongs, in words; None where no setting has that name."""
    if name in ("use", "recipe"):
        return "outside the groups"
    return next(
        (f"in {group}" for group, settings in GROUPS.items() if name in settings.model_fields), None
    )


def _mistake(place: tuple[str, ...], message: str) -> PydanticCustomError:
    return PydanticCustomError("grouped", "{message}", {"message": message, "within": place})
