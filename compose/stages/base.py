"""What every stage is: light parameters, the question where it may stand, and `run`.

A stage is a frozen value. Planning asks it two questions that need no weights: may it stand here
(`check`), and what does it make of the model's shape (`reshape`). Running it is `run`, the only
place that imports torch. A stage file finds here all that it has to name: roles, shapes and jobs.
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
"""Parameters that say where a stage works, not what it makes."""

LIBRARIES = 0.8e9  # bytes of a process that has torch and transformers, and works on some text
UNPACKED = 16  # bits of a weight that no quantizer packed


class Stage(BaseModel):
    """One step of a chain. Subclasses add parameters; equal values are the same step."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    acts: ClassVar[Literal["weights", "decode"]] = "weights"
    """Whether the stage makes a new model folder or only sets how a folder is decoded."""

    role: ClassVar[Role]
    """What the stage is to the order rules."""

    version: ClassVar[int] = 1
    """Raised whenever the same parameters begin to give another result; part of the step's key."""

    reads_data: ClassVar[tuple[Split, ...]] = ()
    """The entries of `data` that `run` reads; they are then part of the step's key."""

    example: ClassVar[Mapping[str, Any]] = {}
    """Parameters with which the stage may stand in as many places as it can, where its defaults
    do not: those that docs/composition.md is made with."""

    groups: ClassVar[Mapping[str, type[BaseModel]]] = {}
    """Groups in which a file may write the parameters: the key of each, and its fields. Values and
    keys of steps are the same with and without them."""

    on_gpu: ClassVar[bool] = False
    """Whether `run` works on a GPU where there is one."""

    libraries: ClassVar[tuple[str, ...]] = ()
    """Libraries that `run` imports beside torch and transformers, by their import names."""

    use: str
    """Which stage this is: a key of `compose.stages.registry.STAGES`."""

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Refuse a place in a chain: after the stages `before`, on a model of `shape`.

        Rules that need sizes are passed over when `shape` is None.

        Raises:
            RuleBroken: with the name of a rule in `RULES`.
        """
        for role, use in _standing(shape, before):
            rule = FORBIDDEN.get((self.role, role))
            if rule is not None and not self.tolerates(rule):
                raise RuleBroken(rule, f"{self.use} cannot come after {use}: {RULES[rule]}")

    def tolerates(self, rule: str) -> bool:
        """Whether these parameters make the order rule `rule` void; no rule is, by default."""
        return False

    def reshape(self, shape: ModelShape) -> ModelShape:
        """The shape of the model that the stage makes of one of `shape`."""
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
        """How reports call the weights that a quantizer leaves; None where nothing is packed."""
        return self.use if self.role == "quantize" else None

    def most_bits(self) -> int:
        """Bits of the largest weights that the stage leaves in a model's layers."""
        return UNPACKED

    def stored_bits(self, shape: ModelShape) -> StoredBits | None:
        """Bits that a weight takes in the folder that a quantizer makes of a model of `shape`,
        scales included; None where the stage packs nothing, or cannot tell."""
        return None

    def held(self) -> float:
        """Bytes that `run` holds at its peak for each weight of the model it starts from: by
        default the model in float32 and as much again."""
        return 8.0

    def worked_on(self, shape: ModelShape, length: int) -> float:
        """Bytes that `run` holds beside the model's own, on text in blocks of `length` tokens."""
        return 0.0

    def memory(self, shape: ModelShape, length: int = 512) -> int:
        """About how much memory the stage's process holds at its peak, in bytes.

        `length` is that of the pipeline's training text, for stages that have none of their own.
        """
        return round(LIBRARIES + self.held() * shape.weights + self.worked_on(shape, length))

    def files(self) -> dict[str, Path]:
        """Files that the parameters name: parameter -> path. Their content is part of the key."""
        return {}

    def identity(self, file_sha256: Mapping[str, str]) -> dict[str, Any]:
        """What decides the stage's result, as plain JSON: the hash of a file stands for its path.

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
    """Role and name of what was done to the model so far, also before the chain began."""
    done: list[tuple[Role, str]] = [(stage.role, stage.use) for stage in before]
    quantized_in_chain = any(role == "quantize" for role, _ in done)
    if shape is not None and shape.quantized and not quantized_in_chain:
        done.insert(0, ("quantize", f"{shape.quantized} (the source model is quantized)"))
    return done


AS_STORED, IN_FLOAT32 = 2.0, 4.0
"""Bytes a weight of a mapped file that has two, and of a model in float32."""

TRAINED = {"frozen": 4.0, "lora": 9.0, "scales": 9.0, "full": 20.0, "codes": 26.0}
"""Bytes a weight of the model in a fine-tune, by what learns, in float32: itself, and where
anything of it learns a teacher, gradients and AdamW's two moments; where codes learn, their places,
and the weights that these stand for."""


def training_bytes(shape: ModelShape, tokens: int, seen: int = 0) -> float:
    """About what a step on `tokens` keeps for its backward pass, in bytes: the floats of each token
    in each layer, and its shares of attention to `seen` tokens where these are laid out."""
    inside = 16 * shape.hidden_size + 6 * shape.intermediate_size + 3 * shape.num_heads * seen
    return 4.0 * tokens * shape.num_layers * inside
