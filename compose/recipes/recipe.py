"""A wish for a smaller model -> the pipeline that makes and measures its variants.

8 bits  each weight rounded by itself, which takes seconds
4 bits  fitted to text, layer after layer; the embedding in 6 bits, as in pipelines/peers.yaml
3 bits  the same, and trained afterwards unless the effort is `quick`
drafts  tried beside each of them, and exported where they are faster: they never change a token
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal, get_args

from ruamel.yaml import YAML

from compose.errors import UserError

Effort = Literal["quick", "normal", "best"]
Bits = Literal[8, 4, 3]

TASK = "arithmetic"
"""Sums, whose answers are written: the task that shows first what rounding loses."""
QUESTIONS = 200
PROMPTS = 10
SPEED: dict[str, Any] = {"prompt_tokens": 128, "new_tokens": 64, "repeats": 8}
"""Each repeat has another prompt: the gain of drafts differs between texts by a factor of three."""
DRAFTS = "drafts"
HEALED = "healed"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks for.

    Raises:
        UserError: two wishes exclude each other, or one has no such value.
    """

    model: str
    """An alias, a hub id, or the absolute path of a folder or a GGUF file."""
    to: Path
    """The folder to export to."""
    bits: int | None = None
    """Bits of a weight; None tries 8 and 4, and 3 where the size is bounded."""
    at_most_mb: float | None = None
    """Bound of the exported folder's size on disk, in units of 10^6 bytes."""
    at_most_kl: float | None = None
    """Bound of the loss: KL to the source model in nats a token, upper end of its interval."""
    effort: Effort = "normal"
    """`quick` rounds each weight by itself, `best` trains what was rounded."""
    drafts: bool = True
    """Whether decoding with drafts is tried."""
    gguf: bool = False
    """Whether the export is also written as a GGUF file."""
    compressed_tensors: bool = False
    """Whether the export is also written as a folder for vLLM, which has no minima in 4 bits."""

    def __post_init__(self) -> None:
        if self.bits is not None and self.bits not in get_args(Bits):
            raise UserError(f"{self.bits} bits are not supported", fix="take 8, 4 or 3")
        if self.bits == 3 and self.compressed_tensors:
            raise UserError("compressed-tensors has no 3 bits", fix="take --bits 4 or 8")
        for name, bound in (("at_most_mb", self.at_most_mb), ("at_most_kl", self.at_most_kl)):
            if bound is not None and not bound > 0:
                raise UserError(f"{name} is {bound:g}", fix="take a number above 0")

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of the variants to make, the widest first."""
        if self.bits is not None:
            return (self.bits,)
        return (8, 4, 3) if self.at_most_mb and not self.compressed_tensors else (8, 4)

    @property
    def gguf_file(self) -> Path | None:
        """The GGUF file to write, beside the exported folder."""
        return gguf_beside(self.to) if self.gguf else None

    @property
    def vllm_folder(self) -> Path | None:
        """The folder for vLLM to write, beside the exported one."""
        return vllm_beside(self.to) if self.compressed_tensors else None

    @property
    def is_bounded(self) -> bool:
        """Whether the user said what may be lost, so that a recommendation is not asked for."""
        return (self.bits, self.at_most_mb, self.at_most_kl) != (None, None, None)


def gguf_beside(folder: Path) -> Path:
    """The GGUF file that belongs to an exported folder."""
    return folder.with_name(f"{folder.name}.gguf")


def vllm_beside(folder: Path) -> Path:
    """The folder for vLLM that belongs to an exported one."""
    return folder.with_name(f"{folder.name}-compressed-tensors")


def effort_of(*, quick: bool, best: bool) -> Effort:
    """The effort that two flags name.

    Raises:
        UserError: both are given.
    """
    if quick and best:
        raise UserError("--quick and --best exclude each other", fix="leave one of them out")
    return "quick" if quick else "best" if best else "normal"


def pipeline_of(request: Request, name: str) -> dict[str, Any]:
    """The pipeline that makes and measures the variants of a request, as plain values."""
    stages, chains = _stages(request), _chains(request)
    used = {stage for chain in chains.values() for stage in chain}
    return {
        "schema": 1,
        "name": name,
        "model": {"source": request.model, "dtype": "bfloat16"},
        "data": _data(used),
        "stages": {key: stage for key, stage in stages.items() if key in used},
        "pipelines": chains,
        "benchmark": {
            "speed": SPEED,
            "quality": {
                "perplexity": ["wikitext2", "heldout-text"],
                "perplexity_tokens": 4096,
                "tasks": [TASK],
                "limit": QUESTIONS,
                "own_answers": {"prompts": PROMPTS, "new_tokens": 48},
            },
            "lossless": {"prompts": 4, "new_tokens": 48},
        },
    }


def pipeline_text(pipeline: Mapping[str, Any], command: str) -> str:
    """A pipeline as a YAML file that says where it comes from."""
    yaml: Any = YAML(typ="safe")
    text = StringIO()
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump(dict(pipeline), text)
    return (
        f"# Written by `{command}`. Copy it to change it: `gateskip run FILE`.\n{text.getvalue()}"
    )


def _stages(request: Request) -> dict[str, dict[str, Any]]:
    """Every stage that a recipe may take."""
    alone: dict[str, Any] = {"calibrate": False}
    fitted: dict[str, Any] = alone if request.effort == "quick" else {}
    learns = "scales" if request.compressed_tensors else "codes"
    heal = {"use": "heal", "backbone": learns, "batch": 4, "lr": 1e-3, "patience": 0}
    return {
        "int8": {"use": "int8", **alone},
        "int4": {"use": "int4", **_form_of_4_bits(request), **fitted},
        "int3": {"use": "int3", "embedding": 6, **fitted},
        HEALED: heal | {"steps": 100, "precision": "bf16"},
        DRAFTS: {"use": "speculate"},
    }


def _form_of_4_bits(request: Request) -> dict[str, Any]:
    """With real minima and a packed embedding; vLLM's format has neither."""
    return {"offset": "integer"} if request.compressed_tensors else {"embedding": 6}


def _chains(request: Request) -> dict[str, list[str]]:
    """Variant -> its stages: each width, trained where that pays, without drafts and with them."""
    chains = {}
    for bits in request.widths:
        healed = bits < 8 and (
            request.effort == "best" or (bits == 3 and request.effort != "quick")
        )
        name = f"int{bits}-{HEALED}" if healed else f"int{bits}"
        chains[name] = [f"int{bits}", *([HEALED] if healed else [])]
        if request.drafts:
            chains[f"{name}+{DRAFTS}"] = [*chains[name], DRAFTS]
    return chains


def _data(used: set[str]) -> dict[str, Any]:
    """The texts that the stages read. 16,000 tokens of calibration: below 10,000, compensated
    rounding does not pay (docs/experiments/rounding.md), and more take as much longer."""
    data: dict[str, Any] = {
        "calibration": {"source": "calibration-text", "limit": 64, "length": 256}
    }
    if HEALED in used:
        mix = {"calibration-text": 2, "self-written": 1, "sums": 1}
        data["train"] = {"mix": mix, "limit": 1200, "length": 256}
    return data
