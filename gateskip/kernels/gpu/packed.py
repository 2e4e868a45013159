"""Triton kernels that multiply by packed integer weights on a GPU.

Codes are uint8 [out, in * bits / 8], 4 bits with the even input's code in the lower half of a byte,
or 8 bits. Scales and minima are [out, in / group], bfloat16 or float16. A weight is scale * code +
minimum, or scale * (code - 2**(bits - 1)) without minima; this is exact to one rounding in float32.

This is the order of the file: along a row. Lanes of a warp read neighbouring bytes of one row, so
that loads are coalesced, and a warp sums whole rows, so that no output needs a second pass or an
atomic addition. With codes along columns, few outputs would leave most of a GPU idle.

Sizes of tiles were chosen by the compiler's report of registers and spills; no card was available.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

FEW_ROWS = 8  # that a product takes without writing the weights to memory
# Of one warp, which needs no barrier: two rows of weights, 8 codes a lane. With 16, some spill.
OUTPUTS, INPUTS, WARPS = 2, 256, 1
# Of a block that unpacks weights
UNPACKED_OUTPUTS, UNPACKED_INPUTS, UNPACKING_WARPS = 4, 1024, 4
FUSED = {"enable_fp_fusion": True}  # multiply-adds of one rounding: off by default from Triton 3.10


@triton.jit
def _weights(
    codes,
    scale,
    minimum,
    n_at,
    n,
    group_at,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MIDDLE: tl.constexpr,
):
    """The float32 weights [outputs, groups, GROUP] of outputs n_at and groups group_at; those
    outside the matrix are zero."""
    BYTES: tl.constexpr = GROUP * BITS // 8
    inside = (n_at < n)[:, None] & (group_at < groups)[None, :]
    at = n_at.to(tl.int64)[:, None] * groups + group_at[None, :]
    places = at[:, :, None] * BYTES + tl.arange(0, BYTES)[None, None, :]
    code = tl.load(codes + places, mask=inside[:, :, None], other=0)
    if BITS == 4:
        pairs = tl.join(code & 15, code >> 4)
        code = tl.reshape(pairs, [n_at.shape[0], group_at.shape[0], GROUP])
    step = tl.load(scale + at, mask=inside, other=0).to(tl.float32)
    if minimum is None:
        lowest = -MIDDLE * step
    else:
        lowest = tl.load(minimum + at, mask=inside, other=0).to(tl.float32)
    return code.to(tl.float32) * step[:, :, None] + lowest[:, :, None]


@triton.jit
def last_input(entered, inputs, ROWS: tl.constexpr):
    """How many inputs a product has to read: none, where no byte of entered [ROWS] is set."""
    if entered is not None:
        flag = tl.load(entered)
        for row in tl.static_range(1, ROWS):
            flag |= tl.load(entered + row)
        inputs = tl.where(flag != 0, inputs, 0)
    return inputs


@triton.jit
def multiply_kernel(
    x,
    codes,
    scale,
    minimum,
    bias,
    entered,
    out,
    n,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MIDDLE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """out [ROWS, n] = x [ROWS, groups * GROUP] times the weights, plus bias [n]. A program computes
    OUTPUTS outputs of all rows, from GROUPS groups at a time; sums are float32. Where no byte of
    entered [ROWS] is set, it reads no weights, and the product is 0."""
    n_at = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    sums = (tl.zeros([OUTPUTS, GROUPS], tl.float32),) * ROWS
    for first in range(0, last_input(entered, groups, ROWS), GROUPS):
        group_at = first + tl.arange(0, GROUPS)
        weights = _weights(codes, scale, minimum, n_at, n, group_at, groups, BITS, GROUP, MIDDLE)
        at = group_at[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        for row in tl.static_range(ROWS):
            inputs = tl.load(
                x + row * groups * GROUP + at, mask=(group_at < groups)[:, None], other=0
            )
            more = tl.sum(weights * inputs.to(tl.float32)[None], 2)
            sums = sums[:row] + (sums[row] + more,) + sums[row + 1 :]  # noqa: RUF005
    for row in tl.static_range(ROWS):
        total = tl.sum(sums[row], 1)
        if bias is not None:
            total += tl.load(bias + n_at, mask=n_at < n, other=0).to(tl.float32)
        tl.store(out + row * n + n_at, total.to(out.dtype.element_ty), mask=n_at < n)


@triton.jit
def unpack_kernel(
    codes,
    scale,
    minimum,
    out,
    n,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MIDDLE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """out [n, groups * GROUP] = the weights, rounded to out's type. A program unpacks one tile of
    OUTPUTS rows and GROUPS groups."""
    n_at = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    group_at = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    weights = _weights(codes, scale, minimum, n_at, n, group_at, groups, BITS, GROUP, MIDDLE)
    inside = (n_at < n)[:, None] & (group_at < groups)[None, :]
    at = (n_at.to(tl.int64)[:, None] * groups + group_at[None, :]) * GROUP
    places = at[:, :, None] + tl.arange(0, GROUP)[None, None, :]
    tl.store(out + places, weights.to(out.dtype.element_ty), mask=inside[:, :, None])


def _multiply(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    bits: int,
    middle: int,
    entered: Tensor | None = None,
) -> Tensor:
    """x [rows, in] -> [rows, out] for 1 to FEW_ROWS rows."""
    n, groups = scale.shape
    group = x.shape[1] // groups
    fixed = {"BITS": bits, "GROUP": group, "MIDDLE": middle, "GROUPS": INPUTS // group}
    weights = (codes, scale, minimum)
    return launch(multiply_kernel, x, weights, bias, entered, (n, groups), fixed)


def launch(
    kernel: Any,
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    bias: Tensor | None,
    entered: Tensor | None,
    sizes: tuple[int, int],
    fixed: dict[str, int],
) -> Tensor:
    """The product of a kernel, x [rows, in] -> [rows, out]; `sizes` are the number of outputs and
    the kernel's number of inputs or groups."""
    out = x.new_empty(len(x), sizes[0])
    used = None if entered is None else entered.view(torch.uint8)
    fixed = fixed | {"ROWS": len(x), "OUTPUTS": OUTPUTS}
    if len(x):
        with torch.cuda.device_of(x):
            grid = (triton.cdiv(sizes[0], OUTPUTS),)
            kernel[grid](x, *weights, bias, used, out, *sizes, **fixed, num_warps=WARPS, **FUSED)
    return out


def _unpack(
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bits: int,
    middle: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weights [out, in] in a type."""
    n, groups = scale.shape
    k = codes.shape[1] * 8 // bits
    group = k // groups
    out = codes.new_empty(n, k, dtype=dtype)
    at_once = UNPACKED_INPUTS // group
    with torch.cuda.device_of(codes):
        unpack_kernel[(triton.cdiv(n, UNPACKED_OUTPUTS), triton.cdiv(groups, at_once))](
            codes,
            scale,
            minimum,
            out,
            n,
            groups,
            BITS=bits,
            GROUP=group,
            MIDDLE=middle,
            OUTPUTS=UNPACKED_OUTPUTS,
            GROUPS=at_once,
            num_warps=UNPACKING_WARPS,
            **FUSED,
        )
    return out


# Operators of torch: graphs and tensors without values (FakeTensorMode) know their results' sizes.
multiply_few = torch.library.custom_op(
    "gateskip::multiply_packed",
    _multiply,
    mutates_args=(),
    schema="(Tensor x, Tensor codes, Tensor scale, Tensor? minimum, Tensor? bias, int bits,"
    " int middle, Tensor? entered=None) -> Tensor",
)
multiply_few.register_fake(lambda x, codes, scale, *_: x.new_empty(len(x), len(scale)))

unpack = torch.library.custom_op(
    "gateskip::unpack",
    _unpack,
    mutates_args=(),
    schema="(Tensor codes, Tensor scale, Tensor? minimum, int bits, int middle, ScalarType dtype)"
    " -> Tensor",
)
unpack.register_fake(
    lambda codes, scale, minimum, bits, middle, dtype: codes.new_empty(
        len(codes), codes.shape[1] * 8 // bits, dtype=dtype
    )
)


def multiply(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    bits: int,
    middle: int,
    entered: Tensor | None = None,
) -> Tensor:
    """x [rows, in] -> [rows, out], in x's type; see the file for the other tensors.

    Up to FEW_ROWS rows meet weights in float32, which are never written to memory. For more rows
    the weights are written in x's type, and torch multiplies by them.

    `entered`, bool [rows], says which rows' results are used. Of few rows, none of which is, no
    weights are read, and the product is 0 plus the bias.
    """
    if len(x) <= FEW_ROWS:
        parts = (codes, scale, minimum, bias, bits, middle, entered)
        out: Tensor = multiply_few(x.contiguous(), *parts)
        return out
    weight = unpack(codes, scale, minimum, bits, middle, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
