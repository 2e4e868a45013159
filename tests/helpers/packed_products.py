"""Products on a GPU's kernels, by packed weights and by floats, compared with torch's: on a device,
or run as a program in Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gateskip.quantization.gpu_linear import (
    GpuLinear,
    UsedLinear,
    pack_for_gpu,
    pass_unused,
    used_rows,
)
from gateskip.quantization.grid import Grid, exact_minimum, exact_scale

SUMS = 1e-6
"""Bound of a float32 sum's error, as a share of the sum of the absolute values."""


@dataclass(frozen=True)
class Case:
    """One product: the numbers of bits, group size, groups, outputs and rows, and what it has."""

    bits: int
    group: int
    groups: int
    outputs: int
    rows: int
    minimum: bool = True
    bias: bool = False
    dtype: str = "float32"
    stored: str = "bfloat16"

    def __str__(self) -> str:
        sizes = f"{self.bits} bits {self.outputs}x{self.groups}*{self.group} {self.rows} rows"
        return f"{sizes} {self.dtype}{' bias' * self.bias}{' minimum' * self.minimum}"


CASES = (
    Case(4, 32, 1, 1, 1, bias=True),
    Case(4, 32, 17, 15, 2),
    Case(4, 64, 9, 17, 7, bias=True),
    Case(4, 128, 5, 33, 3, minimum=False),
    Case(4, 32, 3, 17, 8, dtype="bfloat16"),
    Case(4, 128, 3, 15, 9, bias=True),
    Case(4, 64, 2, 33, 9, dtype="bfloat16", bias=True),
    Case(8, 32, 17, 17, 3, minimum=False, bias=True),
    Case(8, 64, 9, 1, 8, minimum=False),
    Case(8, 128, 5, 15, 7, minimum=False, dtype="bfloat16"),
    Case(8, 128, 1, 33, 1, minimum=False, bias=True),
    Case(8, 32, 5, 33, 9, minimum=False),
    Case(3, 32, 5, 15, 2, stored="float16"),
    Case(6, 64, 3, 17, 1, minimum=False, stored="float16", bias=True),
)


def layer_of(case: Case) -> GpuLinear:
    """A layer of random codes, scales and minima."""
    random = torch.Generator().manual_seed(0)
    sizes = (case.outputs, case.groups)
    k = case.groups * case.group
    codes = torch.randint(0, 1 << case.bits, (case.outputs, k), generator=random)
    scale = exact_scale(torch.rand(sizes, generator=random) / (1 << case.bits) + 1e-3)
    low = -torch.rand(sizes, generator=random) * (1 << case.bits) * scale
    low = exact_minimum(low, scale, case.bits) if case.minimum else None
    bias = torch.randn(case.outputs, generator=random) if case.bias else None
    grid = Grid(codes.to(torch.uint8), scale, low, case.bits)
    return GpuLinear(grid, bias, getattr(torch, case.stored))


def measured(case: Case, device: str) -> dict[str, Any]:
    """The largest error of a product, as a share of what is allowed; whether weights unpacked in
    float32 are the grid's, bit by bit; and whether those in bfloat16 are these rounded, or cut."""
    from gateskip.kernels.gpu.packed import FEW_ROWS, unpack

    dtype, layer = getattr(torch, case.dtype), layer_of(case)
    weight = layer.grid().weight()
    random = torch.Generator().manual_seed(1)
    x = torch.randn(case.rows, layer.in_features, generator=random).to(dtype)
    layer = layer.to(device)
    with torch.no_grad():
        out = layer(x.to(device))
    assert out.dtype == dtype and out.shape == (case.rows, case.outputs)
    parts = (layer.codes, layer.scale, layer.minimum, layer.width, layer.middle)
    unpacked, small = (unpack(*parts, type_).cpu() for type_ in (torch.float32, torch.bfloat16))
    used = weight if case.rows <= FEW_ROWS or dtype == torch.float32 else small
    bias = None if layer.bias is None else layer.bias.cpu()
    return {
        "case": str(case),
        "error": _error(out.cpu(), x, used, bias),
        "exact": torch.equal(unpacked, weight),
        "rounded": torch.equal(small, weight.bfloat16()),
        "cut": torch.equal(small.float(), _cut(weight)),
        "flag": case.rows > FEW_ROWS or _reads_flag(layer, x.to(device), out),
    }


def _reads_flag(layer: GpuLinear, x: Tensor, out: Tensor) -> bool:
    """Whether rows that none uses meet no weight, scales that are no numbers least of all, and one
    used row changes nothing of the product."""
    used = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    with torch.no_grad(), used_rows(used):
        scale, layer.scale = layer.scale, torch.full_like(layer.scale, torch.nan)
        none = layer(x)
        layer.scale = scale
        used[-1] = True
        one = layer(x)
    bias = torch.zeros(1, device=x.device) if layer.bias is None else layer.bias
    return torch.equal(none, bias.to(out.dtype).expand_as(none)) and torch.equal(one, out)


def _cut(weight: Tensor) -> Tensor:
    """Float32 cut to the bits of bfloat16: Triton's interpreter cuts, a GPU rounds."""
    return (weight.view(torch.int32) & -65536).view(torch.float32)


def _error(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """The largest error as a share of the bound: SUMS of the absolute products, and roundings of
    the product, the bias and their sum to out's type. Torch's product is in float64."""
    exact, bias = x.double(), None if bias is None else bias.double()
    expected = F.linear(exact, weight.double(), bias)
    size = F.linear(exact.abs(), weight.double().abs(), None if bias is None else bias.abs())
    rounded = expected.abs() if bias is None else expected.abs() + bias.abs()
    bound = SUMS * size + torch.finfo(out.dtype).eps * rounded
    return float(((out.double() - expected).abs() / bound).max())


def of_a_model(folder: str, device: str) -> dict[str, Any]:
    """Logits of a folder of grids on these kernels against those of unpacked weights, as a share of
    their spread: of a prompt in one pass, and then token by token."""
    from gateskip.quantization.folders import load_model
    from gateskip.runtime.skipping import SkippingModel

    ids = torch.tensor([[5, 9, 2, 31, 7, 11, 3, 8, 40, 21]], device=device)
    model = load_model(folder, "float32").to(device)
    with torch.inference_mode():
        expected = model(ids).logits[0]
        replaced = pack_for_gpu(model)
        backend = SkippingModel(model.to(device), None).backend
        cache = backend.new_cache(1, ids.shape[1])
        prompt = backend.prefill(ids[:, :-1], cache, [0])
        answer = backend.decode([[int(ids[0, -1])]], cache, [0], [ids.shape[1] - 1])
        logits = backend.logits(torch.cat((prompt[0, -1:], answer)))
    error = (logits - expected[-2:]).abs().max() / expected.std()
    return {"replaced": replaced, "error": float(error)}


FLOATS = ((1, 1, 1), (2, 15, 257), (7, 17, 64), (8, 33, 300))
"""Rows, outputs and inputs of products by floats."""


def of_floats(device: str) -> list[float]:
    """The largest error of each product in FLOATS as a share of its bound, in float32 and bfloat16;
    infinity where weights are read of which no row is used."""
    errors, random = [], torch.Generator().manual_seed(2)
    for dtype in (torch.float32, torch.bfloat16):
        for rows, n, k in FLOATS:
            linear = nn.Linear(k, n, bias=n % 2 == 1, device="cpu").to(dtype)
            linear.__class__ = UsedLinear
            x = torch.randn(rows, k, generator=random).to(dtype)
            used = torch.zeros(rows, dtype=torch.bool)
            used[-1] = True
            with torch.no_grad(), used_rows(used.to(device)):
                out = linear.to(device)(x.to(device)).cpu()
            weight, bias = linear.weight.detach().cpu(), linear.bias
            bias = None if bias is None else bias.detach().cpu()
            errors.append(_error(out, x, weight, bias))
            linear.weight.data.fill_(torch.nan)
            with torch.no_grad(), used_rows(torch.zeros_like(used).to(device)):
                none = linear(x.to(device)).cpu()
            expected = torch.zeros(n, dtype=dtype) if bias is None else bias
            errors[-1] = errors[-1] if torch.equal(none, expected.expand_as(none)) else math.inf
    return errors


def of_skipped_branches(
    folder: str, device: str, kv_rule: str, prepare: Callable[[Any], int]
) -> dict[str, Any]:
    """Logits of tokens that skip an attention branch, an MLP branch, both and none: a model that
    `prepare` gave these kernels, against the same without."""
    from gateskip.gates.kinds import make_gates
    from gateskip.quantization.folders import load_model
    from gateskip.runtime.on_device import DeviceUsage
    from gateskip.runtime.skipping import SkippingModel

    ids = torch.tensor([[5, 9, 2, 31, 7, 11, 3]], device=device)
    logits = []
    with torch.inference_mode():
        for prepared in (False, True):
            model = load_model(folder, "float32").to(device)
            if prepared:
                prepare(model)
            gates = make_gates("scalar", 2, model.config.hidden_size).to(device)
            backend = SkippingModel(model.to(device), gates, kv_rule).backend
            if prepared:  # the steps of a device, on whatever there is
                backend.on_cpu, backend.usage = False, DeviceUsage.of(model)
            cache = backend.new_cache(1, ids.shape[1])
            backend.prefill(ids[:, :3], cache, [0])
            steps = [
                backend.decode([[int(ids[0, at])]], cache, [0], [at], [attention, mlp])
                for at, (attention, mlp) in enumerate(
                    itertools.product((-math.inf, math.inf), repeat=2), 3
                )
            ]
            logits.append(backend.logits(torch.cat(steps)))
            entered = backend.usage.kept
    error = (logits[0] - logits[1]).abs().max() / logits[0].std()
    return {"entered": list(entered), "error": float(error)}


if __name__ == "__main__":
    found = {"cases": [measured(case, "cpu") for case in CASES]}
    found["model"] = of_a_model(sys.argv[1], "cpu")
    rules = ("project", "copy")
    ways = {"packed": (sys.argv[1], pack_for_gpu), "floats": (sys.argv[2], pass_unused)}
    found["floats"] = of_floats("cpu")
    found["skipped"] = {
        f"{way} {rule}": of_skipped_branches(folder, "cpu", rule, prepare)
        for way, (folder, prepare) in ways.items()
        for rule in rules
    }
    print(json.dumps(found))
