"""Chooses the node of a Ray cluster that times cells, and tells its kind.

Speeds are comparable only on equal machines. Timed workers run on one node: that of `gateskip run`,
or one that was marked for it (`ray start --resources='{"gateskip_speed": 1}'`). All marked nodes
must have the same processor model and accelerator, so that another can replace a lost one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compose.errors import StepError, UserError

SPEED = "gateskip_speed"
"""The resource that marks a node on which speed is measured."""
_TYPE = "accelerator_type:"
"""Prefix of Ray's resources that name a node's accelerator type."""

Node = Mapping[str, Any]


@dataclass(frozen=True, order=True)
class Kind:
    """The properties that two nodes must share for their speeds to be compared."""

    processor: str
    """The model, as its kernel names it."""
    accelerator: str = ""
    """The type, as Ray names it; empty where there is none."""

    def __str__(self) -> str:
        return f"{self.processor} with {self.accelerator}" if self.accelerator else self.processor


def accelerator_of(node: Node) -> str:
    """The accelerators of a node, as the cluster knows them."""
    resources = node["Resources"]
    named = sorted(name.removeprefix(_TYPE) for name in resources if name.startswith(_TYPE))
    return ", ".join(named) or ("GPU" if resources.get("GPU", 0) > 0 else "")


class TimedNodes:
    """Chooses the node on which timed workers run, and keeps to it and its kind."""

    def __init__(self, this_node: str, kind_of: Callable[[Node], Kind]) -> None:
        self._own, self._kind_of = this_node, kind_of
        self._kinds: dict[str, Kind] = {}
        self._kind: Kind | None = None
        self._chosen: str | None = None

    def choose(self, alive: Sequence[Node]) -> str:
        """The node's id: the one chosen before, while it is alive.

        Raises:
            UserError: the marked nodes are of several kinds.
            StepError: no node is left of the kind that was measured on before.
        """
        marked = {node["NodeID"]: node for node in alive if node["Resources"].get(SPEED, 0) > 0}
        if not marked and self._kind is None:
            return self._own
        for name, node in marked.items():
            if name not in self._kinds:
                self._kinds[name] = self._kind_of(node)
        if self._kind is None:
            self._kind = _only({name: self._kinds[name] for name in marked})
        able = [name for name in marked if self._kinds[name] == self._kind]
        if self._chosen not in able:
            self._chosen = next(iter(able), None)
        if self._chosen is None:
            raise StepError(
                f"speed is measured on nodes of the kind {self._kind}, and none is left in the "
                "Ray cluster",
                fix=f"add one (`ray start --resources='{{\"{SPEED}\": 1}}'`), and run it again",
            )
        return self._chosen


def _only(kinds: Mapping[str, Kind]) -> Kind:
    distinct = sorted(set(kinds.values()))
    if len(distinct) == 1:
        return distinct[0]
    listed = "; ".join(
        f"{kind} ({sum(node_kind == kind for node_kind in kinds.values())} nodes)"
        for kind in distinct
    )
    raise UserError(
        f"the nodes that are marked {SPEED} are of {len(distinct)} kinds, and speeds on them "
        f"cannot be compared: {listed}",
        fix="mark nodes of one kind only",
    )
