"""Speeds on a CUDA device, written as results.json: a part of tools/on_a_gpu.sh.

    python tools/on_a_gpu.py --out runs/on-a-gpu [--model FOLDER] [--shapes llama-1b llama-8b]

For each shape (random bfloat16 weights) and for the folder: decoding and prefill of gateskip, in
bfloat16 and in 4 bits, at full compute and with gates that skip a quarter, against transformers
compiled with a static cache, and where vLLM is installed, vLLM on our compressed-tensors export.
Besides, the cost of a condition: a small product that is masked, and the same after the host asked.
Never run on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PROMPT, NEW, REPEATS, BUDGET = 512, 128, 3, 0.75
Times = dict[str, list[float]]
"""`prefill` and `decode`: tokens a second of each repeat."""


def main() -> int:
    """Measure all models, and write results.json; 2 without a card."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/on-a-gpu"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shapes", nargs="*", default=["llama-1b", "llama-8b"])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("on_a_gpu.py needs a CUDA device and a CUDA build of torch.", file=sys.stderr)
        return 2
    from shapes import write_random

    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = {} if options.model is None else {options.model.name: options.model}
        for name, folder in folders.items():
            cells += measured(name, folder, Path(scratch))
        for shape in options.shapes:
            cells += measured(shape, write_random(shape, Path(scratch) / shape), Path(scratch))
    write(options.out, cells)
    return 0


def measured(name: str, folder: Path, scratch: Path) -> list[dict[str, Any]]:
    """A cell for each system on a folder; one that fails says why."""
    systems: dict[str, Callable[[], Times]] = {
        "plain": partial(gateskip_times, folder, None),
        "skip": partial(gateskip_times, folder, BUDGET),
        "int4": partial(int4_times, folder, scratch, None),
        "int4:skip": partial(int4_times, folder, scratch, BUDGET),
        "transformers:compiled": partial(transformers_times, folder),
    }
    if importlib.util.find_spec("vllm") is not None:
        systems["vllm:int4"] = partial(vllm_times, folder, scratch / f"{name}-int4")
    cells = []
    for system in systems:
        cell: dict[str, Any] = {"name": f"{name}:{system}", "chain": (), "status": "ok"}
        try:
            times = systems[system]()
            speed = {f"{part}_tokens_per_s": spread(rates) for part, rates in times.items()}
            cells.append(cell | {"speed": speed})
        except Exception as error:  # the others go on
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            cells.append(cell | {"status": "failed", "reason": why})
        print(cells[-1], flush=True)
        torch.cuda.empty_cache()
    return cells


def spread(rates: list[float]) -> dict[str, Any]:
    """The median of the repeats, and all of them."""
    return {"median": statistics.median(rates), "repeats": tuple(rates)}


def prompt_ids(vocabulary: int) -> list[int]:
    """Random token ids, the same in each run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (PROMPT,), generator=generator).tolist()


def gateskip_times(folder: Path, budget: float | None) -> Times:
    """The backend `gathered`, as `gateskip.load` prepares a model; below full compute static gates
    skip the last branches."""
    from gateskip.decoding.decoder import Decoder
    from gateskip.gates.kinds import make_gates
    from gateskip.model.families import find_branches
    from gateskip.quantization.folders import load_model
    from gateskip.quantization.gpu_linear import pack_for_gpu, pass_unused
    from gateskip.runtime.skipping import SkippingModel

    device = torch.device("cuda")
    model = load_model(folder, "bfloat16", device)
    pack_for_gpu(model)
    pass_unused(model)
    model = model.to(device)
    count, width = len(find_branches(model)), model.config.hidden_size
    gates = make_gates("scalar", count, width).to("cuda").requires_grad_(False)
    skipped = 0 if budget is None else round((1 - budget) * count)
    never, always = float("-inf"), float("inf")
    row = [never] * (count - skipped) + [always] * skipped
    decoder = Decoder(SkippingModel(model, gates), None, {BUDGET: row})
    settings: dict[str, Any] = {} if budget is None else {"mode": "skip", "budget": budget}
    ids, times = prompt_ids(model.config.vocab_size), Times(prefill=[], decode=[])
    for repeat in range(REPEATS + 1):
        stats = decoder.generate([ids], NEW, **settings).stats
        if repeat:  # the first one warms up
            times["prefill"].append(PROMPT / stats.prefill_s)
            times["decode"].append((NEW - 1) / stats.decode_s)
    return times


def int4_times(folder: Path, scratch: Path, budget: float | None) -> Times:
    """The same with the weights in 4 bits."""
    packed = scratch / f"{folder.name}-int4-packed"
    if not packed.exists():
        round_to_4_bits(folder, packed, "real")
    return gateskip_times(packed, budget)


def transformers_times(folder: Path) -> Times:
    """transformers, compiled with a static cache."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda")
    ids = torch.tensor([prompt_ids(model.config.vocab_size)], device="cuda")

    def run(count: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        settings = {"min_new_tokens": count, "do_sample": False, "cache_implementation": "static"}
        model.generate(ids, max_new_tokens=count, **settings)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    return timed(run)


def vllm_times(folder: Path, target: Path) -> Times:
    """vLLM on the folder rounded to int4, as compressed-tensors."""
    from vllm import LLM, SamplingParams

    model = LLM(str(as_compressed(folder, target)), max_model_len=PROMPT + NEW)
    ids = prompt_ids(model.llm_engine.model_config.get_vocab_size())

    def run(count: int) -> float:
        started = time.perf_counter()
        settings = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        model.generate([{"prompt_token_ids": ids}], settings, use_tqdm=False)
        return time.perf_counter() - started

    return timed(run)


def as_compressed(folder: Path, target: Path) -> Path:
    """The folder rounded to 4 bits by the weights alone, in the format compressed-tensors."""
    from compose.artifacts.compressed_tensors import write_compressed

    packed = target.with_name(f"{target.name}-integer")
    round_to_4_bits(folder, packed, "integer")
    write_compressed(packed, target)
    return target


def round_to_4_bits(folder: Path, target: Path, offset: str) -> None:
    """Fill the new folder `target` with the weights of `folder` in 4 bits, rounded alone."""
    from compose.contract import StageJob
    from compose.stages.quantize.integers import Int4

    target.mkdir(parents=True)
    where: dict[str, Any] = {"source": folder, "dense": folder, "target": target}
    where |= {"work": target.with_name("work"), "asset_cache": target.with_name("cache")}
    text = {"train": None, "calibration": None}
    stage = Int4.model_validate({"use": "int4", "calibrate": False, "offset": offset})
    stage.run(StageJob(seed=0, dtype="bfloat16", **where, **text))
    for file in folder.glob("*token*"):
        (target / file.name).write_bytes(file.read_bytes())


def timed(run: Callable[[int], float]) -> Times:
    """Rates of a system that answers in one call: one token is prefill, the rest is decoding."""
    times = Times(prefill=[], decode=[])
    run(NEW)  # compiles
    run(1)
    for _ in range(REPEATS):
        first = run(1)
        times["prefill"].append(PROMPT / first)
        times["decode"].append((NEW - 1) / max(run(NEW) - first, 1e-9))
    return times


def condition_cost() -> dict[str, float]:
    """Microseconds of a product [1, 2048] x [2048, 2048] that is masked, and of one before which
    the host asks whether it is needed."""
    weight = torch.ones(2048, 2048, dtype=torch.bfloat16, device="cuda")
    x, keep = weight[:1], torch.ones(1, 1, dtype=torch.bool, device="cuda")

    def masked() -> None:
        torch.where(keep, x @ weight, x)

    def asked() -> None:
        if bool(keep.any()):
            x @ weight

    return {"masked_us": microseconds(masked), "asked_us": microseconds(asked)}


def microseconds(work: Callable[[], None], count: int = 200) -> float:
    """The mean time of one call."""
    for _ in range(count):
        work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / count * 1e6


def write(out: Path, cells: list[dict[str, Any]]) -> None:
    """Write the cells and the machine as results.json."""
    from compose.bench.speed.measure import roofline
    from compose.results.environment import capture_environment
    from compose.results.io import FILE_NAME, save_results
    from compose.results.schema import Results

    costs = condition_cost()
    note = ", ".join(f"{name} {value:.1f}" for name, value in costs.items())
    machine = capture_environment() | {"device": "cuda", "roofline": roofline("cuda")}
    shape = {"speed": {"prompt_tokens": PROMPT, "new_tokens": NEW, "repeats": REPEATS}}
    results = Results.model_validate(
        {
            "run": "on-a-gpu",
            "environment": machine,
            "baseline": cells[0]["name"],
            "command": "tools/on_a_gpu.sh",
            "dtype": "bfloat16",
            "benchmark": shape,
            "notes": (f"cost of a condition: {note}",),
            "cells": cells,
        }
    )
    out.mkdir(parents=True, exist_ok=True)
    save_results(results, out / FILE_NAME)
    print(f"{out / FILE_NAME} is written")


if __name__ == "__main__":
    sys.exit(main())
