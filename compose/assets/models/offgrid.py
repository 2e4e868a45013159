"""The same model with other weights, which no longer lie on the grid that they were rounded to.

A model that comes out of a 4-bit file flatters every 4-bit quantizer: groups of 32 values find the
old grid again, and rounding seems to cost nothing. Two rewrites keep the function and move the
weights off the grid:

    norms    RMSNorm's weight w goes into the layers that read it: W (w * x) = (W diag(w)) x. The
             norm's own weight is then one. Norms that no linear layer reads stay: those after
             branches, and a final one whose LM head is the embedding. Gemma's norms level channels
             that are far larger than others: without them 8 bits would cost 35 times the KL (0.089
             for 0.0025). There random scales, as below, go from the norm into its readers.
    scales   up_proj's rows times s, down_proj's columns over s, with s random and no power of two:
             (s u) * g is s (u * g). Likewise v_proj's rows, with its bias, and o_proj's columns,
             where all query heads of a group share their key-value head's scales.

Products are taken in float64 and stored in float32, and the scales need only +, *, / of a generator
that Python keeps stable, so that every machine gets the same bytes.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.artifacts.folder import probe_ids, require_model
from compose.artifacts.intake import INDEX
from compose.artifacts.shards import mapped_tensors, save_shards
from compose.errors import AssetError, StepError

if TYPE_CHECKING:
    from torch import Tensor

SEED = 18
LEAST, RANGE = 0.7, 0.7  # of numerator and denominator of a scale: between 1/2 and 2
SAME = 5e-4  # of logits that reach 30, in float32; more is another function
CHUNK = 8192
READ_BY_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
READ_BY_MLP = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True)
class Norms:
    """How a family names the norms before its branches, and what it stores of them."""

    attention: str
    mlp: str
    less: float = 0.0  # the file stores the weight less this
    folded: bool = True  # whether all of a norm's weight goes into its readers, or random scales
    version: int = 1  # raised when the same folder begins to be rewritten in another way


NORMS = {
    "llama": Norms("input_layernorm", "post_attention_layernorm"),
    "qwen2": Norms("input_layernorm", "post_attention_layernorm"),
    "gemma3_text": Norms(
        "input_layernorm", "pre_feedforward_layernorm", less=1.0, folded=False, version=2
    ),
}


def write_off_grid(source: Path, target: Path, card: str) -> float:
    """Write the model in `source` to `target` with weights off the grid, and `card` as README.md.

    Files are mapped; memory holds the tensors of one output file (1.2 GB) at a time. Returns the
    largest difference of two logits on the probe text, both computed in float32.

    Raises:
        AssetError: `source` is of no family in NORMS.
        StepError: the folder that was written is another function.
    """
    config = require_model(source)
    if config.get("model_type") not in NORMS:
        families = " or ".join(NORMS)
        raise AssetError(f"{source} is no {families}, so its weights cannot be taken off a grid")
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name != INDEX:
            shutil.copyfile(path, target / path.name)
    with mapped_tensors(source) as weights:
        save_shards(target, off_grid(weights, config))
    (target / "README.md").write_text(card, encoding="utf-8")
    difference = largest_difference(source, target)
    if not difference <= SAME:
        raise StepError(
            f"the rewritten model is another one: its logits differ by {difference:.3g}"
        )
    return difference


def off_grid(
    weights: Mapping[str, Tensor], config: dict[str, Any], seed: int = SEED
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict with norms folded and scales drawn, a layer at a time."""
    draw, norms = random.Random(seed), NORMS[config["model_type"]]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        part = {name: weights[name] for name in weights if name.startswith(prefix)}
        _move_norm(part, prefix + norms.attention, prefix, READ_BY_ATTENTION, norms, draw)
        _move_norm(part, prefix + norms.mlp, prefix, READ_BY_MLP, norms, draw)
        _scale_mlp(part, prefix + "mlp.", draw)
        _scale_values(part, prefix + "self_attn.", config, draw)
        yield from part.items()
    part = {name: weights[name] for name in weights if not name.startswith("model.layers.")}
    if not config.get("tie_word_embeddings"):
        _move_norm(part, "model.norm", "", ("lm_head",), norms, draw)
    yield from part.items()


def _move_norm(
    weights: dict[str, Tensor],
    norm: str,
    prefix: str,
    readers: tuple[str, ...],
    family: Norms,
    draw: random.Random,
) -> None:
    """Multiply the columns of `readers` by the norm's weight [H], which becomes ones, or by random
    scales, which it is divided by."""
    stored = weights[f"{norm}.weight"]
    weight = stored.double() + family.less
    by = weight if family.folded else _scales(len(weight), draw)
    for reader in readers:
        name = f"{prefix}{reader}.weight"
        weights[name] = _product(weights[name], by)
    left = weight.new_ones(weight.shape) if family.folded else weight / by
    weights[f"{norm}.weight"] = (left - family.less).to(stored.dtype)


def _scale_mlp(weights: dict[str, Tensor], prefix: str, draw: random.Random) -> None:
    """Scales between up_proj [I, H] and down_proj [H, I], one an inner channel."""
    by = _scales(len(weights[f"{prefix}up_proj.weight"]), draw)
    _scale_rows(weights, f"{prefix}up_proj", by)
    _divide_columns(weights, f"{prefix}down_proj", by)


def _scale_values(
    weights: dict[str, Tensor], prefix: str, config: dict[str, Any], draw: random.Random
) -> None:
    """Scales between v_proj [K D, H] and o_proj [H, N D], one a channel of each key-value head."""
    heads = config["num_attention_heads"]
    groups = heads // (config.get("num_key_value_heads") or heads)
    by = _scales(len(weights[f"{prefix}v_proj.weight"]), draw)
    _scale_rows(weights, f"{prefix}v_proj", by)
    head_dim = len(weights[f"{prefix}o_proj.weight"][0]) // heads
    shared = by.view(-1, head_dim).repeat_interleave(groups, dim=0)  # [N, D]
    _divide_columns(weights, f"{prefix}o_proj", shared.flatten())


def _scales(count: int, draw: random.Random) -> Tensor:
    """Random positive scales [count] in float64; their logarithms lie around 0."""
    import torch

    ratios = [
        (LEAST + RANGE * draw.random()) / (LEAST + RANGE * draw.random()) for _ in range(count)
    ]
    return torch.tensor(ratios, dtype=torch.float64)


def _scale_rows(weights: dict[str, Tensor], layer: str, by: Tensor) -> None:
    for name, factor in ((f"{layer}.weight", by.unsqueeze(1)), (f"{layer}.bias", by)):
        if name in weights:
            weights[name] = _product(weights[name], factor)


def _divide_columns(weights: dict[str, Tensor], layer: str, by: Tensor) -> None:
    name = f"{layer}.weight"
    weights[name] = (weights[name].double() / by).to(weights[name].dtype)


def _product(weight: Tensor, by: Tensor) -> Tensor:
    """`weight` [n, k] or [n] times `by`, in float64, CHUNK rows at a time, for an LM head of a
    gigabyte."""
    result, by = weight.new_empty(weight.shape), by.expand(weight.shape)
    for rows, out, factor in zip(*(t.split(CHUNK) for t in (weight, result, by)), strict=True):
        out.copy_(rows.double() * factor)
    return result


def largest_difference(one: Path, other: Path) -> float:
    """Largest absolute difference of two models' logits on the probe text, in float32."""
    import torch

    from gateskip.quantization.folders import load_model

    ids, logits = probe_ids(one), []
    for folder in (one, other):
        with torch.inference_mode():
            logits.append(load_model(folder, "float32")(ids).logits)
    return float((logits[0] - logits[1]).abs().max())
