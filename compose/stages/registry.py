"""The table of all stages. A new stage is a class in its own file and one row below."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from compose.stages.base import RULES as RULES
from compose.stages.base import DataSpec as DataSpec
from compose.stages.base import ModelShape as ModelShape
from compose.stages.base import Stage
from compose.stages.base import StageJob as StageJob
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
from compose.stages.quantize.integers import Int2, Int3, Int4, Int6, Int8

CLASSES: tuple[type[Stage], ...] = (
    Gate,
    DropLayers,
    PruneWidth,
    PruneHeads,
    PruneHidden,
    PruneBranches,
    Heal,
    Int8,
    Int6,
    Int4,
    Int3,
    Int2,
    Bnb,
    Gptq,
    AutoRound,
    PackHead,
    DraftNetwork,
    Plain,
    Skip,
    Speculate,
)
"""All stages, in the order in which pages list them."""

STAGES: dict[str, type[Stage]] = {stage.model_fields["use"].default: stage for stage in CLASSES}
"""The names that `use` may have in a YAML file."""

if TYPE_CHECKING:
    AnyStage = Stage
else:
    AnyStage = Annotated[Union[CLASSES], Field(discriminator="use")]  # noqa: UP007
    """The same classes as a type that pydantic reads, told apart by `use`."""
