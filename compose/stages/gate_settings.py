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
    """Ranks of shortcuts by kind of branch; an MLP has about three times the multiply-adds of
    attention."""

    attention: Rank
    """Rank for attention branches."""

    mlp: Rank
    """Rank for MLP branches."""


class GateSettings(_Group):
    """The gate itself, and the replacement for a skipped branch."""

    kind: GateKind = "scalar"
    """How a gate computes its output from a branch's input; `scalar` gives one number for each
    token and branch. The last four are baselines: random, one constant for each branch (`static`),
    Mixture-of-Depths (`router`) and CALM (`exit`)."""

    rank: int = Field(default=8, ge=2)
    """Width of the bottleneck of `low-rank` and `mlp` gates."""

    shortcut: Rank | ShortcutRanks = 32
    """Rank of the linear map that replaces a skipped branch; 0 replaces it by nothing, as
    published. The map is fitted to the branch by least squares, then trained with the gates.
    `{attention: 32, mlp: 128}` gives each kind of branch its own rank."""

    scales: bool = False
    """Whether gates also multiply the output of a branch that is computed. The model at full
    compute then uses its gates, too."""

    place: Literal["after", "before"] = "after"
    """Whether scaling gates multiply a branch's output (`after`) or its input (`before`, an
    ablation)."""

    init: str = Field(default=WARM, min_length=1)
    """Initial gates: `warm` (from measured contributions of the branches), `open` (random, output
    almost 1, as published), or the path of a gates.safetensors."""

    kv: Literal["project", "copy"] = "project"
    """Keys and values of a token that skips an attention branch: `project` computes them in the
    layer itself, `copy` takes those of the layer below."""


class TrainSettings(_Group):
    """How gates, and the backbone beside them, are fine-tuned."""

    steps: int = Field(default=TRAIN.steps, ge=0)
    """Optimizer steps of the fine-tune; 0 leaves the gates as `init` made them."""

    budget: Budget = 0.8
    """Lowest budget of the fine-tune: the share of the branches' multiply-adds that it ends at."""

    schedule: Literal["sampled", "linear", "cosine"] = TRAIN.schedule
    """How the training budget moves from 1 to `budget`: drawn at random above a bound that falls
    (`sampled`), or falling itself (`linear`, `cosine`)."""

    loss: Literal["distill", "cross-entropy", "both"] = TRAIN.loss
    """Training loss: match the dense model's logits (`distill`), predict the text, or the sum of
    both."""

    loss_temperature: float = Field(default=TRAIN.loss_temperature, gt=0)
    """Temperature of the distillation."""

    hidden_weight: float = Field(default=TRAIN.hidden_weight, ge=0)
    """Weight of the distance between the final hidden states of the model and those of the dense
    model."""

    sparsity: Literal["none", "l1", "l2", "kl"] = TRAIN.sparsity
    """Penalty on the gates' outputs; with `none` only the budgets make gates rank tokens."""

    sparsity_weight: float = Field(default=TRAIN.sparsity_weight, ge=0)
    """Weight of that penalty."""

    masks: Literal["straight-through", "soft", "hard"] = TRAIN.masks
    """How thresholds mask branches while training. `hard` passes no gradient, so gates must scale.
    """

    ranking: Literal["global", "uniform", "rows"] = TRAIN.ranking
    """Which tokens are kept while training: by one threshold for all branches, by the same share in
    each branch, or by one threshold in each row. The last stops easy texts from skipping for hard
    ones, as `skip: {hold: true}` decodes; it takes a second pass a step."""

    branches: Literal["both", "attention", "mlp"] = TRAIN.branches
    """Which branches may be skipped."""

    reading: bool = TRAIN.reading
    """Whether gates are trained for prompts alone. Each block is cut into a prompt, which skips at
    the step's budget, and an answer at full compute. Only the answer is compared with the dense
    model's."""

    backbone: Literal["frozen", "lora", "full"] = "full"
    """Which of the model's own weights are trained: none, low-rank updates (merged at the end), or
    all except the embeddings."""

    lora_rank: int = Field(default=TRAIN.lora_rank, ge=1)
    """Rank of these updates."""

    lr: float = Field(default=TRAIN.lr, gt=0)
    """Learning rate of the gates."""

    backbone_lr: float = Field(default=TRAIN.backbone_lr, gt=0)
    """Learning rate of the model's own weights; unused when they are frozen."""

    weight_decay: float = Field(default=TRAIN.weight_decay, ge=0)
    """Weight decay of the model's own weights."""

    warmup: Share = TRAIN.warmup
    """Share of the steps over which the learning rates rise."""

    decay: Literal["linear", "cosine"] = TRAIN.decay
    """How the learning rates fall afterwards, to a tenth."""

    length: int = Field(default=256, ge=8)
    """Tokens in one training sequence."""

    batch: int = Field(default=TRAIN.batch, ge=1)
    """Sequences in one pass."""

    accumulate: int = Field(default=TRAIN.accumulate, ge=1)
    """Passes in one optimizer step."""

    checkpointing: bool = TRAIN.checkpointing
    """Recompute branches in the backward pass: less memory, more time."""

    precision: Literal["auto", "no", "bf16", "fp16"] = TRAIN.precision
    """Mixed precision of the training, by accelerate's names; `auto` is bf16 where the device
    computes it fast."""

    on_policy: OnPolicyText | None = None
    """A second phase in which the skipping model writes part of the text and the dense model
    corrects it. `{}` turns it on with its defaults."""

    validate_every: int = Field(default=100, ge=0)
    """Steps between validations on two blocks of the calibration text; 0 validates at the end only.
    """


class CalibrateSettings(_Group):
    """How thresholds are calibrated."""

    allocation: Allocation = "global"
    """How a budget is shared out over branches: one threshold for all (`global`), the same share
    for each (`uniform`), or shares by measured sensitivity (`sensitivity`)."""

    least: Share = 0.0
    """Minimum share of tokens that every branch keeps at any budget."""

    most: Share = 1.0
    """Maximum share of tokens that a branch keeps."""

    budgets: tuple[Budget, ...] = Field(default=DEFAULT_BUDGETS, min_length=1)
    """Budgets for which thresholds are calibrated and stored. Where two neighbours, or the highest
    and 1, are more than 0.1 apart, budgets between them are added."""

    prompt_budgets: tuple[Budget, ...] = ()
    """Budgets for which separate thresholds for a prompt's tokens (except the last) are calibrated,
    as `skip: {prompt_budget: 0.8}` uses them. The effect of each branch in prompts on answers is
    measured first, on calibration text cut into prompt and answer."""

    prompt_order: PromptOrder = "harm"
    """Which branches a prompt's tokens skip first: those with the least measured effect on answers
    for their cost (`harm`), or the last layers (`depth`), as early exits do."""

    calibration_blocks: int = Field(default=16, ge=1)
    """Sequences of `length` tokens on which thresholds are calibrated."""

    calibrate_on: Literal["text", "written", "both"] = "text"
    """Text on which thresholds are calibrated: the calibration text (`text`), answers that the
    model writes while it skips at each budget (`written`), or both. Prompts come from the
    calibration text or the training text, where one has any; otherwise a chat model writes them as
    the user."""

    written_prompts: int = Field(default=32, ge=1)
    """Prompts that are answered at each budget."""

    written_tokens: int = Field(default=64, ge=2)
    """Tokens of an answer, at most."""

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
