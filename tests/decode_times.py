"""How fast the native engine decodes with weights of each number of bits: random ones of a shape.

    python tests/decode_times.py --bits 2 3 4 8 --group 32 --rows 1 8 --threads 2

Models of one shape whose codes differ in nothing but their bits decode in turns, so that a drift of
the machine hits all alike. Each prints tokens a second, median with quartiles, and the bytes that a
token reads; `--head` gives the bits of the LM head, which the embedding shares. `int8` is
what bitsandbytes' format becomes here: a scale a row. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.quantization.grid import Grid, exact_minimum, exact_scale
from gateskip.quantization.grid_linear import GridEmbedding, SharedHead, stored
from gateskip.quantization.packed_linear import PackedLinear
from gateskip.runtime.skipping import SkippingModel

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
}
PROMPT, CAPACITY = 128, 512


def main() -> None:
    """Build the models, decode in turns, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--bits", type=str, nargs="+", default=["2", "3", "4", "8", "int8"])
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--head", type=int, choices=(4, 6, 8), default=8)
    parser.add_argument("--symmetric", action="store_true", help="no offsets")
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        models = {bits: make(options, bits) for bits in options.bits}
        turns = [f"{bits} x {rows}" for bits in models for rows in options.rows]
        speeds: dict[str, list[float]] = {turn: [] for turn in turns}
        for _ in range(options.rounds + 1):
            for bits, model in models.items():
                for rows in options.rows:
                    speeds[f"{bits} x {rows}"].append(speed(model, rows, options.seconds))
    table = {name: quartiles(found[1:]) for name, found in speeds.items()}  # the first warms up
    for name, (low, median, high) in table.items():
        size = megabytes(models[name.split()[0]])
        print(f"{name:>10} rows: {median:8.1f} tokens/s ({low:.1f} to {high:.1f}), {size:.1f} MB")
    print(json.dumps({"options": vars(options), "tokens_per_s": table}))


def make(options: Any, bits: str) -> SkippingModel:
    """A model of random codes behind the native backend."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES[options.shape]))
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    for name, part in list(model.model.named_modules()):
        if isinstance(part, nn.Linear):
            model.model.set_submodule(name, random_layer(part, options, bits))
        elif type(part).__name__.endswith("Norm"):
            part.weight.fill_(1)
    rows, width = model.get_input_embeddings().weight.shape
    table = GridEmbedding(rows, width, options.head, 32, torch.bfloat16)
    for name, value in stored(random_grid(rows, width, options.head, 32, False)).items():
        setattr(table, name, value)
    table.unpack()
    model.set_input_embeddings(table)
    model.set_output_embeddings(SharedHead(table))
    return SkippingModel(model, None, "project", "native")


def random_layer(linear: nn.Linear, options: Any, bits: str) -> PackedLinear:
    """Weights of a layer's shape and about the size that keeps activations in bounds."""
    n, k = linear.weight.shape
    if bits == "int8":
        return PackedLinear.of(random_grid(n, k, 8, k, False))
    with_offsets = not options.symmetric and bits != "8"  # 8 bits are symmetric in a folder, too
    return PackedLinear.of(random_grid(n, k, int(bits), options.group, with_offsets))


def random_grid(n: int, k: int, bits: int, group: int, with_offsets: bool) -> Grid:
    """Codes, scales and minima without a meaning."""
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    scale = exact_scale((torch.rand(n, k // group) + 0.5) * 2 / (1 << bits) / k**0.5)
    middle = 1 << (bits - 1)
    return Grid(
        codes, scale, exact_minimum(-middle * scale, scale, bits) if with_offsets else None, bits
    )


def speed(model: SkippingModel, rows: int, seconds: float) -> float:
    """Tokens a second of `rows` rows that decode from the same depth on."""
    ids = torch.randint(3, 1000, (rows, PROMPT))
    cache = model.new_cache(rows, CAPACITY)
    model.forward(ids, cache, [0] * rows)
    tokens, done, slot = [[5]] * rows, 0, PROMPT
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        states: Tensor = model.decode(tokens, cache, range(rows), [slot] * rows)
        tokens = [[int(best)] for best in model.head(states).argmax(-1)]
        done += rows
        slot = slot + 1 if slot + 1 < 2 * PROMPT else PROMPT
    return done / (time.perf_counter() - begin)


def megabytes(model: SkippingModel) -> float:
    """What a token reads of the layers' codes, scales (bfloat16) and offsets (bfloat16)."""
    packed = [part for part in model.model.modules() if isinstance(part, PackedLinear)]
    small = sum(2 * part.scale.numel() * (1 if part.offset is None else 2) for part in packed)
    return (small + sum(part.codes.numel() for part in packed)) / 1e6


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third."""
    low, middle, high = statistics.quantiles(values, n=4)
    return round(low, 1), round(middle, 1), round(high, 1)


if __name__ == "__main__":
    main()
