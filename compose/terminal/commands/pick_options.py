"""The options by which `pick` and `export` pick a cell, stated once for both commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compose.terminal.commands.options import (
    AtMostKl,
    AtMostMb,
    AtMostPerplexityRatio,
    MinRetained,
    words,
)

if TYPE_CHECKING:
    from compose.results.schema import CellResult, Results


@dataclass(frozen=True, kw_only=True)
class PickOptions:
    """The bounds and the aim by which a cell is picked: options of `pick` and of `export`."""

    at_most_kl: AtMostKl = None
    at_most_mb: AtMostMb = None
    at_most_memory_mb: Annotated[
        float | None,
        typer.Option(
            metavar="MB", help="Maximum memory that the loaded weights take, in megabytes."
        ),
    ] = None
    at_most_perplexity_ratio: AtMostPerplexityRatio = None
    min_retained: MinRetained = None
    maximize: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help="Metric to maximize: decode (decode speed; the default), prefill (prefill"
            " speed), retained (task score / baseline's score), accuracy (mean task score),"
            " agreement (share of tokens for which the most likely token equals the"
            " baseline's) or saved (share of compute saved).",
            autocompletion=words("decode", "prefill", "retained", "accuracy", "agreement", "saved"),
        ),
    ] = None
    minimize: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help="Metric to minimize: size (on disk), kl (KL divergence from the baseline),"
            " perplexity, resident (memory of the weights), peak (peak memory) or ttft (time"
            " to first token).",
            autocompletion=words("size", "kl", "perplexity", "resident", "peak", "ttft"),
        ),
    ] = None
    by_estimate: Annotated[
        bool,
        typer.Option(
            "--by-estimate",
            help="Compare the measured value of each quality metric with its limit; by default, the"
            " worse end of the metric's 95 % confidence interval must be within the limit.",
        ),
    ] = False
    require_lossless: Annotated[
        bool,
        typer.Option(
            help="Choose a variant with drafts only if a check has shown that its drafts do not"
            " change the output; on by default.",
            show_default=False,
        ),
    ] = True

    def pick(self, results: Results) -> CellResult:
        """The best cell within these bounds; raises as `compose.analysis.pick.pick`."""
        from compose.analysis.pick import pick as pick_cell

        return pick_cell(
            results,
            min_retained=self.min_retained,
            max_perplexity_ratio=self.at_most_perplexity_ratio,
            max_kl=self.at_most_kl,
            max_bytes=_bytes(self.at_most_mb),
            max_resident=_bytes(self.at_most_memory_mb),
            require_lossless=self.require_lossless,
            by_estimate=self.by_estimate,
            maximize=self.maximize,
            minimize=self.minimize,
        )


def _bytes(megabytes: float | None) -> float | None:
    """In bytes, rounded: 0.0003 megabytes would be 299.99999999999994 bytes."""
    return None if megabytes is None else round(megabytes * 1e6, 3)


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
