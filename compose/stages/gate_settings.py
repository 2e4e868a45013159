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
    """Ranks of shortcuts (linear maps that replace skipped branches), one for attention and one for
    MLPs. The MLP of a layer has about three times the multiply-adds of its attention."""

    attention: Rank
    """Rank of the shortcuts that replace skipped attention branches."""

    mlp: Rank
    """Rank of the shortcuts that replace skipped MLP branches."""


class GateSettings(_Group):
    """Settings of the gates, and of the shortcuts (linear maps that replace skipped branches)."""

    kind: GateKind = "scalar"
    """How a gate computes its output from the input of its attention or MLP branch. A gate of the
    kind `scalar` computes one number for each token. The kinds `random`, `static` (one constant for
    each branch), `router` (Mixture-of-Depths) and `exit` (CALM) are baselines for comparisons."""

    rank: int = Field(default=8, ge=2)
    """Rank of gates of the kind `low-rank`, and hidden width of gates of the kind `mlp`."""

    shortcut: Rank | ShortcutRanks = 32
    """Rank of the linear map (shortcut) that replaces a skipped attention or MLP branch. With rank
    0, a skipped branch adds nothing to the residual stream, as in the GateSkip paper. The linear
    map is fitted to the output of the branch by least squares, then trained together with the
    gates. `shortcut: {attention: 32, mlp: 128}` sets one rank for attention and one for MLPs."""

    scales: bool = False
    """Whether gates also scale the outputs of attention and MLP branches that are not skipped. With
    `scales: true`, gates change the model's predictions even if no token skips a branch."""

    place: Literal["after", "before"] = "after"
    """Whether gates multiply the output of a branch (`after`) or its input (`before`); has an
    effect only with `scales: true`."""

    init: str = Field(default=WARM, min_length=1)
    """Gates before training: `warm` (computed from measured contributions of the attention and MLP
    branches), `open` (random, with outputs near 1, as in the GateSkip paper), or the path of a
    gates.safetensors file."""

    kv: Literal["project", "copy"] = "project"
    """Keys and values of a token that skips the attention of a layer: computed in the same layer
    (`project`), or copied from the layer below (`copy`)."""


class TrainSettings(_Group):
    """Settings for training the gates, alone or together with the weights of the model."""

    steps: int = Field(default=TRAIN.steps, ge=0)
    """Number of optimizer steps for training the gates. With `steps: 0`, the gates are not trained
    and stay as `init` sets them."""

    budget: Budget = 0.8
    """Lowest budget in training: the share of the attention and MLP multiply-adds that is computed
    at the end of training."""

    schedule: Literal["sampled", "linear", "cosine"] = TRAIN.schedule
    """How the share of compute that training allows falls from 1 to `budget`: linearly (`linear`),
    along a cosine (`cosine`), or drawn at random in each step above a falling lower bound
    (`sampled`)."""

    loss: Literal["distill", "cross-entropy", "both"] = TRAIN.loss
    """Loss for training the gates: distance from the dense model's predictions (`distill`),
    cross-entropy on the training text (`cross-entropy`), or the sum of both (`both`)."""

    loss_temperature: float = Field(default=TRAIN.loss_temperature, gt=0)
    """Temperature of the distillation loss."""

    hidden_weight: float = Field(default=TRAIN.hidden_weight, ge=0)
    """Weight, in the training loss, of the distance between the final hidden states of the trained
    model and of the dense model."""

    sparsity: Literal["none", "l1", "l2", "kl"] = TRAIN.sparsity
    """Kind of penalty on the outputs of the gates in the training loss. With `sparsity: none`, the
    gates learn only from the training budget which tokens to skip."""

    sparsity_weight: float = Field(default=TRAIN.sparsity_weight, ge=0)
    """Weight, in the training loss, of the penalty that `sparsity` sets."""

    masks: Literal["straight-through", "soft", "hard"] = TRAIN.masks
    """Values of the skip masks in training: 0 or 1 as in decoding, with the gradient of a sigmoid
    (`straight-through`); a sigmoid, so that a branch is computed in part (`soft`); or 0 or 1
    without a gradient (`hard`). `masks: hard` needs `scales: true`, because gates then learn only
    by scaling the outputs of branches."""

    ranking: Literal["global", "uniform", "rows"] = TRAIN.ranking
    """Which tokens skip a branch during training: tokens below one threshold for all branches
    (`global`), an equal share of tokens in each branch (`uniform`), or tokens below one threshold
    for each text of a batch (`rows`). With `ranking: rows`, every text of a batch meets the budget,
    as in decoding with `skip: {hold: true}`, and each training step needs a second pass."""

    branches: Literal["both", "attention", "mlp"] = TRAIN.branches
    """Which branches of each layer get gates and can be skipped: attention, MLP or both."""

    reading: bool = TRAIN.reading
    """Whether gates are trained to skip only in prompts. With `reading: true`, training cuts each
    block of text into a prompt, in which tokens skip branches, and an answer, in which no token
    skips. With `reading: true`, only the tokens of the answer count in the training loss."""

    backbone: Literal["frozen", "lora", "full"] = "full"
    """Which weights of the model are trained together with the gates: none (`frozen`), low-rank
    updates that are merged into the weights at the end (`lora`), or all weights except the
    embeddings (`full`)."""

    lora_rank: int = Field(default=TRAIN.lora_rank, ge=1)
    """Rank of the low-rank weight updates with `backbone: lora`."""

    lr: float = Field(default=TRAIN.lr, gt=0)
    """Learning rate of the gates."""

    backbone_lr: float = Field(default=TRAIN.backbone_lr, gt=0)
    """Learning rate of the model's weights; has no effect with `backbone: frozen`."""

    weight_decay: float = Field(default=TRAIN.weight_decay, ge=0)
    """Weight decay of the model's weights."""

    warmup: Share = TRAIN.warmup
    """Length of the warm-up, in which the learning rates rise, as a share of the training steps."""

    decay: Literal["linear", "cosine"] = TRAIN.decay
    """How the learning rates fall to a tenth of their maximum after the warm-up: linearly or along
    a cosine."""

    length: int = Field(default=256, ge=8)
    """Length of one training sequence, in tokens."""

    batch: int = Field(default=TRAIN.batch, ge=1)
    """Number of training sequences in one forward and backward pass."""

    accumulate: int = Field(default=TRAIN.accumulate, ge=1)
    """Number of passes whose gradients are added up for one optimizer step (gradient accumulation).
    """

    checkpointing: bool = TRAIN.checkpointing
    """Whether the backward pass computes attention and MLP branches again instead of keeping their
    activations (gradient checkpointing), which saves memory and takes more time."""

    precision: Literal["auto", "no", "bf16", "fp16"] = TRAIN.precision
    """Mixed precision in training, named as in the library accelerate. `auto` means bf16 if the
    device computes fast in bf16."""

    on_policy: OnPolicyText | None = None
    """Settings of a second training phase, in which the model writes part of the training text
    itself and learns the dense model's predictions on this text (on-policy distillation).
    `on_policy: {}` turns this phase on with default settings."""

    validate_every: int = Field(default=100, ge=0)
    """Number of training steps between two validations, each on two blocks of the calibration text.
    With `validate_every: 0`, there is one validation, at the end of training."""


class CalibrateSettings(_Group):
    """Settings for calibrating the thresholds below which a token skips a branch."""

    allocation: Allocation = "global"
    """How a budget is distributed over the attention and MLP branches: one threshold for all
    branches (`global`), an equal share of tokens for each branch (`uniform`), or shares that depend
    on the measured sensitivity of each branch (`sensitivity`)."""

    least: Share = 0.0
    """Minimum share of tokens for which each attention and MLP branch is computed, at any budget.
    """

    most: Share = 1.0
    """Maximum share of tokens for which an attention or MLP branch is computed."""

    budgets: tuple[Budget, ...] = Field(default=DEFAULT_BUDGETS, min_length=1)
    """Budgets (shares of the attention and MLP multiply-adds that are computed) for which
    thresholds are calibrated and stored. If two neighbouring budgets, or the highest budget and 1,
    differ by more than 0.1, the calibration adds budgets between them."""

    prompt_budgets: tuple[Budget, ...] = ()
    """Budgets for prompts: shares of the attention and MLP multiply-adds that are computed for
    prompt tokens, except the last prompt token. The stage `skip` can use `prompt_budget` only if
    the stage `gate` has `prompt_budgets`. To calibrate thresholds for prompts, the stage `gate`
    first measures how much the predictions of the answer change if prompt tokens skip a branch."""

    prompt_order: PromptOrder = "harm"
    """Which branches prompt tokens skip first: branches whose skipping changes answers least for
    the compute that it saves (`harm`), or the branches of the last layers (`depth`), as in
    early-exit methods."""

    calibration_blocks: int = Field(default=16, ge=1)
    """Number of sequences on which thresholds are calibrated; each sequence has `length` tokens."""

    calibrate_on: Literal["text", "written", "both"] = "text"
    """Text on which thresholds are calibrated: the calibration text (`text`), answers that the
    model writes while it skips branches (`written`), or both (`both`). For `written` and `both`,
    the model answers prompts of the calibration text or, if this text has no prompts, of the
    training text. If neither text has prompts, a model with a chat template writes the prompts
    itself. If neither text has prompts and the model has no chat template, the beginnings of text
    blocks are used as prompts."""

    written_prompts: int = Field(default=32, ge=1)
    """Number of prompts that the model answers at each budget, to calibrate thresholds on its own
    answers."""

    written_tokens: int = Field(default=64, ge=2)
    """Maximum number of tokens in each answer that the model writes for calibration."""

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
