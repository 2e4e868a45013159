"""GPTQ by gptqmodel itself, which reads one layer at a time from the model's file.

optimum calls gptqmodel too, but holds the whole model in memory and cannot give some layers or the
LM head other bits, nor use FOEM. gptqmodel writes the layers that differ into the quantization
config as `dynamic`, which vLLM and SGLang read as well. FOEM (first-order error compensation, AAAI
2026) is an option of its GPTQ and changes nothing in the checkpoint's format.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol

from compose.errors import UserError
from compose.stages.base import StageJob
from compose.stages.quantize.linears import Bits, linear_names, matching

if TYPE_CHECKING:
    from torch import Tensor

STATED = (
    *("quant_method", "bits", "group_size", "desc_act", "sym", "dynamic", "lm_head"),
    *("format", "checkpoint_format", "pack_dtype"),
)  # entries of gptqmodel's metadata that are kept; the rest is about the machine
WORKERS = "GPTQMODEL_CPU_WORKERS"


class GptqSettings(Protocol):
    """The fields of the stage `gptq` that this module reads; `gptq` imports this module."""

    @property
    def bits(self) -> Bits:
        """Bits of one weight."""
        ...

    @property
    def group_size(self) -> int:
        """Weights that share a scale; -1 is a whole row."""
        ...

    @property
    def sym(self) -> bool:
        """Whether the grid is symmetric around zero."""
        ...

    @property
    def act_order(self) -> bool:
        """Whether columns are quantized by falling activation."""
        ...

    @property
    def damp(self) -> float:
        """Share of the Hessian's mean diagonal that is added to it."""
        ...

    @property
    def foem(self) -> float | None:
        """FOEM's beta; None is plain GPTQ."""
        ...

    @property
    def skip(self) -> tuple[str, ...]:
        """Ends of the names of layers that are not packed."""
        ...

    @property
    def mixed(self) -> Mapping[str, Bits]:
        """Bits of layers by the end of their name."""
        ...

    @property
    def lm_head(self) -> Bits | None:
        """Bits of the LM head; None does not pack it."""
        ...

    @property
    def batch(self) -> int:
        """Calibration sequences that run through the model at once."""
        ...

    def groups_know_activation(self) -> bool:
        """Whether groups are quantized in order of activation while columns keep their order."""
        ...


def has_table_of(model_type: str) -> bool:
    """Whether gptqmodel knows the layers of an architecture, named as in config.json."""
    from gptqmodel.models.auto import MODEL_MAP

    return model_type in MODEL_MAP


def quantize_by_gptqmodel(stage: GptqSettings, job: StageJob, blocks: Tensor) -> None:
    """Quantize `job.source` into `job.target`, calibrated on token blocks [N, S]."""
    import torch

    os.environ.setdefault(WORKERS, "2")  # it needs two; its default is half the cores
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=stage.bits,
        group_size=stage.group_size,
        sym=stage.sym,
        desc_act=stage.act_order,
        act_group_aware=stage.groups_know_activation(),
        damp_percent=stage.damp,
        dynamic=patterns(stage, job),
        lm_head=stage.lm_head is not None,
        foem=_foem(stage.foem),
        # the older format cannot hold a zero point of 0
        format="gptq" if stage.sym else "gptq_v2",
        offload_to_disk=True,  # each layer is loaded only for its turn
        offload_to_disk_path=str(job.work.resolve() / "layers"),
        device=job.device,
    )
    source = str(job.source.resolve())  # read from elsewhere, too, see below
    model: Any = GPTQModel.load(
        source, config, dtype=getattr(torch, job.dtype), backend=BACKEND.AUTO
    )
    rows = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in blocks
    ]
    job.work.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(job.work):  # it writes its logs into the working directory
        model.quantize(rows, batch_size=stage.batch)
    model.save(str(job.target))
    _tidy(job)
    _refuse_forgotten(stage, job)


def _foem(beta: float | None) -> Any:
    """FOEM's settings as gptqmodel takes them; None is plain GPTQ.

    Raises:
        UserError: this gptqmodel has no FOEM.
    """
    if beta is None:
        return None
    try:
        from gptqmodel.quantization import FOEMConfig
    except ImportError:
        version = metadata.version("gptqmodel")
        raise UserError(
            f"foem: gptqmodel {version} has no FOEM",
            fix="pip install --upgrade 'gptqmodel>=7,<8', or leave foem out",
        ) from None
    return FOEMConfig(alpha=0, beta=beta)  # alpha above 0 is GPTAQ beside it


def patterns(stage: GptqSettings, job: StageJob) -> dict[str, dict[str, Any]]:
    """gptqmodel's `dynamic`: a pattern for each layer that differs.

    A pattern that begins with a minus is a layer that is not packed. For a layer that several
    entries of `mixed` match, the last one counts.
    """
    linears, head = linear_names(job)
    inside = [name for name in linears if name not in head]
    bits = {name: b for end, b in stage.mixed.items() for name in matching([end], inside, "mixed")}
    skipped = matching(stage.skip, inside)
    dynamic: dict[str, dict[str, Any]] = {f"-:^{re.escape(name)}$": {} for name in skipped}
    dynamic |= {f"^{re.escape(n)}$": {"bits": b} for n, b in bits.items() if n not in skipped}
    if stage.lm_head is not None:
        dynamic |= {f"^{re.escape(name)}$": {"bits": stage.lm_head} for name in head}
    return dynamic


def _refuse_forgotten(stage: GptqSettings, job: StageJob) -> None:
    """Raises UserError where gptqmodel left out layers that its tables of architectures lack."""
    from gateskip.quantization.folders import packed_layers

    linears, head = linear_names(job)
    expected = {name for name in linears if name not in head or stage.lm_head}
    expected -= set(matching(stage.skip, linears))
    forgotten = sorted(expected - set(packed_layers(job.target.glob("*.safetensors"))))
    if forgotten:
        raise UserError(
            f"gptqmodel does not pack {len(forgotten)} layers of this architecture, such as"
            f" {forgotten[0]}",
            fix="skip those layers; for Phi3 and GPT-NeoX leave mixed, lm_head and foem out",
        )


def _tidy(job: StageJob) -> None:
    """Write the source's config with gptqmodel's quantization added, and remove its logs."""
    from compose.artifacts.folder import require_model
    from compose.store import write_json

    quantization = require_model(job.target)["quantization_config"]
    config = {**require_model(job.source), "dtype": job.dtype}
    stated = {name: quantization[name] for name in STATED if name in quantization}
    for differing in (
        "dynamic",
        "lm_head",
    ):  # where no layer differs, transformers loads the folder by itself
        if not stated.get(differing):
            stated.pop(differing, None)
    config["quantization_config"] = stated
    write_json(job.target / "config.json", config)
    for log in ("quant_log.csv", "quantize_config.json"):
        (job.target / log).unlink(missing_ok=True)
