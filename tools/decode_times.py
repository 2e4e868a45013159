"""How fast the native engine decodes with weights of each number of bits: random ones of a shape.

    python tools/decode_times.py --bits 2 3 4 8 --group 32 --rows 1 8 --threads 2
    python tools/decode_times.py --bits bf16 4 --context 64 7000 --kv-cache model int8

Models of one shape whose codes differ in nothing but their bits decode in turns, so that a drift of
the machine hits all alike. Each prints tokens a second, median with quartiles, the bytes that a
token reads, and microseconds of a step by part of the work. `--head` gives the bits of the LM head,
which the embedding shares. `int8` is what bitsandbytes' format becomes here: a scale a row; `bf16`
is not packed. Before the first token the cache holds `--context` positions of random keys and
values. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import product
from typing import Any

import torch
from shapes import SHAPES, empty_llama
from torch import nn

from gateskip.quantization.grid import Grid, exact_minimum, exact_scale
from gateskip.quantization.grid_linear import GridEmbedding, SharedHead, stored
from gateskip.quantization.packed_linear import PackedLinear
from gateskip.runtime.backend import SampleRequest
from gateskip.runtime.kv_cache import KVFormat
from gateskip.runtime.skipping import SkippingModel

Turn = tuple[str, int, int, KVFormat]  # bits, rows, context, cache

AT_ONCE = 64  # tokens from one depth on, before decoding goes back to it


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
    parser.add_argument("--context", type=int, nargs="+", default=[128])
    parser.add_argument("--kv-cache", choices=("model", "int8"), nargs="+", default=["model"])
    parser.add_argument("--step-by-step", action="store_true", help="a call for every token")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        models = {bits: make(options, bits) for bits in options.bits}
        turns = list(product(models, options.rows, options.context, options.kv_cache))
        speeds: dict[Turn, list[float]] = {turn: [] for turn in turns}
        parts: dict[Turn, dict[str, float]] = {}
        for _ in range(options.rounds + 1):
            for turn in turns:
                found, parts[turn] = speed(models[turn[0]], *turn[1:], options)
                speeds[turn].append(found)
    table = {"{} x {} after {} ({})".format(*turn): quartiles(speeds[turn][1:]) for turn in turns}
    for (name, (low, median, high)), turn in zip(table.items(), turns, strict=True):
        size = megabytes(models[turn[0]])
        each = ", ".join(f"{part} {us:.0f}" for part, us in parts[turn].items())
        print(
            f"{name:>28}: {median:8.1f} tokens/s ({low:.1f} to {high:.1f}), {size:.1f} MB; {each}"
        )
    print(json.dumps({"options": vars(options), "tokens_per_s": table}))


def make(options: Any, bits: str) -> SkippingModel:
    """A model of random weights behind the native backend."""
    model = empty_llama(options.shape, max_position_embeddings=1 << 17)
    for name, part in list(model.model.named_modules()):
        if isinstance(part, nn.Linear) and bits == "bf16":
            part.weight.normal_(std=part.in_features**-0.5)
        elif isinstance(part, nn.Linear):
            model.model.set_submodule(name, random_layer(part, options, bits))
        elif type(part).__name__.endswith("Norm"):
            part.weight.fill_(1)
    rows, width = model.get_input_embeddings().weight.shape
    if bits == "bf16":
        model.get_input_embeddings().weight.normal_(std=width**-0.5)
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
        return SkippingModel(model, None, "project", "native")
    table = GridEmbedding(rows, width, options.head, 32, torch.bfloat16)
    for name, value in stored(random_grid(rows, width, options.head, 32, False)).items():
        setattr(table, name, value)
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


def speed(
    model: SkippingModel, rows: int, context: int, kind: KVFormat, options: Any
) -> tuple[float, dict[str, float]]:
    """Tokens a second of `rows` rows that greedily decode from the same depth on, and microseconds
    of a step by part."""
    assert model.engine is not None
    before = model.engine.spent()
    model.kv_cache = kind
    cache = model.new_cache(rows, context + AT_ONCE)
    fill(cache)
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < options.seconds:
        if rows == 1 and not options.step_by_step:
            model.sample(SampleRequest(5, AT_ONCE), (cache, 0, context), None)
        else:
            step_by_step(model, cache, rows, context)
        done += rows * AT_ONCE
    rate, steps = done / (time.perf_counter() - begin), done / rows
    spent = {name: 1e6 * (s - before[name]) / steps for name, s in model.engine.spent().items()}
    return rate, spent


def step_by_step(model: SkippingModel, cache: Any, rows: int, context: int) -> None:
    """Tokens of several rows."""
    tokens = [[5]] * rows
    for slot in range(context, context + AT_ONCE):
        tokens, _ = model.argmax(tokens, cache, range(rows), [slot] * rows)


def fill(cache: Any) -> None:
    """Keys and values without a meaning, of the size that normed ones have."""
    for part in (*cache.keys, *cache.values):
        part.random_(-127, 128) if part.dtype == torch.int8 else part.normal_()
    for scales in cache.scales:
        for part in scales or ():
            part.fill_(1 / 64)


def megabytes(model: SkippingModel) -> float:
    """What a token reads of the layers' codes, scales (bfloat16) and offsets (bfloat16)."""
    dense = [part for part in model.model.model.modules() if isinstance(part, nn.Linear)]
    packed = [part for part in model.model.model.layers.modules() if isinstance(part, PackedLinear)]
    small = sum(2 * part.scale.numel() * (1 if part.offset is None else 2) for part in packed)
    whole = sum(part.weight.nbytes for part in dense)
    return (small + whole + sum(part.codes.numel() for part in packed)) / 1e6


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third."""
    low, middle, high = statistics.quantiles(values, n=4)
    return round(low, 1), round(middle, 1), round(high, 1)


if __name__ == "__main__":
    main()
