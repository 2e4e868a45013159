"""The stage `gate`: a gate at every branch decides which tokens may skip the branch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, model_validator

from compose.errors import UserError
from compose.stages.base import (
    AS_STORED,
    TRAINED,
    ModelShape,
    Role,
    Split,
    Stage,
    StageJob,
    training_bytes,
)
from compose.stages.finished import once
from compose.stages.gate_settings import (
    GROUPS,
    OPEN,
    WARM,
    CalibrateSettings,
    GateSettings,
    TrainSettings,
    without_groups,
)
from compose.stages.on_policy import as_settings, require_room
from compose.stages.prompts import prompts_to_answer
from compose.store import new_file
from gateskip.training.recipe import RECIPES, TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from gateskip.calibration.budgets import CalibratedBudgets
    from gateskip.gates.base import Gates

WARM_BLOCKS = 24  # of the training text: about ten tokens for each weight of a gate of 576
SHORTCUT_BLOCKS = 64
SENSITIVITY_BLOCKS = 8  # in prompts, each takes a pass over half of the model for every branch
VALIDATION_BLOCKS = 2
SUMS = 2  # products of a branch's inputs with each other, and with its outputs
LOGITS = 5  # copies of a block's that exist at once
START = "start.safetensors"  # in a step's scratch: gates before their training
RANDOM = "random"  # in it: the state of torch's generator


class Gate(CalibrateSettings, TrainSettings, GateSettings, Stage):
    """Add gates to the model: small networks that decide for each token which attention and MLP
    branches are skipped. The stage `gate` also trains the gates and calibrates their thresholds."""

    role: ClassVar[Role] = "gate"
    on_gpu: ClassVar[bool] = True
    version: ClassVar[int] = 9
    reads_data: ClassVar[tuple[Split, ...]] = ("train", "calibration")
    groups: ClassVar[Mapping[str, type[BaseModel]]] = GROUPS
    example: ClassVar[Mapping[str, Any]] = {"backbone": "frozen"}

    use: Literal["gate"] = "gate"
    """The stage's name."""

    recipe: Literal["ours", "paper"] = "ours"
    """Which default settings the stage `gate` uses: those of this project (`ours`) or those of the
    GateSkip paper (`paper`). The file gateskip/training/recipe.py lists the default settings of
    `ours` and `paper`."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_recipe(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        recipe = values.get("recipe", "ours")
        preset = RECIPES.get(recipe) if isinstance(recipe, str) else None
        return (preset or {}) | without_groups(values)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.place == "before" and not self.scales:
            raise ValueError("place: before multiplies a branch's input, so it needs scales: true")
        if self.masks == "hard" and not self.scales and self.steps:
            raise ValueError("masks: hard trains gates only where they scale: set scales: true")
        if self.scales and self.init == WARM:
            raise ValueError("gates that scale must start open: set init: open")
        require_room(self.on_policy, self.length)
        if self.on_policy is not None and self.loss == "cross-entropy":
            raise ValueError("on_policy learns from the dense model: set loss: distill or both")
        if self.reading and self.on_policy is not None:
            raise ValueError("reading: true trains on answers of the text: leave on_policy out")
        if self.reading and not self.prompt_budgets:
            raise ValueError("reading: true trains gates for prompts: set prompt_budgets")
        if self.reading and self.prompt_order == "depth":
            raise ValueError("reading: true ranks branches by sensitivity: leave prompt_order out")
        if self.prompt_order == "depth" and not self.prompt_budgets:
            raise ValueError("prompt_order: depth applies to prompts: set prompt_budgets")
        if self.least > self.most:
            raise ValueError(f"least: {self.least} is above most: {self.most}")
        return self

    def tolerates(self, rule: str) -> bool:
        """Gates alone can learn on packed weights: no gradient passes into the weights."""
        return rule == "gate-after-quantize" and self.backbone == "frozen"

    def held(self) -> float:
        """The model, its teacher, and the trained part in float32; or the file as it is mapped."""
        return AS_STORED if self._computes_as_stored() else TRAINED[self.backbone]

    def worked_on(self, shape: ModelShape, length: int) -> float:
        """The largest of a training step; a warm start's logits and sums of a block; the states and
        sums to which shortcuts are fitted; and an LM head converted to float32."""
        logits = 4.0 * LOGITS * self.length * shape.vocab_size
        saved = training_bytes(shape, self.batch * self.length, self.length)
        sums_of_layer = 4.0 * 2 * shape.hidden_size**2
        warm = shape.num_layers * sums_of_layer if self.init == WARM else 0.0
        step = logits + warm + (saved / shape.num_layers if self.checkpointing else saved)
        states = 4.0 * SHORTCUT_BLOCKS * self.length * shape.hidden_size
        sums = states + SUMS * sums_of_layer
        head = 4.0 * shape.vocab_size * shape.hidden_size if self._computes_as_stored() else 0.0
        return head + max(step, sums)

    def files(self) -> dict[str, Path]:
        """The gates file to start from, where one is named."""
        return {} if self.init in (WARM, OPEN) else {"init": Path(self.init)}

    def run(self, job: StageJob) -> dict[str, Any]:
        """Save gates beside the model: attach, fine-tune, calibrate; train the backbone where asked
        for."""
        from compose.artifacts.packed_folder import load_as_stored
        from gateskip.checkpoint import GateFile, save_gates
        from gateskip.model.norms import has_folded_norms
        from gateskip.quantization.packed_linear import accelerate_linears
        from gateskip.training.loop import refuse_cpu_layers, training_device

        model = load_as_stored(job.source, widen=not self._computes_as_stored())
        if training_device().type != "cpu":
            refuse_cpu_layers(model, training_device())
            model.to(training_device())
        train, calibration = self._blocks(job)
        if self.backbone == "frozen":
            model.requires_grad_(False)
        if self.backbone == "frozen" and training_device().type == "cpu":
            accelerate_linears(model)  # unpacks 4-bit weights faster than their own modules do
        gates, sensitivity = self._start(job, model, train)
        if self.reading:
            self._measure_sensitivity(job, model, gates, calibration, "before training")
        curve = self._train(job, model, gates, train, calibration)
        if gates.shortcuts is not None:
            gates.shortcuts.settle()
        gates.folded = has_folded_norms(model)  # a full backbone trains its norms, too
        budgets = self.calibrate(job, model, gates, calibration, sensitivity)
        self._save_backbone(job, model)
        record: dict[str, Any] = {
            "training": curve,
            "kept": {
                str(budget): round(share, 4) for budget, share in sorted(budgets.kept.items())
            },
            "train_tokens": self.steps * self.accumulate * self.batch * self.length,
        }
        if budgets.prompts is not None:
            shares = sorted(budgets.prompts.kept.items())
            record["kept_of_prompts"] = {str(budget): round(share, 4) for budget, share in shares}
        if budgets.phases:
            apart = sorted(budgets.phases.items())
            record["kept_phases"] = {str(budget): dict(shares) for budget, shares in apart}
        training = {"parameters": self.model_dump(mode="json") | {"init": Path(self.init).name}}
        file = GateFile.of(gates, self.kv, budgets, sensitivity, training)
        save_gates(job.target, file)
        return record

    def _computes_as_stored(self) -> bool:
        """Whether the model keeps its stored type. Decoding differs between bfloat16 and float32,
        so thresholds on text that the model writes need the stored type."""
        return self.backbone == "frozen" and self.on_policy is None and self.calibrate_on == "text"

    def _blocks(self, job: StageJob) -> tuple[Tensor, Tensor]:
        """Token blocks [N, length] to train on, and to calibrate on."""
        from transformers import AutoTokenizer

        from compose.stages.text.split_text import split_blocks

        tokenizer = AutoTokenizer.from_pretrained(job.source)
        count = max(self.steps * self.accumulate * self.batch, SHORTCUT_BLOCKS)
        calibration = split_blocks(
            job, "calibration", tokenizer, self.length, self.calibration_blocks
        )
        train = split_blocks(job, "train", tokenizer, self.length, count + len(calibration))
        return unseen(train, calibration), calibration

    def _start(self, job: StageJob, model: Any, train: Tensor) -> tuple[Gates, list[float] | None]:
        """Initial gates, with the branches' sensitivities where these are needed."""
        from gateskip.calibration.fit_shortcuts import fit_shortcuts
        from gateskip.gates.kinds import make_gates
        from gateskip.model.families import device_of, find_branches

        count, width = len(find_branches(model)), model.config.hidden_size
        ranks = self._ranks([branch.kind for branch in find_branches(model)])
        if max(ranks) >= width:
            raise UserError(
                f"shortcut: {max(ranks)} is too large a rank for hidden size {width}",
                fix="set shortcut: 32, or 0 for none",
            )
        sizes = {"rank": self.rank} if self.kind in ("low-rank", "mlp") else {}
        if self.init in (WARM, OPEN):
            _seed(job.seed)
            gates = make_gates(self.kind, count, width, sizes, self.scales, self.place)
        else:
            gates = self._read(sizes, model)
        gates.to(device_of(model)).attach(model)
        if (job.work / START).is_file():
            sensitivity = restored(gates, ranks, job.work / START)
            return gates.to(device_of(model)), sensitivity
        if max(ranks) and gates.shortcuts is None:
            job.progress(0, 1, "fitting shortcuts")
            gates.shortcuts = fit_shortcuts(model, train[:SHORTCUT_BLOCKS], ranks)
        sensitivity = self._first_weights(job, model, gates, train)
        keep(gates, sensitivity, job.work / START)
        return gates, sensitivity

    def _first_weights(
        self, job: StageJob, model: Any, gates: Gates, train: Tensor
    ) -> list[float] | None:
        """Set a warm start's weights in the gates; the branches' sensitivities where they are
        needed."""
        from gateskip.calibration.warm_start import sensitivities, warm_start

        if self.init == WARM:
            _, sensitivity = warm_start(
                model,
                train[:WARM_BLOCKS],
                kv_rule=self.kv,
                progress=job.progress,
                gates=gates,
                checkpointing=self.checkpointing,
            )
            return sensitivity
        if self.allocation != "sensitivity":
            return None
        blocks = train[:SENSITIVITY_BLOCKS]
        return sensitivities(model, blocks, checkpointing=self.checkpointing)

    def _ranks(self, kinds: list[str]) -> list[int]:
        """The rank of each branch's shortcut, by the branches' kinds."""
        shortcut = self.shortcut
        if isinstance(shortcut, int):
            return [shortcut] * len(kinds)
        return [shortcut.mlp if kind == "mlp" else shortcut.attention for kind in kinds]

    def _read(self, sizes: dict[str, int], model: Any) -> Gates:
        """The gates in the file that `init` names, adapted to the model's norms."""
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
                fix="set init: warm, or name gates of this model",
            )
        try:
            fit_norms(gates, model)
        except ValueError as error:
            raise UserError(
                f"{path.name} does not fit the model: {error}",
                fix="set init: warm, or convert the gates with"
                " gateskip.gates.norms.fold_norms_into_gates",
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
        """Thresholds for every budget, and for those between them, on blocks [N, S] or on text that
        the model writes. No token enters the branches `gone`."""
        from gateskip.calibration.budgets import CalibratedBudgets
        from gateskip.calibration.thresholds import calibrate_everywhere
        from gateskip.model.families import find_branches
        from gateskip.training.written_calibration import calibrate_written

        kinds = [branch.kind for branch in find_branches(model)]
        skippable = kinds if self.branches == "both" else [self.branches]
        gates = gates.requires_grad_(False)
        settings: dict[str, Any] = {
            "allocation": self.allocation,
            "sensitivity": sensitivity,
            "min_share": self.least,
            "max_share": self.most,
            "closed": frozenset(i for i, kind in enumerate(kinds) if kind not in skippable),
            "progress": job.progress,
        }
        of_text = partial(
            calibrate_everywhere, model, gates, blocks, self.budgets, self.kv, gone, **settings
        )
        budgets = once(job.work / "budgets.json", CalibratedBudgets, of_text)
        budgets = replace(
            budgets, prompts=self._for_prompts(job, model, gates, blocks, gone, settings)
        )
        if self.calibrate_on == "text":
            return budgets
        prompts, stops = prompts_to_answer(job, model, blocks, self.written_prompts)
        return calibrate_written(
            model,
            gates,
            budgets,
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
        """Thresholds for tokens of prompts, on blocks [N, S]; None without `prompt_budgets`."""
        from gateskip.calibration.budgets import CalibratedBudgets
        from gateskip.calibration.reading import calibrate_prompts

        if not self.prompt_budgets:
            return None
        if self.prompt_order == "harm":
            self._measure_sensitivity(job, model, gates, blocks, "after training")
        shared = {name: settings[name] for name in ("min_share", "max_share", "closed", "progress")}
        of_prompts = partial(
            calibrate_prompts,
            model,
            gates,
            blocks,
            self.prompt_budgets,
            self.kv,
            gone,
            self.prompt_order,
            **shared,
        )
        return once(job.work / "prompt-budgets.json", CalibratedBudgets, of_prompts)

    def _measure_sensitivity(
        self, job: StageJob, model: Any, gates: Gates, blocks: Tensor, when: str
    ) -> None:
        """Measure how sensitive answers are to skipping each branch in prompts, unless the gates
        already have that for these very weights."""
        import torch

        from gateskip.calibration.reading import prompt_sensitivity

        def measured() -> list[float]:
            some = blocks[:SENSITIVITY_BLOCKS]
            nats = prompt_sensitivity(model, gates, some, self.kv, job.seed, job.progress)
            return [float(each) for each in nats]

        if gates.prompt_sensitivity is None or self.backbone != "frozen":
            file = job.work / f"prompt-sensitivity-{when.replace(' ', '-')}.json"
            gates.prompt_sensitivity = torch.tensor(once(file, list[float], measured))

    def _save_backbone(self, job: StageJob, model: Any) -> None:
        """Save a trained backbone; keep the source's files for a frozen one."""
        import torch

        from compose.artifacts.folder import copy_source

        if self.backbone == "frozen":
            copy_source(job.source, job.target, job.dtype, link=True)
        else:
            model.to(getattr(torch, job.dtype)).save_pretrained(job.target)


def unseen(train: Tensor, calibration: Tensor) -> Tensor:
    """Blocks [N, S] to train on, without those of calibration: gates keep another share on text
    that they were trained on. All blocks stay where this would remove most of the text."""
    from torch import tensor

    held = {tuple(row) for row in calibration.tolist()}
    left = train[tensor([tuple(row) not in held for row in train.tolist()])]
    return left if 2 * len(left) >= len(train) else train


def keep(gates: Gates, sensitivity: list[float] | None, file: Path) -> None:
    """Write gates as they begin, for `restored`; with the state of torch's generator, which a warm
    start draws from."""
    import torch
    from safetensors.torch import save_file

    state = {name: value.contiguous() for name, value in gates.state_dict().items()}
    with new_file(file) as unfinished:
        facts = {"sensitivity": json.dumps(sensitivity)}
        save_file(state | {RANDOM: torch.get_rng_state()}, unfinished, metadata=facts)


def restored(gates: Gates, ranks: list[int], file: Path) -> list[float] | None:
    """Set what `keep` wrote in gates whose shortcuts have these ranks; the sensitivities."""
    import torch
    from safetensors import safe_open

    from gateskip.gates.shortcuts import Shortcuts

    with safe_open(file, "pt") as opened:
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        sensitivity: list[float] | None = json.loads(opened.metadata()["sensitivity"])
    torch.set_rng_state(state.pop(RANDOM))
    if max(ranks) and gates.shortcuts is None:
        gates.shortcuts = Shortcuts(gates.branches, gates.hidden_size, ranks)
    gates.load_state_dict(state)
    return sensitivity


def _seed(seed: int) -> None:
    """Seed torch's generator, which draws new gates."""
    import torch

    torch.manual_seed(seed)
