"""The price of integer zero points, which compressed-tensors has in place of real minima."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compose.artifacts.packed_folder import tensor_files, tensors_of
from compose.artifacts.predictions import fill, kl_of_logits, unfilled
from compose.numbers import metric_text

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 768


def kl_by_offset(dense: Path, layers: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """KL from a model's predictions to those of its weights rounded with `real` minima, and with
    `integer` zero points.

    `layers` are the bits and the size of a group of each layer that is rounded, by name. Each
    weight is rounded by itself, and the text is the first TOKENS tokens of the prompts that the
    package holds. So the two compare the formats, and do not say what the model loses that was
    rounded with compensation.
    """
    import torch

    from gateskip.quantization.offsets import Offset
    from gateskip.quantization.rounding import round_to_grid

    model, weights, _ = unfilled(dense)
    ids, read, found = _ids(dense), tensors_of(dense), {}
    offsets: tuple[Offset, ...] = ("real", "integer")
    with torch.inference_mode():
        fill(weights, ((name, read(name)) for name in tensor_files(dense)))
        logits = model(ids).logits
        for offset in offsets:
            for name, (bits, group) in layers.items():
                weight = read(f"{name}.weight").float()
                ones = torch.ones(weight.shape[1])
                grid = round_to_grid(weight, ones, bits, group, offset)
                weights[f"{name}.weight"].copy_(grid.weight())
            found[str(offset)] = kl_of_logits(logits, model(ids).logits)
    return found


def price_text(price: dict[str, float] | None) -> tuple[str, ...]:
    """The result of `kl_by_offset` as a line; none where nothing was measured."""
    if price is None:
        return ()
    real, integer = (metric_text("kl", price[offset]) for offset in ("real", "integer"))
    said = f"{integer} with integer zero points, {real} with real minima"
    return (f"rounded without calibration, the KL to the original model is {said}",)


def _ids(folder: Path) -> Tensor:
    """Token ids [1, S] of the prompts, by the folder's tokenizer."""
    from transformers import AutoTokenizer

    file = importlib.resources.files("compose") / "data" / "prompts.jsonl"
    prompts = [json.loads(line)["prompt"] for line in file.read_text("utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: Tensor = tokenizer("\n\n".join(prompts), return_tensors="pt").input_ids[:, :TOKENS]
    return ids
