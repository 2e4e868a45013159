"""The base class of stages: light parameters, the check of a place in a chain, and `run`.

A stage is a frozen value. Planning asks it two questions that need no weights: may it stand here
(`check`), and how does it change the model's shape (`reshape`). `run` does the work, and only it
imports torch. A stage file imports all its types from here: roles, shapes and jobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from compose.contract import DataSpec, Split, StageJob
from compose.errors import RuleBroken
from compose.stages.rules import FORBIDDEN, RULES, Role
from compose.stages.shape import ModelShape, StoredBits

__all__ = ["RULES", "DataSpec", "ModelShape", "Role", "Split", "Stage", "StageJob", "StoredBits"]

PLACES = ("device_map",)
"""Parameters that say where a stage computes; they do not change its result."""

LIBRARIES = 0.8e9  # bytes of a process that has torch and transformers, and works on some text
UNPACKED = 16  # bits of a weight that no quantizer packed


class Stage(BaseModel):
    """One step of a chain. Subclasses add parameters; equal values are the same step."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    acts: ClassVar[Literal["weights", "decode"]] = "weights"
    """Whether the stage makes a new model folder (`weights`) or sets how a folder is decoded."""

    role: ClassVar[Role]
    """The stage's role in the order rules."""

    version: ClassVar[int] = 1
    """Version of the result. It is raised when the same parameters begin to give another result; it
    is part of the step's key."""

    reads_data: ClassVar[tuple[Split, ...]] = ()
    """The entries of `data` that `run` reads; they are then part of the step's key."""

    example: ClassVar[Mapping[str, Any]] = {}
    """Parameters with which docs/composition.md is made, where the defaults could stand in fewer
    places of a chain."""

    groups: ClassVar[Mapping[str, type[BaseModel]]] = {}
    """Groups in which a file may write the parameters: key of the group -> its fields. Values and
    keys of steps are the same with and without groups."""

    on_gpu: ClassVar[bool] = False
    """Whether `run` uses a GPU where there is one."""

    libraries: ClassVar[tuple[str, ...]] = ()
    """Libraries that `run` imports beside torch and transformers, by their import names."""

    use: str
    """Name of the stage: a key of `compose.stages.registry.STAGES`."""

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Refuse a place in a chain: after the stages `before`, on a model of `shape`.

        Without a shape (None) rules that need sizes are not checked.

        Raises:
            RuleBroken: with the name of a rule in `RULES`.
        """
        for role, use in _standing(shape, before):
            rule = FORBIDDEN.get((self.role, role))
            if rule is not None and not self.tolerates(rule):
                raise RuleBroken(rule, f"{self.use} cannot come after {use}: {RULES[rule]}")

    def tolerates(self, rule: str) -> bool:
        """Whether the order rule `rule` does not apply to these parameters. By default all rules
        apply."""
        return False

    def reshape(self, shape: ModelShape) -> ModelShape:
        """The model's shape after the stage; `shape` is the one before."""
        return shape

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The parameters, behind the groups that they may also be written in."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        properties = schema["properties"]
        grouped = {
            key: {
                "type": "object",
                "description": group.__doc__,
                "additionalProperties": False,
                "properties": {name: properties[name] for name in group.model_fields},
            }
            for key, group in cls.groups.items()
        }
        inside = {name for group in cls.groups.values() for name in group.model_fields}
        flat = {name: entry for name, entry in properties.items() if name not in inside}
        schema["properties"] = {**flat, **grouped, **properties}
        return schema

    def stored_as(self) -> str | None:
        """Name of the weights' format in reports; None where the stage packs nothing."""
        return self.use if self.role == "quantize" else None

    def most_bits(self) -> int:
        """Bits of the largest weights that the stage leaves in a model's layers."""
        return UNPACKED

    def stored_bits(self, shape: ModelShape) -> StoredBits | None:
        """Bits that a weight takes in the folder that a quantizer makes of a model of `shape`,
        scales included; None where the stage packs nothing, or cannot tell."""
        return None

    def held(self) -> float:
        """Bytes that `run` holds at its peak for each weight of the source model. By default: the
        model in float32, twice."""
        return 8.0

    def worked_on(self, shape: ModelShape, length: int) -> float:
        """Further bytes that `run` holds while it works on text in blocks of `length` tokens."""
        return 0.0

    def memory(self, shape: ModelShape, length: int = 512) -> int:
        """Estimated peak memory of the stage's process, in bytes.

        `length` is the block length of the pipeline's training text, for stages without a length of
        their own.
        """
        return round(LIBRARIES + self.held() * shape.weights + self.worked_on(shape, length))

    def costs_like(self) -> str:
        """Name that stages share whose seconds are in proportion to their passes, for estimates."""
        return self.use

    def searched(self, shape: ModelShape) -> float:
        """Passes over the weights beside those of text, for estimates: tokens that take as long. By
        default, a quantizer searches as many as the model is wide."""
        return float(shape.hidden_size) if self.role == "quantize" else 0.0

    def files(self) -> dict[str, Path]:
        """Files that the parameters name: parameter -> path. Their content is part of the key."""
        return {}

    def identity(self, file_sha256: Mapping[str, str]) -> dict[str, Any]:
        """The parameters that decide the result, as plain JSON. The hash of a file replaces its
        path.

        `file_sha256` maps each parameter in `files()` to the hash of that file's content.
        """
        values = self.model_dump(mode="json")
        use = values.pop("use")
        for place in PLACES:
            values.pop(place, None)
        named = {name: {"sha256": file_sha256[name]} for name in self.files()}
        return {"use": use, "version": self.version, "params": values | named}

    def run(self, job: StageJob) -> dict[str, Any]:
        """Read `job.source`, fill `job.target`, and return the stage's record for compose.json.

        Only weight stages run; a decode stage leaves the folder as it is.
        """
        raise TypeError(f"{self.use} makes no model folder, so there is nothing to run")


def _standing(shape: ModelShape | None, before: tuple[Stage, ...]) -> list[tuple[Role, str]]:
    """Role and name of each change to the model so far, including a quantization of the source
    model."""
    done: list[tuple[Role, str]] = [(stage.role, stage.use) for stage in before]
    quantized_in_chain = any(role == "quantize" for role, _ in done)
    if shape is not None and shape.quantized and not quantized_in_chain:
        done.insert(0, ("quantize", f"{shape.quantized} (the source model is quantized)"))
    return done


AS_STORED, IN_FLOAT32 = 2.0, 4.0
"""Bytes of a weight: in a mapped file of a 16-bit model, and in float32."""

TRAINED = {"frozen": 4.0, "lora": 9.0, "scales": 9.0, "full": 20.0, "codes": 26.0}
"""Bytes of a weight in a float32 fine-tune, by which part learns: the weight itself; where any part
learns, also a teacher, gradients and AdamW's two moments; where codes learn, also their positions
and the weights that they stand for."""


def training_bytes(shape: ModelShape, tokens: int, seen: int = 0) -> float:
    """About how many bytes a training step on `tokens` keeps for its backward pass: the activations
    of each token in each layer, and attention scores to `seen` tokens where these are materialized.
    """
    inside = 16 * shape.hidden_size + 6 * shape.intermediate_size + 3 * shape.num_heads * seen
    return 4.0 * tokens * shape.num_layers * inside
