"""Names of a model's linear layers, and the settings that all quantizers share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from compose.errors import RuleBroken, UserError, suggest
from compose.stages.base import ModelShape, StageJob
from compose.stages.shape import is_value

DeviceMap = Literal["auto", "balanced", "sequential", "cpu"]
"""How accelerate places layers: `device_map` of `from_pretrained`."""

Bits = Literal[2, 3, 4, 6, 8]
"""Bits of one packed weight."""


def linear_names(job: StageJob) -> tuple[list[str], list[str]]:
    """Names of the source model's linear layers, and that of its LM head, without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.source))
    head = model.get_output_embeddings()
    linears = {n: part for n, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    return list(linears), [name for name, part in linears.items() if part is head]


def refuse_tied_head(shape: ModelShape) -> None:
    """Raises RuleBroken where the LM head shares the embedding's weights."""
    if shape.tie_embeddings:
        raise RuleBroken(
            "head-is-tied",
            "the LM head of this model shares the embedding's weights, which are not packed",
            fix="leave lm_head out, or add pack-head after it: decoding then reads 8 bits",
        )


def matching(ends: Iterable[str], names: list[str], key: str = "skip") -> list[str]:
    """The names that end in one of `ends`; `key` is the stage's setting that holds those ends.

    Raises:
        UserError: an end matches no name.
    """
    matches = {end: [name for name in names if f".{name}".endswith(f".{end}")] for end in ends}
    for end, fitting in matches.items():
        if not fitting:
            last_names = sorted({name.rpartition(".")[2] for name in names})
            raise UserError(f"{key}: no linear layer is called {end!r}: {suggest(end, last_names)}")
    return [name for fitting in matches.values() for name in fitting]


def value_projections(names: Iterable[str]) -> list[str]:
    """Names of the value projections among the layers; empty where queries, keys and values are one
    layer."""
    return [name for name in names if is_value(name)]
