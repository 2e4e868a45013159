"""A Triton kernel that multiplies a few rows by weights of floats on a GPU, or reads none of them
where no row's result is used."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gateskip.kernels.gpu.packed import INPUTS, last_input, launch


@triton.jit
def multiply_kernel(
    x,
    weight,
    bias,
    entered,
    out,
    n,
    k,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """out [ROWS, n] = x [ROWS, k] times weight [n, k], plus bias [n]. A program computes OUTPUTS
    outputs of all rows, from INPUTS inputs at a time; sums are float32."""
    n_at = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    sums = (tl.zeros([OUTPUTS, INPUTS], tl.float32),) * ROWS
    for first in range(0, last_input(entered, k, ROWS), INPUTS):
        at = first + tl.arange(0, INPUTS)
        inside = (n_at < n)[:, None] & (at < k)[None, :]
        places = n_at.to(tl.int64)[:, None] * k + at[None, :]
        weights = tl.load(weight + places, mask=inside, other=0).to(tl.float32)
        for row in tl.static_range(ROWS):
            inputs = tl.load(x + row * k + at, mask=at < k, other=0)
            more = weights * inputs.to(tl.float32)[None]
            sums = sums[:row] + (sums[row] + more,) + sums[row + 1 :]  # noqa: RUF005
    for row in tl.static_range(ROWS):
        total = tl.sum(sums[row], 1)
        if bias is not None:
            total += tl.load(bias + n_at, mask=n_at < n, other=0).to(tl.float32)
        tl.store(out + row * n + n_at, total.to(out.dtype.element_ty), mask=n_at < n)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, entered: Tensor) -> Tensor:
    fixed, (n, k) = {"INPUTS": INPUTS}, weight.shape
    return launch(multiply_kernel, x, (weight,), bias, entered, (n, k), fixed)


multiply_used = torch.library.custom_op(
    "gateskip::multiply_used",
    _multiply,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor entered) -> Tensor",
)
"""x [rows, in] -> [rows, out], in x's type, for 1 to FEW_ROWS rows and contiguous weights [out,
in]. Where no row of `entered`, bool [rows], is set, the product is 0 plus the bias."""
multiply_used.register_fake(lambda x, weight, *_: x.new_empty(len(x), len(weight)))
