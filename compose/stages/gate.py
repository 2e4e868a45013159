"""The stage `gate`: a gate at every branch decides, token by token, whether it may be skipped."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from compose.errors import UserError
from compose.stages.base import ModelShape, Role, Split, Stage, StageJob
from compose.stages.memory import AS_STORED, TRAINED, training_bytes
from compose.stages.on_policy import OnPolicyText, as_settings, require_room
from compose.stages.prompts import prompts_to_answer
from gateskip.calibration.settings import DEFAULT_BUDGETS, Allocation, PromptOrder
from gateskip.training.recipe import RECIPES, TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from gateskip.calibration.budgets import CalibratedBudgets
    from gateskip.gates.base import Gates

GateKind = Literal[
    "scalar", "vector", "low-rank", "shared", "mlp", "random", "static", "router", "exit"
]
Budget = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Rank = Annotated[int, Field(ge=0)]
WARM, OPEN = "warm", "open"
WARM_BLOCKS = 24  # of the training text: about ten tokens for each weight of a gate of 576
SHORTCUT_BLOCKS = 64
SENSITIVITY_BLOCKS = 4
HARM_BLOCKS = 8  # a pass over half of the model for each branch of it
VALIDATION_BLOCKS = 2
SUMS = 2  # products of a branch's inputs with each other, and with its outputs
LOGITS = 5  # copies of a block's that exist at once
TRAIN = TrainConfig()  # each default stands there, once


class ShortcutRanks(BaseModel):
    """Ranks of shortcuts by kind of branch: an MLP costs three times what attention does."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    attention: Rank
    """Of attention branches."""

    mlp: Rank
    """Of MLP branches."""


class Gate(Stage):
    """Attach gates to every attention and MLP branch, fine-tune them, calibrate thresholds."""

    role: ClassVar[Role] = "gate"
    on_gpu: ClassVar[bool] = True
    version: ClassVar[int] = 7
    reads_data: ClassVar[tuple[Split, ...]] = ("train", "calibration")

    use: Literal["gate"] = "gate"
    """The stage's name."""

    recipe: Literal["ours", "paper"] = "ours"
    """Defaults of everything below: ours, or the published ones (training/recipe.py lists them)."""

    # -- what a gate is

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

    # -- how they are trained

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

    kv: Literal["project", "copy"] = "project"
    """Keys and values of a skipped token: projected by its own layer, or the layer below's."""

    # -- how thresholds are calibrated

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

    @model_validator(mode="before")
    @classmethod
    def _fill_from_recipe(cls, values: Any) -> Any:
        recipe = values.get("recipe", "ours") if isinstance(values, dict) else None
        preset = RECIPES.get(recipe) if isinstance(recipe, str) else None
        return {**preset, **values} if preset else values

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.place == "before" and not self.scales:
            raise ValueError("place: before multiplies a branch's input, so it needs scales: true")
        if self.masks == "hard" and not self.scales and self.steps:
            raise ValueError("masks: hard teach gates nothing unless they scale: set scales: true")
        if self.scales and self.init == WARM:
            raise ValueError("gates that scale must start open: set init: open")
        require_room(self.on_policy, self.length)
        if self.on_policy is not None and self.loss == "cross-entropy":
            raise ValueError("on_policy learns from the dense model: set loss: distill or both")
        if self.reading and self.on_policy is not None:
            raise ValueError("reading: true learns from given answers: leave on_policy out")
        if self.reading and not self.prompt_budgets:
            raise ValueError("reading: true is for prompts: name prompt_budgets")
        if self.reading and self.prompt_order == "depth":
            raise ValueError("reading: true ranks branches by harm: leave prompt_order out")
        if self.prompt_order == "depth" and not self.prompt_budgets:
            raise ValueError("prompt_order: depth is for prompts: name prompt_budgets")
        if self.least > self.most:
            raise ValueError(f"least: {self.least} is above most: {self.most}")
        return self

    @field_validator("budgets", "prompt_budgets")
    @classmethod
    def _distinct(cls, budgets: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if len(set(budgets)) < len(budgets):
            raise ValueError(f"{info.field_name} names a budget twice")
        return budgets

    def tolerates(self, rule: str) -> bool:
        """Gates alone can learn on packed weights: their gradients do not pass into them."""
        return rule == "gate-after-quantize" and self.backbone == "frozen"

    def held(self) -> float:
        """The model, its teacher, and what trains of it; or the file as it is mapped."""
        return AS_STORED if self._computes_as_stored() else TRAINED[self.backbone]

    def worked_on(self, shape: ModelShape, length: int) -> float:
        """A training step, and what a warm start has of a block: logits that it differentiates,
        and sums of all branches; or states and a layer's sums that shortcuts are fitted to; and an
        LM head that is widened."""
        logits = 4.0 * LOGITS * self.length * shape.vocab_size
        kept = training_bytes(shape, self.batch * self.length, self.length)
        sums_of_layer = 4.0 * 2 * shape.hidden_size**2
        warm = shape.num_layers * sums_of_layer if self.init == WARM else 0.0
        step = logits + warm + (kept / shape.num_layers if self.checkpointing else kept)
        states = 4.0 * SHORTCUT_BLOCKS * self.length * shape.hidden_size
        sums = states + SUMS * sums_of_layer
        head = 4.0 * shape.vocab_size * shape.hidden_size if self._computes_as_stored() else 0.0
        return head + max(step, sums)

    def files(self) -> dict[str, Path]:
        """The gates file to start from, where one is named."""
        return {} if self.init in (WARM, OPEN) else {"init": Path(self.init)}

    def run(self, job: StageJob) -> dict[str, Any]:
        """Gates beside the model: attach, fine-tune, calibrate; the backbone moves if asked."""
        from compose.artifacts.packed_folder import load_as_stored
        from gateskip.checkpoint import GateFile, save_gates
        from gateskip.model.norms import has_folded_norms
        from gateskip.quantization.packed_linear import accelerate_linears
        from gateskip.training.loop import training_device

        model = load_as_stored(job.source, widen=not self._computes_as_stored())
        train, calibration = self._blocks(job)
        if self.backbone == "frozen":
            model.requires_grad_(False)
        if self.backbone == "frozen" and training_device().type == "cpu":
            accelerate_linears(model)  # unpacks 4-bit weights faster than their own modules do
        gates, sensitivity = self._start(job, model, train)
        if self.reading:
            self._measure_harm(job, model, gates, calibration)
        curve = self._train(job, model, gates, train, calibration)
        if gates.shortcuts is not None:
            gates.shortcuts.settle()
        gates.folded = has_folded_norms(model)  # a full backbone trains its norms, too
        found = self.calibrate(job, model, gates, calibration, sensitivity)
        self._save_backbone(job, model)
        record: dict[str, Any] = {
            "training": curve,
            "kept": {str(budget): round(share, 4) for budget, share in sorted(found.kept.items())},
            "train_tokens": self.steps * self.accumulate * self.batch * self.length,
        }
        if found.prompts is not None:
            shares = sorted(found.prompts.kept.items())
            record["kept_of_prompts"] = {str(budget): round(share, 4) for budget, share in shares}
        if found.phases:
            apart = sorted(found.phases.items())
            record["kept_phases"] = {str(budget): dict(shares) for budget, shares in apart}
        training = {"parameters": self.model_dump(mode="json") | {"init": Path(self.init).name}}
        file = GateFile.of(gates, self.kv, found, sensitivity, training)
        save_gates(job.target, file)
        return record

    def _computes_as_stored(self) -> bool:
        """Whether the model stays in the type of its file. The engine decodes otherwise in bfloat16
        than in float32, and so does who writes text with it."""
        return self.backbone == "frozen" and self.on_policy is None and self.calibrate_on == "text"

    def _blocks(self, job: StageJob) -> tuple[Tensor, Tensor]:
        """Token blocks [N, length] to train on, and to calibrate on."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(job.source)
        wanted = max(self.steps * self.accumulate * self.batch, SHORTCUT_BLOCKS)
        calibration = job.blocks("calibration", tokenizer, self.length, self.calibration_blocks)
        train = job.blocks("train", tokenizer, self.length, wanted + len(calibration))
        return unseen(train, calibration), calibration

    def _start(self, job: StageJob, model: Any, train: Tensor) -> tuple[Gates, list[float] | None]:
        """Gates to begin with, and the branches' sensitivities where they are needed."""
        from gateskip.calibration.fit_shortcuts import fit_shortcuts
        from gateskip.calibration.warm_start import sensitivities, warm_start
        from gateskip.gates.kinds import make_gates
        from gateskip.model.families import find_branches

        count, width = len(find_branches(model)), model.config.hidden_size
        ranks = self._ranks([branch.kind for branch in find_branches(model)])
        if max(ranks) >= width:
            raise UserError(
                f"shortcut: {max(ranks)} is no low rank for a model {width} wide",
                fix="set shortcut: 32, or 0 for none",
            )
        sizes = {"rank": self.rank} if self.kind in ("low-rank", "mlp") else {}
        if self.init in (WARM, OPEN):
            _seed(job.seed)
            gates = make_gates(self.kind, count, width, sizes, self.scales, self.place)
        else:
            gates = self._read(sizes, model)
        gates.attach(model)
        if max(ranks) and gates.shortcuts is None:
            job.progress(0, 1, "fitting shortcuts")
            gates.shortcuts = fit_shortcuts(model, train[:SHORTCUT_BLOCKS], ranks)
        if self.init == WARM:
            return warm_start(
                model,
                train[:WARM_BLOCKS],
                kv_rule=self.kv,
                progress=job.progress,
                gates=gates,
                checkpointing=self.checkpointing,
            )
        if self.allocation != "sensitivity":
            return gates, None
        blocks = train[:SENSITIVITY_BLOCKS]
        return gates, sensitivities(model, blocks, checkpointing=self.checkpointing)

    def _ranks(self, kinds: list[str]) -> list[int]:
        """The rank of each branch's shortcut, by the branches' kinds."""
        asked = self.shortcut
        if isinstance(asked, int):
            return [asked] * len(kinds)
        return [asked.mlp if kind == "mlp" else asked.attention for kind in kinds]

    def _read(self, sizes: dict[str, int], model: Any) -> Gates:
        """The gates of the file that `init` names, made to fit the model's norms."""
        from gateskip.checkpoint import read_gates
        from gateskip.gates.norms import fit_norms
        from gateskip.model.families import find_branches

        path, count, width = Path(self.init), len(find_branches(model)), model.config.hidden_size
        try:
            gates = read_gates(path, self.kind, sizes=sizes, scales=self.scales, place=self.place)
        except ValueError as error:
            raise UserError(
                str(error), fix=f"name a file of {self.kind} gates, or set init: warm"
            ) from error
        if (gates.branches, gates.hidden_size) != (count, width):
            raise UserError(
                f"the gates in {path.name} are for {gates.branches} branches of"
                f" {gates.hidden_size} inputs, but the model has {count} of {width}",
                fix="set init: warm, or name gates that were made for this model",
            )
        try:
            fit_norms(gates, model)
        except ValueError as error:
            raise UserError(
                f"{path.name} does not fit the model: {error}",
                fix="set init: warm, or fold the file's model into it"
                " (gateskip.gates.norms.fold_norms_into_gates)",
            ) from error
        return gates

    def _train(
        self, job: StageJob, model: Any, gates: Gates, train: Tensor, calibration: Tensor
    ) -> list[dict[str, float]]:
        from gateskip.quantization.folders import load_model
        from gateskip.training.gate_finetune import train_gates

        if self.steps == 0:
            return []
        shared = {field.name for field in fields(TrainConfig)} & set(type(self).model_fields)
        chosen = {name: getattr(self, name) for name in shared - {"on_policy"}}
        config = TrainConfig(
            **chosen, kv_rule=self.kv, seed=job.seed, on_policy=as_settings(self.on_policy)
        )
        teacher = None if self.backbone == "frozen" else load_model(job.dense, "float32")
        validation = calibration[:VALIDATION_BLOCKS]
        return train_gates(model, gates, train, config, teacher, job.work, job.progress, validation)

    def calibrate(
        self,
        job: StageJob,
        model: Any,
        gates: Gates,
        blocks: Tensor,
        sensitivity: list[float] | None,
        gone: frozenset[int] = frozenset(),
    ) -> CalibratedBudgets:
        """Thresholds for every budget on blocks [N, S] or on what the model writes, and for those
        between them; no token enters the branches `gone`."""
        from gateskip.calibration.thresholds import calibrate_everywhere
        from gateskip.model.families import find_branches
        from gateskip.training.written_calibration import calibrate_written

        kinds = [branch.kind for branch in find_branches(model)]
        skippable = kinds if self.branches == "both" else [self.branches]
        gates = gates.requires_grad_(False)
        settings: dict[str, Any] = {
            "allocation": self.allocation,
            "sensitivity": sensitivity,
            "least": self.least,
            "most": self.most,
            "closed": frozenset(i for i, kind in enumerate(kinds) if kind not in skippable),
            "progress": job.progress,
        }
        found = calibrate_everywhere(model, gates, blocks, self.budgets, self.kv, gone, **settings)
        found = replace(found, prompts=self._for_prompts(job, model, gates, blocks, gone, settings))
        if self.calibrate_on == "text":
            return found
        prompts, stops = prompts_to_answer(job, model, blocks, self.written_prompts)
        return calibrate_written(
            model,
            gates,
            found,
            prompts,
            self.budgets,
            new_tokens=self.written_tokens,
            stops=stops,
            text=blocks if self.calibrate_on == "both" else None,
            kv_rule=self.kv,
            gone=gone,
            seed=job.seed,
            **settings,
        )

    def _for_prompts(
        self,
        job: StageJob,
        model: Any,
        gates: Gates,
        blocks: Tensor,
        gone: frozenset[int],
        settings: dict[str, Any],
    ) -> CalibratedBudgets | None:
        """Thresholds for tokens of prompts, on blocks [N, S]; None where none are asked for."""
        from gateskip.calibration.reading import calibrate_prompts

        if not self.prompt_budgets:
            return None
        if self.prompt_order == "harm":
            self._measure_harm(job, model, gates, blocks)
        shared = {name: settings[name] for name in ("least", "most", "closed", "progress")}
        return calibrate_prompts(
            model,
            gates,
            blocks,
            self.prompt_budgets,
            self.kv,
            gone,
            self.prompt_order,
            **shared,
        )

    def _measure_harm(self, job: StageJob, model: Any, gates: Gates, blocks: Tensor) -> None:
        """What the absence of branches from prompts costs answers, unless that is known of these
        very weights."""
        from gateskip.calibration.reading import answer_harm

        if gates.harm is None or self.backbone != "frozen":
            some = blocks[:HARM_BLOCKS]
            gates.harm = answer_harm(model, gates, some, self.kv, job.seed, job.progress)

    def _save_backbone(self, job: StageJob, model: Any) -> None:
        """A trained backbone is written; a frozen one is the source's files, untouched."""
        import torch

        from compose.artifacts.folder import copy_source

        if self.backbone == "frozen":
            copy_source(job.source, job.target, job.dtype, link=True)
        else:
            model.to(getattr(torch, job.dtype)).save_pretrained(job.target)


def unseen(train: Tensor, calibration: Tensor) -> Tensor:
    """Blocks [N, S] to train on, without those of calibration: on text that was trained on, gates
    keep another share than elsewhere. Where that would remove most of the text, all of it stays."""
    from torch import tensor

    held = {tuple(row) for row in calibration.tolist()}
    left = train[tensor([tuple(row) not in held for row in train.tolist()])]
    return left if 2 * len(left) >= len(train) else train


def _seed(seed: int) -> None:
    """Seed torch's generator, which new gates are drawn from."""
    import torch

    torch.manual_seed(seed)
