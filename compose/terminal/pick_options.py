"""The options by which `pick` and `export` pick a cell, stated once for both commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from compose.results.schema import CellResult, Results


@dataclass(frozen=True, kw_only=True)
class PickOptions:
    """The constraints and the aim by which a cell is picked: options of `pick` and of `export`."""

    min_retained: Annotated[
        float | None,
        typer.Option(
            help="Least share of the baseline's quality, 0 to 1; the lower end of the 95 %"
            " interval must reach it."
        ),
    ] = None
    max_perplexity_ratio: Annotated[
        float | None,
        typer.Option(help="Most perplexity, over the baseline's; for the upper end of the 95 %."),
    ] = None
    max_kl: Annotated[
        float | None,
        typer.Option(help="Most KL to the baseline, nats a token; for the upper end of the 95 %."),
    ] = None
    max_bytes: Annotated[str | None, typer.Option(help="Most size on disk, as 90MB.")] = None
    max_resident: Annotated[str | None, typer.Option(help="Most size in memory, as 200MB.")] = None
    require_lossless: Annotated[
        bool, typer.Option(help="Refuse speculation that was not measured to be lossless.")
    ] = True
    by_estimate: Annotated[
        bool,
        typer.Option("--by-estimate", help="Hold estimates against the bounds, not intervals."),
    ] = False
    maximize: Annotated[
        str, typer.Option(help="What to aim for: decode, prefill, size, accuracy, ...")
    ] = "decode"

    def pick(self, results: Results) -> CellResult:
        """The best cell under these constraints; raises as `results.pick.pick`."""
        from compose.analysis.pick import pick as pick_cell
        from compose.units import parse_bytes

        sizes = {"max_bytes": self.max_bytes, "max_resident": self.max_resident}
        limits = {name: None if size is None else parse_bytes(size) for name, size in sizes.items()}
        return pick_cell(results, **{**vars(self), **limits})


def with_pick_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `PickOptions`; it gets their values as `options`."""
    fields = inspect.signature(PickOptions, eval_str=True).parameters
    declared = inspect.signature(command, eval_str=True).parameters.values()

    @wraps(command)
    def call(**values: Any) -> None:
        options = PickOptions(**{name: values.pop(name) for name in fields})
        command(**values, options=options)

    parameters = [parameter for parameter in declared if parameter.name != "options"]
    keyword_only = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters]
    call.__signature__ = inspect.Signature([*keyword_only, *fields.values()])  # type: ignore[attr-defined]
    call.__annotations__ = {
        parameter.name: parameter.annotation for parameter in [*parameters, *fields.values()]
    }
    return call
