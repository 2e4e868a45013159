"""Choices by measured speed: timed once per machine, stored beside the compiled kernels.

Some processors that have the instructions multiply twice as fast in bfloat16 as in float32, others
half as fast; a library's own kernel for packed weights may be faster than ours. Each question is
timed once for a processor and a version of torch. Every later process reads the answer, so that all
of them use the same arithmetic. `GATESKIP_CACHE` names the folder.

Results of training, calibration and writing must not depend on a stopwatch. Within `by_capability`
nothing is timed and no stored answer is read: only the processor's instructions decide. `made`
gives the choices of this process, for the record.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gateskip.kernels.build import cache_folder, processor

ROWS_AT_ONCE = 8192  # rows of a weight that exist in float32: an LM head has many
CALLS = 7  # that time a kernel
CLEARLY = 1.5  # times as fast a library's kernels must be to be taken: noise must not choose
Kernel = Callable[[Tensor], Tensor]
Times = dict[str, dict[str, float]]
"""Microseconds for one row by `ours` and by the library's `own` kernel, by kind and shape."""

_made: dict[str, Any] = {}
_timing = True


@contextlib.contextmanager
def by_capability() -> Iterator[None]:
    """Within this context every choice is the same for all machines with the same instructions."""
    global _timing
    before, _timing = _timing, False
    try:
        yield
    finally:
        _timing = before


def made() -> dict[str, Any]:
    """The choices made so far in this process, by question."""
    return dict(_made)


def choices_file() -> Path:
    """The file with this machine's answers, for this version of torch."""
    return stored_beside("choices.json")


def stored_beside(name: str) -> Path:
    """A file beside the compiled kernels, of its own for each processor and version of torch."""
    stamp = hashlib.sha256(processor() + torch.__version__.encode()).hexdigest()[:16]
    stem, dot, ending = name.rpartition(".")
    return cache_folder() / f"{stem}-{stamp}{dot}{ending}"


@contextlib.contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """A path to write to, which replaces `file` when the block succeeds. Raises OSError where the
    folder cannot be written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as new:
        path = Path(new.name)
    try:
        yield path
        os.replace(path, file)
    finally:
        path.unlink(missing_ok=True)


def choices() -> dict[str, Any]:
    """Every answer stored so far, by question; empty where there is none."""
    try:
        stored: dict[str, Any] = json.loads(choices_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored


def measured_once(question: str, measure: Callable[[], Any]) -> Any:
    """The stored answer to a question; measured and stored where there is none.

    Where the folder cannot be written, the answer is kept for this process only.
    """
    stored = choices()
    if question in stored:
        return stored[question]
    answer = measure()
    with contextlib.suppress(OSError), new_file(choices_file()) as file:
        text = json.dumps(choices() | {question: answer}, indent=1, sort_keys=True)
        file.write_text(text, encoding="utf-8")
    return answer


def choice(question: str, measure: Callable[[], Any]) -> Any:
    """The answer to a question, recorded in `made`; None within `by_capability`."""
    if not _timing:
        return None
    _made[question] = measured_once(question, measure)
    return _made[question]


def bfloat16_is_faster() -> bool:
    """Whether a CPU's product of a layer's size is faster in bfloat16 than in float32.

    Within `by_capability`: whether the processor has matrix units for bfloat16 (AMX), or is AMD's
    with AVX-512 BF16. Both are always faster; Intel's without AMX were half as fast.
    """
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not _timing:
        by_amd = "AMD" in able.get("cpu_name", "") and able.get("avx512_bf16")
        return bool(able.get("amx_bf16", able.get("amx_tile")) or by_amd)
    if not any(able.get(name) for name in ("avx512_bf16", "amx_tile", "bf16")):
        return False
    question = f"bfloat16 products are faster, {torch.get_num_threads()} threads"
    _made[question] = _answered(question, torch.get_num_threads())
    return bool(_made[question])


def fast_products(device: str) -> contextlib.AbstractContextManager[Any]:
    """Within this context a model in float32 multiplies in bfloat16 where a device of that type,
    `cpu` or `cuda`, is faster at it. Sums stay in float32."""
    return torch.autocast(device, torch.bfloat16, enabled=is_fast_in_bfloat16(device))


def fast_type(device: str) -> torch.dtype:
    """The float type in which a device of that type multiplies faster."""
    return torch.bfloat16 if is_fast_in_bfloat16(device) else torch.float32


def is_fast_in_bfloat16(device: str) -> bool:
    """Whether a device of that type is faster in bfloat16 than in float32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bfloat16_is_faster()


@cache
def _answered(question: str, threads: int) -> bool:
    """The answer, kept in memory, because every layer asks for it."""
    return bool(measured_once(question, _bfloat16_wins))


def _bfloat16_wins() -> bool:
    return _seconds(torch.bfloat16) < _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    x, weight = (torch.ones(n, 1024, dtype=dtype) for n in (256, 1024))
    return min(timeit.repeat(partial(F.linear, x, weight), number=1))


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times weight [out, in], plus bias [out], in x's type, as F.linear; computed in
    float32 where bfloat16 would take longer. Autocast chooses the type itself."""
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or bfloat16_is_faster():
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    whole, biases = x.float(), [None] if bias is None else bias.float().split(ROWS_AT_ONCE)
    parts = [
        F.linear(whole, rows.float(), part_bias).to(x.dtype)
        for rows, part_bias in zip(weight.split(ROWS_AT_ONCE), cycle(biases))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def kernel_times(pairs: Mapping[str, tuple[int, Kernel, Kernel]]) -> Times:
    """Times of one row on our kernel and on the library's, for each pair of layers.

    `pairs` maps a layer's kind and shape to its inputs, our kernel, and the library's own. Empty
    within `by_capability`: then our kernels are used wherever they exist.
    """
    if not _timing:
        return {}

    def both(inputs: int, ours: Kernel, theirs: Kernel) -> dict[str, float]:
        x = torch.randn(1, inputs)
        return {"ours": _microseconds(ours, x), "own": _microseconds(theirs, x)}

    threads = torch.get_num_threads()
    return {
        name: measured_once(f"{name}, {threads} threads", partial(both, *pair))
        for name, pair in pairs.items()
    }


def own_are_faster(times: Times) -> bool:
    """Whether the libraries' own kernels are clearly faster, summed over one layer of each
    shape."""
    ours, theirs = (sum(layer[whose] for layer in times.values()) for whose in ("ours", "own"))
    faster = ours > CLEARLY * theirs
    if times:
        _made["packed weights run on"] = "the library's own kernels" if faster else "our kernels"
    return faster


def _microseconds(run: Kernel, x: Tensor) -> float:
    """Median time of a few calls, the first one left out."""
    seconds = []
    with torch.inference_mode():
        for _ in range(CALLS + 1):
            begin = time.perf_counter()
            run(x)
            seconds.append(time.perf_counter() - begin)
    return round(1e6 * sorted(seconds[1:])[CALLS // 2], 1)
