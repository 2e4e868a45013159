"""Saves and loads gates and thresholds of a model folder; `load` is for users.

A Hugging Face folder with gates also has `gates.safetensors` and `gateskip.json` (gate kind, KV
rule, thresholds for each budget, training record, default decode settings).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gateskip.calibration.budgets import CalibratedBudgets
from gateskip.calibration.thresholds import Calibration
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.draft_models import LearnedDraft
from gateskip.errors import FormatError
from gateskip.gates.base import Gates
from gateskip.gates.kinds import GATE_KINDS, make_gates
from gateskip.gates.shortcuts import STORED, Shortcuts
from gateskip.kernels import autotune
from gateskip.model.draft_network import load_network
from gateskip.model.families import UnsupportedModel, find_branches
from gateskip.quantization.folders import load_model
from gateskip.quantization.gpu_linear import pack_for_gpu, pass_unused
from gateskip.quantization.head import INT8, head_format, round_head
from gateskip.quantization.packed_embedding import pack_embedding
from gateskip.quantization.packed_linear import Samples, accelerate_linears, timed_pairs
from gateskip.runtime.backend import BackendName
from gateskip.runtime.skipping import SkippingModel

GATES_FILE = "gates.safetensors"
META_FILE = "gateskip.json"
FORMAT = 2
DOWN, UP = "shortcuts.down", "shortcuts.up"
DRAFT_FOLDER = "draft_model"  # in a model folder that carries the model that drafts for it
HARM = "harm"
RANKS = "shortcuts.ranks"  # in a file of gates whose shortcuts differ in rank


@dataclass
class GateFile:
    """The gates of a folder and their settings."""

    gates: Gates
    kv_rule: str
    grid: dict[float, list[float]]
    """Thresholds, one per branch, for each calibrated budget."""
    kept: dict[float, float] = field(default_factory=dict)
    """Share of multiply-adds that each budget really kept on the calibration text."""
    sensitivity: list[float] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    decode: dict[str, Any] = field(default_factory=dict)
    """Default decode settings of the folder: mode and its settings."""
    between: dict[float, float] = field(default_factory=dict)
    """Share that interpolated thresholds kept there, half-way between two calibrated budgets."""
    phases: dict[float, dict[str, float]] = field(default_factory=dict)
    """Share that each budget kept of prompts and of answers: see `CalibratedBudgets.phases`."""
    prompts: CalibratedBudgets | None = None
    """The calibration for tokens of prompts: see `CalibratedBudgets.prompts`."""

    @classmethod
    def of(
        cls,
        gates: Gates,
        kv_rule: str,
        budgets: CalibratedBudgets,
        sensitivity: list[float] | None = None,
        training: dict[str, Any] | None = None,
        decode: dict[str, Any] | None = None,
    ) -> GateFile:
        """A GateFile of calibrated budgets."""
        grid = {budget: list(row) for budget, row in budgets.thresholds.items()}
        kept, between = dict(budgets.kept), dict(budgets.between)
        phases = {budget: dict(shares) for budget, shares in budgets.phases.items()}
        rest = (training or {}, decode or {}, between, phases, budgets.prompts)
        return cls(gates, kv_rule, grid, kept, sensitivity, *rest)

    @property
    def budgets(self) -> CalibratedBudgets:
        """The calibrated budgets, which give thresholds for any budget."""
        return CalibratedBudgets(self.grid, self.kept, self.between, self.phases, self.prompts)


def grid_of(
    calibrations: Sequence[Calibration],
) -> tuple[dict[float, list[float]], dict[float, float]]:
    """A calibration's thresholds and really kept shares, by budget."""
    return (
        {c.budget: list(c.thresholds) for c in calibrations},
        {c.budget: c.kept for c in calibrations},
    )


def save_gates(folder: Path, file: GateFile) -> None:
    """Write gates and their description into a model folder."""
    write_gates(folder / GATES_FILE, file.gates)
    described = {
        "format": FORMAT,
        "kind": file.gates.kind,
        "branches": file.gates.branches,
        "sizes": file.gates.sizes(),
        "scales": file.gates.scales,
        "place": file.gates.place,
        "shortcut": _ranks(file.gates),
        "kv_rule": file.kv_rule,
        **_of_budgets(file.budgets),
        **({"kept_phases": _by_text(file.phases)} if file.phases else {}),
        **({"prompts": _of_budgets(file.prompts)} if file.prompts is not None else {}),
        "sensitivity": file.sensitivity,
        "training": file.training,
        "decode": file.decode,
    }
    (folder / META_FILE).write_text(json.dumps(_finite(described), indent=1) + "\n")


def _ranks(gates: Gates) -> int | list[int]:
    """The rank of all shortcuts, 0 where there are none, or a list of ranks where they differ."""
    ranks = () if gates.shortcuts is None else gates.shortcuts.ranks
    return list(ranks) if len(set(ranks)) > 1 else max(ranks, default=0)


def _of_budgets(budgets: CalibratedBudgets) -> dict[str, Any]:
    """Thresholds, and the shares that they kept, with budgets as text keys."""
    return {
        "thresholds": _by_text({b: list(row) for b, row in budgets.thresholds.items()}),
        "kept": _by_text(budgets.kept),
        "kept_between": _by_text(budgets.between),
    }


def _budgets_in(
    meta: dict[str, Any],
) -> tuple[dict[float, list[float]], dict[float, float], dict[float, float]]:
    """The reverse of `_of_budgets`: thresholds, shares, and shares between budgets."""
    return (
        {float(b): [_number(v) for v in row] for b, row in meta["thresholds"].items()},
        {float(b): _number(share) for b, share in meta["kept"].items()},
        {float(b): _number(share) for b, share in meta.get("kept_between", {}).items()},
    )


def _by_text(values: Mapping[float, Any]) -> dict[str, Any]:
    """A mapping from budgets as text, in their order."""
    return {str(budget): value for budget, value in sorted(values.items())}


def write_gates(path: Path, gates: Gates) -> None:
    """Write gates without their settings, in the form that `read_gates` reads.

    Where shortcuts differ in rank, they are stacked: `down` and the transposed `up` [sum of ranks,
    H], with the rank of each.
    """
    state = {
        name: (value.to(STORED) if name.startswith("shortcuts.") else value).contiguous()
        for name, value in gates.state_dict().items()
    }
    ranks = _ranks(gates)
    if not isinstance(ranks, int):
        of_branches = zip(state[DOWN], state[UP], ranks, strict=True)
        cut = [(down[:rank], up[:, :rank].T) for down, up, rank in of_branches]
        state[DOWN], state[UP] = (torch.cat(parts) for parts in zip(*cut, strict=True))
        state[RANKS] = torch.tensor(ranks, dtype=torch.int32)
    shape = f"{gates.kind} {gates.branches} {gates.hidden_size}{' folded' if gates.folded else ''}"
    save_file(state, str(path), metadata={"gates": shape})  # one key: equal bytes


def _finite(value: Any) -> Any:
    """Values for JSON, which has no infinities: a threshold that never or always skips is written
    as a word."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if value == float("-inf"):
        return "never"
    return "always" if value == float("inf") else value


def _number(value: float | str) -> float:
    """A number of a file. Raises KeyError, TypeError or ValueError for other values."""
    words = {"never": float("-inf"), "always": float("inf")}
    number = words[value] if isinstance(value, str) else float(value)
    if math.isnan(number):
        raise ValueError("nan is not a number")
    return number


def read_gates(path: Path, kind: str = "scalar", **settings: Any) -> Gates:
    """Gates of a kind from a gates.safetensors file; `settings` as for `make_gates`.

    Raises FormatError when the file has something else.
    """
    try:
        with safe_open(str(path), "pt") as file:
            stated = (file.metadata() or {}).get("gates", "nothing").split()
        state = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read as gates: {error}") from error
    if not stated or stated[0] != kind:
        holds = " ".join(stated[:1]) or "nothing"
        raise FormatError(f"{path} holds no {kind} gates: found {holds}")
    try:
        branches, hidden = int(stated[1]), int(stated[2])
        _require_as_large(state, kind, branches, hidden, settings)
        gates = make_gates(kind, branches, hidden, **settings)
        gates.folded = "folded" in stated[3:]
        if DOWN in state:
            gates.shortcuts = Shortcuts(branches, hidden, _take_ranks(state))
        if HARM in state:
            gates.prompt_sensitivity = torch.zeros(branches)
        gates.load_state_dict(state)
    except (IndexError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise FormatError(f"{path} holds {kind} gates of other sizes: {error}") from error
    broken = [name for name, value in state.items() if not bool(value.float().isfinite().all())]
    if broken:
        raise FormatError(f"{path} holds numbers that are not finite, in {broken[0]}")
    return gates


def _take_ranks(state: dict[str, Tensor]) -> int | list[int]:
    """The rank of all shortcuts of a file, or a list of ranks; stacked shortcuts are then
    separated.

    ValueError or RuntimeError where the ranks do not fit the tensors.
    """
    if RANKS not in state:
        return state[DOWN].shape[1]
    ranks: list[int] = state.pop(RANKS).tolist()
    if max(ranks) > state[DOWN].shape[-1]:
        raise ValueError("a shortcut's rank is larger than its number of inputs")
    if state[DOWN].ndim == 2:
        down, up = (
            pad_sequence(list(state[name].split(ranks)), batch_first=True) for name in (DOWN, UP)
        )
        state |= {DOWN: down, UP: up.transpose(1, 2).contiguous()}
    return ranks


def _require_as_large(
    state: dict[str, Tensor], kind: str, branches: int, hidden: int, settings: dict[str, Any]
) -> None:
    """ValueError where a file states more gates than it has: they would fill the memory."""
    with torch.device("meta"):
        complete = make_gates(kind, branches, hidden, **settings).state_dict()
    held = sum(value.numel() for value in state.values())
    if sum(value.numel() for value in complete.values()) > held:
        raise ValueError(
            f"it states {branches} branches of {hidden} inputs but has only {held} numbers"
        )


def load_gates(folder: Path) -> GateFile | None:
    """The gates of a folder and their settings; None where it has none.

    Raises FormatError where they are damaged or of another version.
    """
    if not (folder / META_FILE).exists() or not (folder / GATES_FILE).exists():
        return None
    meta = _meta(folder)
    supported = isinstance(meta.get("kind"), str) and meta["kind"] in GATE_KINDS
    if not supported or meta.get("format") != FORMAT:
        raise FormatError(
            f"{folder}: gates of kind {meta.get('kind')!r}, format {meta.get('format')!r}; this"
            f" version reads format {FORMAT}"
        )
    try:
        file = _described(folder, meta)
    except FormatError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise FormatError(f"{folder / META_FILE} does not describe gates ({what})") from error
    read = {} if file.prompts is None else file.prompts.thresholds
    if any(len(row) != file.gates.branches for row in (*file.grid.values(), *read.values())):
        raise FormatError(f"{folder / META_FILE} has thresholds for other branches than its gates")
    return file


def _described(folder: Path, meta: dict[str, Any]) -> GateFile:
    scores, prompts = meta["sensitivity"], meta.get("prompts")
    grid, kept, between = _budgets_in(meta)
    return GateFile(
        gates=read_gates(
            folder / GATES_FILE,
            meta["kind"],
            sizes=meta["sizes"],
            scales=meta["scales"],
            place=meta["place"],
        ).requires_grad_(False),
        kv_rule=str(meta["kv_rule"]),
        grid=grid,
        kept=kept,
        sensitivity=None if scores is None else [_number(score) for score in scores],
        training=dict(meta["training"]),
        decode=dict(meta["decode"]),
        between=between,
        phases={
            float(b): {str(phase): _number(share) for phase, share in shares.items()}
            for b, shares in meta.get("kept_phases", {}).items()
        },
        prompts=None if prompts is None else CalibratedBudgets(*_budgets_in(prompts)),
    )


def _meta(folder: Path) -> dict[str, Any]:
    """The content of gateskip.json. Raises FormatError where it is not a JSON mapping."""
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{folder / META_FILE} is not readable JSON: {error}") from error
    if not isinstance(meta, dict):
        raise FormatError(f"{folder / META_FILE} is not a mapping")
    return meta


def stored_decode(folder: Path) -> dict[str, Any]:
    """Default decode settings of a folder, which may draft without having gates."""
    if not (folder / META_FILE).exists():
        return {}
    decode = _meta(folder).get("decode") or {}
    if not isinstance(decode, dict):
        raise FormatError(f"{folder / META_FILE} has no valid decode settings")
    return decode


NO_CUDA = (
    "device cuda: torch finds no CUDA device on this machine; use device cpu, or install the"
    " device's driver and a CUDA build of torch"
)


def load(
    folder: str | Path,
    dtype: str | torch.dtype = "auto",
    backend: BackendName | Literal["auto"] = "auto",
    rounded: bool = True,
    device: str | torch.device = "cpu",
    draft_model: str | Path | None = None,
) -> Decoder:
    """Load a model folder and return a `Decoder`.

    Args:
        folder: a Hugging Face folder, with or without gates.
        dtype: as in `from_pretrained`; "auto" uses the data type of the config.
        backend: the backend that computes the model (runtime/backend.py). "auto" uses `native` if
            `native` can run the model and is not slower than the kernels of the library that packed
            the weights. This is timed once per machine. Otherwise "auto" uses `gathered`.
        rounded: whether `native` rounds activations to 8 bits before it multiplies them with packed
            weights, as llama.cpp does.
        device: the device of the model. Only `gathered` and `reference` run on devices other than
            a CPU.
        draft_model: the folder of another model with the same tokenizer, which drafts in mode
            `speculate`. None takes the folder's own `draft_model`, where it has one.

    Raises:
        FormatError: the gates are damaged, or belong to another version or another model.
        ModuleNotFoundError: weights packed as integers are for a CUDA device, and Triton is not
            installed; the message names the extra.
        UnsupportedModel: the architecture is not supported, or the backend cannot run the model on
            this device.
        ValueError: the draft model has another vocabulary.
    """
    folder, device = Path(folder), torch.device(device)
    decoder = _load(folder, dtype, backend, rounded, device)
    if draft_model is None and (folder / DRAFT_FOLDER).is_dir():
        draft_model = folder / DRAFT_FOLDER
    if draft_model is not None:
        decoder.draft_by(_load(Path(draft_model), dtype, backend, rounded, device))
    return decoder


def _load(
    folder: Path,
    dtype: str | torch.dtype,
    backend: BackendName | Literal["auto"],
    rounded: bool,
    device: torch.device,
) -> Decoder:
    """A folder without another model that drafts for it."""
    if backend == "native" and device.type != "cpu":
        raise UnsupportedModel(f"the native backend runs on a CPU, not on {device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModel(NO_CUDA)
    if device.type != "cpu" or backend in ("reference", "gathered"):
        return _in_torch(folder, dtype, "gathered" if backend == "auto" else backend, device)
    return _on_cpu(folder, dtype, backend, rounded)


def _in_torch(
    folder: Path, dtype: str | torch.dtype, backend: BackendName, device: torch.device
) -> Decoder:
    """A folder whose weights stay as transformers loaded them; integer grids get kernels on a CUDA
    device, but not with `reference`, which unpacks them by torch."""
    model, file = load_model(folder, dtype, device), load_gates(folder)
    if device.type == "cuda" and backend == "gathered":
        pack_for_gpu(model)
    if head_format(folder) == INT8:
        round_head(model)
    gates, kv_rule = _gates(folder, file, model)
    if gates is not None:
        gates = gates.to(device)
        if device.type == "cuda" and backend == "gathered":
            pass_unused(model)
    return _decoder(folder, SkippingModel(model.to(device), gates, kv_rule, backend), file)


def _on_cpu(
    folder: Path,
    dtype: str | torch.dtype,
    backend: BackendName | Literal["auto"],
    rounded: bool,
) -> Decoder:
    """A folder on compiled kernels, as far as they can run it."""
    model, file = load_model(folder, dtype), load_gates(folder)
    samples: Samples = {}
    kernels = accelerate_linears(model, samples)
    pack_embedding(model)
    if head_format(folder) == INT8:
        round_head(model)
    gates, kv_rule = _gates(folder, file, model)
    fallback = None
    try:
        skipping = SkippingModel(model, gates, kv_rule, "native", rounded)
    except UnsupportedModel as error:
        if backend == "native":
            raise
        fallback = str(error)
        warnings.warn(f"{folder.name} decodes in torch, slower: {error}", stacklevel=4)
        skipping = SkippingModel(model, gates, kv_rule, "gathered")
    times = autotune.kernel_times(timed_pairs(samples, skipping.engine))
    if backend == "auto" and autotune.own_are_faster(times):
        decoder = _in_torch(folder, dtype, "gathered", torch.device("cpu"))
        decoder.kernel_times = times
        decoder.fallback = "the weights' own kernels are faster here"
        return decoder
    decoder = _decoder(folder, skipping, file)
    decoder.kernels, decoder.kernel_times, decoder.fallback = kernels, times, fallback
    return decoder


def _gates(folder: Path, file: GateFile | None, model: Any) -> tuple[Gates | None, str]:
    """Gates and KV rule of a folder; without gates the rule has no effect.

    Raises FormatError for gates of another model.
    """
    if file is None:
        return None, "project"
    branches, hidden = len(find_branches(model)), model.config.get_text_config().hidden_size
    if (file.gates.branches, file.gates.hidden_size) != (branches, hidden):
        raise FormatError(
            f"{folder / GATES_FILE} belongs to another model: {file.gates.branches} branches of"
            f" {file.gates.hidden_size} inputs, but this model has {branches} of {hidden}"
        )
    return file.gates, file.kv_rule


def _decoder(folder: Path, skipping: SkippingModel, file: GateFile | None) -> Decoder:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    budgets = CalibratedBudgets({}) if file is None else file.budgets
    embedding = skipping.model.get_input_embeddings()
    network = load_network(folder, embedding.embedding_dim, embedding.num_embeddings)
    learned = None if network is None else LearnedDraft(skipping, network.to(skipping.device))
    defaults = stored_decode(folder)
    return Decoder(skipping, tokenizer, budgets, defaults=defaults, network=learned)
