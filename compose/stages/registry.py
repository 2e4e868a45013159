"""The registry of stages: one literal. A new stage is a class in a file here and a row below."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from compose.stages.base import RULES, DataSpec, ModelShape, Stage, StageJob
from compose.stages.decode import Plain, Skip, Speculate
from compose.stages.draft_network import DraftNetwork
from compose.stages.gate import Gate
from compose.stages.heal import Heal
from compose.stages.prune.branches import PruneBranches
from compose.stages.prune.heads import PruneHeads
from compose.stages.prune.hidden import PruneHidden
from compose.stages.prune.layers import DropLayers
from compose.stages.prune.width import PruneWidth
from compose.stages.quantize.autoround import AutoRound
from compose.stages.quantize.bnb import Bnb
from compose.stages.quantize.gptq import Gptq
from compose.stages.quantize.head import PackHead
from compose.stages.quantize.integers import Int2, Int3, Int4, Int8

STAGES: dict[str, type[Stage]] = {
    "gate": Gate,
    "drop-layers": DropLayers,
    "prune-width": PruneWidth,
    "prune-heads": PruneHeads,
    "prune-hidden": PruneHidden,
    "prune-branches": PruneBranches,
    "heal": Heal,
    "int8": Int8,
    "int4": Int4,
    "int3": Int3,
    "int2": Int2,
    "bnb": Bnb,
    "gptq": Gptq,
    "autoround": AutoRound,
    "pack-head": PackHead,
    "draft-network": DraftNetwork,
    "plain": Plain,
    "skip": Skip,
    "speculate": Speculate,
}
"""What a YAML file's `use` may name."""

AnyStage = Annotated[
    Gate
    | DropLayers
    | PruneWidth
    | PruneHeads
    | PruneHidden
    | PruneBranches
    | Heal
    | Int8
    | Int4
    | Int3
    | Int2
    | Bnb
    | Gptq
    | AutoRound
    | PackHead
    | DraftNetwork
    | Plain
    | Skip
    | Speculate,
    Field(discriminator="use"),
]
"""The same classes as a type that pydantic reads, told apart by `use`."""

__all__ = [
    "RULES",
    "STAGES",
    "AnyStage",
    "AutoRound",
    "Bnb",
    "DataSpec",
    "DraftNetwork",
    "DropLayers",
    "Gate",
    "Gptq",
    "Heal",
    "Int2",
    "Int3",
    "Int4",
    "Int8",
    "ModelShape",
    "PackHead",
    "Plain",
    "PruneBranches",
    "PruneHeads",
    "PruneHidden",
    "PruneWidth",
    "Skip",
    "Speculate",
    "Stage",
    "StageJob",
]
