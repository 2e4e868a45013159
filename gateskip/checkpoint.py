"""Gates and thresholds to and from a model folder, and `load` for users.

Beside a Hugging Face folder's own files stand `gates.safetensors` and `gateskip.json` (gate kind,
KV rule, thresholds a budget, training record, how to decode by default).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gateskip.calibration.budgets import CalibratedBudgets
from gateskip.calibration.thresholds import Calibration
from gateskip.decoding.decoder import Decoder
from gateskip.gates.base import Gates
from gateskip.gates.kinds import GATE_KINDS, make_gates
from gateskip.gates.shortcuts import STORED, Shortcuts
from gateskip.kernels import autotune
from gateskip.model.families import UnsupportedModel
from gateskip.quantization.folders import load_model
from gateskip.quantization.head import INT8, head_format, round_head
from gateskip.quantization.packed_linear import Samples, accelerate_linears, timed_pairs
from gateskip.runtime.backend import BackendName
from gateskip.runtime.skipping import SkippingModel

GATES_FILE = "gates.safetensors"
META_FILE = "gateskip.json"
FORMAT = 2


@dataclass
class GateFile:
    """Everything a folder says about its gates."""

    gates: Gates
    kv_rule: str
    grid: dict[float, list[float]]
    """Thresholds, one a branch, for each calibrated budget."""
    kept: dict[float, float] = field(default_factory=dict)
    """Share of multiply-adds that each budget really kept on the calibration text."""
    sensitivity: list[float] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    decode: dict[str, Any] = field(default_factory=dict)
    """How the folder is decoded when nobody says otherwise: mode and its settings."""
    between: dict[float, float] = field(default_factory=dict)
    """What interpolated budgets kept there, half-way between two calibrated ones."""

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
        """From what was calibrated."""
        grid = {budget: list(row) for budget, row in budgets.thresholds.items()}
        kept, between = dict(budgets.kept), dict(budgets.between)
        return cls(gates, kv_rule, grid, kept, sensitivity, training or {}, decode or {}, between)

    @property
    def budgets(self) -> CalibratedBudgets:
        """What was calibrated, to be asked for any budget."""
        return CalibratedBudgets(self.grid, self.kept, self.between)


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
        "shortcut": 0 if file.gates.shortcuts is None else file.gates.shortcuts.rank,
        "kv_rule": file.kv_rule,
        "thresholds": {str(budget): row for budget, row in sorted(file.grid.items())},
        "kept": {str(budget): share for budget, share in sorted(file.kept.items())},
        "kept_between": {str(budget): share for budget, share in sorted(file.between.items())},
        "sensitivity": file.sensitivity,
        "training": file.training,
        "decode": file.decode,
    }
    (folder / META_FILE).write_text(json.dumps(_finite(described), indent=1) + "\n")


def write_gates(path: Path, gates: Gates) -> None:
    """Write gates alone, as `read_gates` reads them."""
    state = {
        name: (value.to(STORED) if name.startswith("shortcuts.") else value).contiguous()
        for name, value in gates.state_dict().items()
    }
    shape = f"{gates.kind} {gates.branches} {gates.hidden_size}{' folded' if gates.folded else ''}"
    save_file(state, str(path), metadata={"gates": shape})  # one key: equal bytes


def _finite(value: Any) -> Any:
    """JSON has no infinities: a threshold that never or always skips is written as a word."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if value == float("-inf"):
        return "never"
    return "always" if value == float("inf") else value


def _number(value: float | str) -> float:
    return (
        {"never": float("-inf"), "always": float("inf")}[value] if isinstance(value, str) else value
    )


def read_gates(path: Path, kind: str = "scalar", **settings: Any) -> Gates:
    """Gates of a kind from a gates.safetensors file; `settings` as for `make_gates`.

    Raises ValueError when the file holds something else.
    """
    with safe_open(str(path), "pt") as file:
        found = (file.metadata() or {}).get("gates", "nothing").split()
    if found[0] != kind:
        raise ValueError(f"{path} holds no {kind} gates: found {found[0]}")
    gates = make_gates(kind, int(found[1]), int(found[2]), **settings)
    gates.folded = "folded" in found[3:]
    state = load_file(str(path))
    if "shortcuts.down" in state:
        gates.shortcuts = Shortcuts(int(found[1]), int(found[2]), state["shortcuts.down"].shape[1])
    try:
        gates.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} holds {kind} gates of other sizes: {error}") from error
    return gates


def load_gates(folder: Path) -> GateFile | None:
    """What a folder says of its gates; None where it has none."""
    if not (folder / META_FILE).exists() or not (folder / GATES_FILE).exists():
        return None
    meta = json.loads((folder / META_FILE).read_text())
    if meta["kind"] not in GATE_KINDS or meta["format"] != FORMAT:
        raise ValueError(f"{folder}: gates of kind {meta['kind']!r}, format {meta['format']}")
    return GateFile(
        gates=read_gates(
            folder / GATES_FILE,
            meta["kind"],
            sizes=meta["sizes"],
            scales=meta["scales"],
            place=meta["place"],
        ).requires_grad_(False),
        kv_rule=meta["kv_rule"],
        grid={float(b): [_number(v) for v in row] for b, row in meta["thresholds"].items()},
        kept={float(b): share for b, share in meta["kept"].items()},
        sensitivity=meta["sensitivity"],
        training=meta["training"],
        decode=meta["decode"],
        between={float(b): share for b, share in meta.get("kept_between", {}).items()},
    )


def stored_decode(folder: Path) -> dict[str, Any]:
    """How a folder is decoded when nobody says otherwise; it may draft without having gates."""
    if not (folder / META_FILE).exists():
        return {}
    decode: dict[str, Any] = json.loads((folder / META_FILE).read_text()).get("decode") or {}
    return decode


def load(
    folder: str | Path,
    dtype: str | torch.dtype = "auto",
    backend: BackendName | Literal["auto"] = "auto",
    rounded: bool = True,
    device: str | torch.device = "cpu",
) -> Decoder:
    """A folder as a `Decoder`: model, gates if there are any, thresholds and tokenizer.

    Args:
        folder: a Hugging Face folder, with or without gates.
        dtype: as in `from_pretrained`; "auto" takes what the config says.
        backend: what runs the model (runtime/backend.py). "auto" takes `native` where it can run
            the model and is not slower than the weights' own kernels, which is timed once a
            machine, and else `gathered`.
        rounded: let `native` round activations to 8 bits where weights are packed, as llama.cpp
            does.
        device: where the model runs; anything but a CPU has `gathered` and `reference` alone.

    Raises:
        UnsupportedModel: the architecture is not known, or the named backend cannot run the model
            on this device.
    """
    folder, device = Path(folder), torch.device(device)
    if backend == "native" and device.type != "cpu":
        raise UnsupportedModel(f"the native backend runs on a CPU, not on {device}")
    if device.type != "cpu" or backend in ("reference", "gathered"):
        return _in_torch(folder, dtype, "gathered" if backend == "auto" else backend, device)
    return _on_cpu(folder, dtype, backend, rounded)


def _in_torch(
    folder: Path, dtype: str | torch.dtype, backend: BackendName, device: torch.device
) -> Decoder:
    """A folder whose weights stay as transformers loaded them."""
    model, file = load_model(folder, dtype), load_gates(folder)
    if device.type != "cpu" and getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModel(f"packed weights are decoded on a CPU, not on {device}")
    if head_format(folder) == INT8:
        round_head(model)
    gates, kv_rule = _gates(file)
    gates = None if gates is None else gates.to(device)
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
    if head_format(folder) == INT8:
        round_head(model)
    gates, kv_rule = _gates(file)
    fallback = None
    try:
        skipping = SkippingModel(model, gates, kv_rule, "native", rounded)
    except UnsupportedModel as error:
        if backend == "native":
            raise
        fallback = str(error)
        warnings.warn(f"{folder.name} decodes in torch, slower: {error}", stacklevel=3)
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


def _gates(file: GateFile | None) -> tuple[Gates | None, str]:
    """Gates and KV rule of a folder; without gates the rule changes nothing."""
    return (None, "project") if file is None else (file.gates, file.kv_rule)


def _decoder(folder: Path, skipping: SkippingModel, file: GateFile | None) -> Decoder:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    budgets = CalibratedBudgets({}) if file is None else file.budgets
    return Decoder(skipping, tokenizer, budgets, defaults=stored_decode(folder))
