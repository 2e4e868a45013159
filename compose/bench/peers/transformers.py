"""The peer `transformers`: `generate` on a model as `from_pretrained` gives it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compose.bench.measurement import Rows, Run
from compose.errors import UserError, suggest

if TYPE_CHECKING:
    from transformers.generation.configuration_utils import CompileConfig

WAYS = ("", "compiled", "lookup", "early-exit")
LOOKED_UP = 10  # tokens that transformers proposes from the prompt, as its documentation has it


class Transformers:
    """`generate` of transformers: plain, compiled over a static cache, or one of its own drafts."""

    arithmetic = prefill_arithmetic = None

    def __init__(
        self, folder: Path, dtype: torch.dtype, way: str, stop_tokens: Sequence[int]
    ) -> None:
        """`way` is empty, `compiled`, `lookup`, or `early-exit-LAYERS`.

        Raises UserError for another.
        """
        from gateskip.model.folders import load_model

        name, layer = (way[:10], way[11:]) if way.startswith("early-exit") else (way, "")
        if name not in WAYS or bool(layer) != (name == "early-exit") or not f"{layer}0".isdigit():
            raise UserError(
                f"system transformers:{way}: {suggest(name, WAYS[1:])}",
                fix="name compiled, lookup, early-exit-10, or none",
            )
        self.model, self.stop_tokens = load_model(folder, dtype), list(stop_tokens)
        self.settings: dict[str, Any] = {}
        if name == "compiled":
            self.settings = {"cache_implementation": "static", "compile_config": _compile_config()}
        elif name == "lookup":
            self.settings = {"prompt_lookup_num_tokens": LOOKED_UP}
        elif name == "early-exit":
            self.settings = {"assistant_early_exit": int(layer)}

    def __call__(self, rows: Rows, new_tokens: int) -> Run:
        """Continue `rows`; the time of one new token is called prefill."""
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        seconds = []
        for count in (1, new_tokens):
            started = time.perf_counter()
            text = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=self.stop_tokens,
                pad_token_id=self.stop_tokens[0],
                **self.settings,
            )
            seconds.append(time.perf_counter() - started)
        tokens = [_cut(row[longest:].tolist(), self.stop_tokens) for row in text]
        decoded = sum(map(len, tokens)) - len(rows)
        return Run(tokens, sum(map(len, rows)), seconds[0], decoded, seconds[1] - seconds[0])


def _compile_config() -> CompileConfig:
    """transformers' own settings to compile decoding, which it leaves off where there is no GPU."""
    from transformers.generation.configuration_utils import CompileConfig

    config: Any = CompileConfig()  # the attribute is private
    config._compile_all_devices = True
    compile_config: CompileConfig = config
    return compile_config


def _cut(tokens: list[int], stop_tokens: Sequence[int]) -> list[int]:
    stop = next((i for i, token in enumerate(tokens) if token in stop_tokens), len(tokens))
    return tokens[: stop + 1]
