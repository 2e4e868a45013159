"""Pruning: whole layers that change their input least, and neurons of the MLPs."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compose.errors import RuleBroken
from compose.stages.base import ModelShape, Role, Split, Stage


class DropLayers(Stage):
    """Remove whole decoder layers: the ones named, or the `count` that change their input least."""

    role: ClassVar[Role] = "prune"
    reads_data: ClassVar[tuple[Split, ...]] = ("calibration",)

    use: Literal["drop-layers"] = "drop-layers"
    """The stage's name."""

    count: int | None = Field(default=None, ge=1)
    """How many layers to drop, chosen by `metric`; give this or `layers`."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Which layers to drop, counted from 0; give this or `count`."""

    metric: Literal["block-influence"] = "block-influence"
    """How layers are ranked: 1 - cosine between a layer's input and its output."""

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if (self.count is None) == (self.layers is None):
            raise ValueError("drop-layers takes either 'count' or 'layers'")
        if self.layers is not None and not self.layers:
            raise ValueError("'layers' names no layer")
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise ValueError("'layers' names a layer twice")
        return self

    @property
    def dropped(self) -> int:
        """How many layers go."""
        return len(self.layers) if self.layers is not None else self.count or 0

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, and `layers-fit`: the layers exist, and at least one stays."""
        super().check(shape, before)
        if shape is None:
            return
        last = shape.num_layers - 1
        if self.layers is not None and max(self.layers) > last:
            raise RuleBroken(
                "layers-fit",
                f"drop-layers names layer {max(self.layers)}, but the last one is {last}",
            )
        if self.dropped > last:
            raise RuleBroken(
                "layers-fit",
                f"drop-layers drops {self.dropped} layers of {shape.num_layers}; one must stay",
            )

    def reshape(self, shape: ModelShape) -> ModelShape:
        """Fewer layers."""
        return replace(shape, num_layers=shape.num_layers - self.dropped)


class PruneWidth(Stage):
    """Remove the least important neurons from every MLP; all MLPs keep the same width."""

    role: ClassVar[Role] = "prune"
    reads_data: ClassVar[tuple[Split, ...]] = ("calibration",)

    use: Literal["prune-width"] = "prune-width"
    """The stage's name."""

    ratio: float = Field(gt=0, lt=1)
    """The share of each MLP's neurons to remove."""

    round_to: int = Field(default=32, ge=1)
    """The width that is kept is rounded down to a multiple of this."""

    def kept_width(self, width: int) -> int:
        """How many of `width` neurons stay: a multiple of `round_to`, as torch-pruning rounds.

        >>> PruneWidth(ratio=0.2).kept_width(1536)
        1216
        """
        kept = int(width * (1 - self.ratio))
        return kept - kept % self.round_to

    def check(self, shape: ModelShape | None, before: tuple[Stage, ...]) -> None:
        """Order rules, and `width-fits`: some neurons stay after rounding."""
        super().check(shape, before)
        if shape is not None and self.kept_width(shape.intermediate_size) == 0:
            raise RuleBroken(
                "width-fits",
                f"prune-width keeps no neuron: {1 - self.ratio:.3g} of {shape.intermediate_size}"
                f" is less than round_to {self.round_to}",
                fix="take a smaller ratio or a smaller round_to",
            )

    def reshape(self, shape: ModelShape) -> ModelShape:
        """Narrower MLPs."""
        return replace(shape, intermediate_size=self.kept_width(shape.intermediate_size))
