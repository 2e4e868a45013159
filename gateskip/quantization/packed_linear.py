"""Linear layers for decoding: the model's weights behind kernels for few rows.

`accelerate_linears` replaces the layers that have a faster kernel. Within `streaming`, which
decoding enters, rows go through the compiled kernels, which read the weights once; otherwise
through torch's GEMM, for which packed weights are unpacked first. So the caller's phase decides the
arithmetic, not the number of rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gateskip.extras import need
from gateskip.kernels import build, ops
from gateskip.kernels.abi import BLOCK, ROWS_PER_TILE, Kind, Matrix, PrefillUnits
from gateskip.kernels.autotune import Kernel, bfloat16_is_faster, product
from gateskip.model.families import final_norm
from gateskip.model.projections import Rows
from gateskip.quantization.grid import Grid, Lines, middle, unpack_bits
from gateskip.quantization.grid_linear import GridLinear
from gateskip.quantization.offsets import STEPS_BELOW
from gateskip.quantization.tiles import pack_codes, tiles

BITS = (2, 3, 4, 6, 8)  # of a code that has kernels
ZERO_POINT = 128  # what makes signed bytes unsigned; the kernels take it off again
NF4_BLOCK = 64  # weights that share a scale in a draft's NF4
Parts = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int]
"""Scale, offset, exponents and table of a layer, and the code whose values the offsets are."""
Samples = dict[str, tuple["PackedLinear", nn.Module]]
"""One packed layer of each kind and shape: ours, and the library's that it replaces."""


_streams: ContextVar[bool] = ContextVar("streaming", default=False)
_rounds: ContextVar[bool] = ContextVar("rounding", default=False)


@contextmanager
def streaming() -> Iterator[None]:
    """Within this context, without gradients, layers multiply by kernels that suit a few rows."""
    before = _streams.set(True)
    try:
        yield
    finally:
        _streams.reset(before)


@contextmanager
def rounding(enabled: bool = True) -> Iterator[None]:
    """Within this context our kernels multiply prompts by packed weights with the rounded scales of
    decoding and, in their vector form, with 8-bit activations (linear/int8.h)."""
    before = _rounds.set(enabled)
    try:
        yield
    finally:
        _rounds.reset(before)


def _streaming() -> bool:
    return _streams.get() and not torch.is_grad_enabled()


def _of(rows: Rows | None, tensor: Any) -> Any:
    """Some rows of a tensor, if there is one; None for None."""
    return tensor if tensor is None or rows is None else rows.of(tensor)


def _needs_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def prompt_kernel() -> bool:
    """Whether one of our kernels, for any number of rows, multiplies a prompt's rows in bfloat16 by
    packed weights; otherwise torch multiplies by unpacked ones. Within `rounding` our kernel does
    so wherever it runs."""
    return ops.prefill_units() != PrefillUnits.NO_UNITS and (_rounds.get() or bfloat16_is_faster())


class _CastAnew(torch.autograd.Function):
    """A product with weights that do not train and have a smaller type than x. The backward pass
    casts them to x's type again, instead of keeping the cast weights from the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.to(gradients[0].dtype), None, None


class DenseLinear(nn.Module):
    """A linear layer with the weights of the one that it replaces. They are float32; or they are
    bfloat16 and converted for each product, where bfloat16 products are slower or not exact enough
    (as_stored.py)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._fp32_weight: Tensor | None = None

    @contextmanager
    def fp32_weight(self) -> Iterator[None]:
        """Within this context the weights exist in float32, for products computed in chunks."""
        self._fp32_weight = self.weight.float()
        try:
            yield
        finally:
            self._fp32_weight = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return self._multiply(x, self._fp32_weight, self.weight, self.bias)

    def part(self, x: Tensor, rows: Rows) -> Tensor:
        """x [..., in] -> some of the outputs."""
        fp32 = None if self._fp32_weight is None else rows.of(self._fp32_weight)
        bias = None if self.bias is None else rows.of(self.bias)
        return self._multiply(x, fp32, rows.of(self.weight), bias)

    def _multiply(
        self, x: Tensor, fp32: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        if fp32 is not None:
            return product(x, fp32, bias)
        if _needs_gradient(x) and x.dtype != weight.dtype and not weight.requires_grad:
            out: Tensor = _CastAnew.apply(x, weight, bias)  # type: ignore[no-untyped-call]
            return out
        if not _streaming() or x.dtype != weight.dtype:
            return product(x, weight, bias)
        if weight.dtype != torch.float32:
            return F.linear(x, weight, bias)
        flat = x.reshape(-1, self.in_features).contiguous()
        out = ops.dense(weight, flat).view(*x.shape[:-1], len(weight))
        return out if bias is None else out + bias


class PackedLinear(nn.Module):
    """A linear layer of 2, 3, 4, 6 or 8 bits: codes [out, in], scale and offset [out, in / group].

    A weight is scale * value(code) + offset. Its value is the codebook's entry (NF4), or the code
    less `middle`, half of 2**bits. All are stored in tiles of 16 rows: see tiles.py. Scales and
    offsets are bytes times the row's step where they are whole numbers of it (`Lines` of grid.py),
    or else in bfloat16 where that holds them exactly, as it does those of every grid.
    """

    codes: Tensor
    book: Tensor | None
    bias: Tensor | None
    _scale: Tensor
    _offset: Tensor | None
    _exponent: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        book: Tensor | None,
        bias: Tensor | None,
        bits: int = 4,
    ) -> None:
        """Raises ValueError where the inputs of a group are not a multiple of 32, or codes of
        `bits` bits have no kernels."""
        super().__init__()
        self.out_features, self.in_features = codes.shape
        group, left = divmod(self.in_features, scale.shape[1])
        if left or group % BLOCK:
            raise ValueError(
                f"{self.in_features} inputs in {scale.shape[1]} groups cannot be packed: "
                f"a group is a multiple of {BLOCK} inputs"
            )
        if bits not in BITS:
            raise ValueError(f"codes of {bits} bits have no kernels: use 2, 3, 4, 6 or 8 bits")
        self.bits, self.middle = bits, middle(bits)
        self.register_buffer("codes", pack_codes(codes, bits))
        low = None if offset is None else offset.float()
        whole = bits < STEPS_BELOW and book is None
        in_steps = _in_steps(scale.float(), low, bits) if whole else None
        small, low, exponent, self._zero = in_steps or _compact(scale.float(), low, self.middle)
        self.register_buffer("_scale", tiles(small))
        self.register_buffer("_offset", None if low is None else tiles(low))
        rows = None if exponent is None else tiles(exponent.unsqueeze(1))  # [tiles, 1, 16]
        self.register_buffer("_exponent", rows)
        self.register_buffer("book", None if book is None else book.float().contiguous())
        self.register_buffer("bias", None if bias is None else bias.float())
        self._rounded_parts: Parts | None = None

    @classmethod
    def of(cls, grid: Grid, bias: Tensor | None = None) -> PackedLinear:
        """A grid of weights [out, in]. Codes without a kernel get more bits: codes of 5 bits move
        to the middle of 6, and the weights do not change."""
        bits = next(width for width in BITS if width >= grid.bits)
        codes, offset = grid.codes, grid.offset()
        if bits != grid.bits:
            codes = codes + (middle(bits) - grid.middle)
        return cls(codes, grid.scale, offset, None, bias, bits)

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return self.in_features // self._scale.shape[1]

    @property
    def scale(self) -> Tensor:
        """Float32 [tiles, groups, 16]."""
        scale = self._scale.float()
        return scale if self._exponent is None else torch.ldexp(scale, self._exponent)

    @property
    def offset(self) -> Tensor | None:
        """Values of the middle code, or of an entry 0: float32, as `scale`; None for zero."""
        if self._offset is None:
            return None
        low = self._offset.float()
        if self._exponent is not None:
            low = torch.ldexp(-self.middle * low, self._exponent)
        return low if self._zero == self.middle else low + self.middle * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return self.streamed(x) if _streaming() else self._multiply(x, None)

    def part(self, x: Tensor, rows: Rows) -> Tensor:
        """x [..., in] -> some of the outputs."""
        if _streaming():
            return rows.columns(self.streamed(x))
        return self._multiply(x, rows)

    def _multiply(self, x: Tensor, rows: Rows | None) -> Tensor:
        """x [..., in] -> all outputs, or those of some rows, in x's type."""
        if x.dtype != torch.bfloat16 or not prompt_kernel() or _needs_gradient(x):
            fast = x.dtype == torch.bfloat16 and bfloat16_is_faster()
            weight = self.unpacked(x.dtype if fast else torch.float32)
            return product(x, *(_of(rows, part) for part in (weight, self.bias)))
        rounded = _rounds.get()
        parts = self.rounded_parts() if rounded else self.float_parts()  # the matrix points to them
        matrix = self._matrix(parts, rounded)
        if rows is None or not rows.whole(ROWS_PER_TILE):
            out = self._product(x, matrix, self.bias)
            return out if rows is None else rows.columns(out)
        part = matrix.part(rows.first, rows.count, rows.run, rows.stride)
        return self._product(x, part, _of(rows, self.bias))

    def _product(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        """x [..., in] times a matrix: each tile is unpacked once for all rows."""
        matrix.bias = None if bias is None else bias.data_ptr()
        flat = x.reshape(-1, self.in_features).contiguous()
        (out,) = ops.prefill_products(matrix, [matrix.n], flat)
        return out.view(*x.shape[:-1], matrix.n)

    def _matrix(self, parts: Parts, rounded: bool) -> Matrix:
        """The kernels' view of the layer without its bias; it points to the memory of this layer
        and of `parts`."""
        n, k = self.out_features, self.in_features
        *tables, zero = parts
        kind = Kind.packed(self.bits, self.book is not None, rounded)
        places = (None if x is None else x.data_ptr() for x in (self.codes, *tables))
        return Matrix(kind, n, k, self.group, zero, n, n, *places, None)

    def exact_matrix(self) -> tuple[Matrix, Parts]:
        """The weights, not rounded, without a bias; and the tensors to which the matrix points."""
        rounded = self.book is None and self._scale.dtype != torch.float32
        parts = self.rounded_parts() if rounded else self.float_parts()
        return self._matrix(parts, rounded), parts

    def float_parts(self) -> Parts:
        """Parts for kernels with float32 activations."""
        return self.scale, self.offset, None, self.book, self.middle

    def rounded_parts(self) -> Parts:
        """The same for kernels with 8-bit activations.

        Scale and offset are bytes, or bfloat16. The offset is the value of code 0, or of the middle
        code where bfloat16 holds that better: a grid's minima are exact, a GPTQ layer's are not.
        """
        if self._rounded_parts is None:
            self._rounded_parts = self._in_bytes()
        return self._rounded_parts

    def _in_bytes(self) -> Parts:
        low = self._offset
        if self.book is not None:
            largest = self.book.abs().max()
            table = ((self.book / largest * 127).round() + ZERO_POINT).to(torch.uint8)
            return (self.scale * (largest / 127)).bfloat16(), None, None, table, ZERO_POINT
        if self._exponent is not None:
            return self._scale, low, self._exponent, None, self._zero
        if low is None or low.dtype == torch.bfloat16:
            return self._scale.bfloat16(), low, None, None, self._zero
        choices = ((low - self.middle * self.scale, 0), (low, self.middle))
        best, zero = min(
            choices, key=lambda choice: float((choice[0].bfloat16() - choice[0]).abs().sum())
        )
        return self._scale.bfloat16(), best.bfloat16(), None, None, zero

    def streamed(self, x: Tensor) -> Tensor:
        """`forward` by the compiled kernel, which multiplies in float32 and reads codes once."""
        flat = x.reshape(-1, self.in_features).float().contiguous()
        out = ops.packed(*self._parts(), flat)
        out = out.view(*x.shape[:-1], self.out_features)
        return (out if self.bias is None else out + self.bias).to(x.dtype)

    def unpacked(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [out, in] in float32, or rounded to bfloat16."""
        return ops.unpack(*self._parts(), dtype)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, int]:
        return self.codes, self.scale, self.offset, self.book, self.bits, self.out_features


def _in_steps(
    scale: Tensor, offset: Tensor | None, bits: int
) -> tuple[Tensor, Tensor | None, Tensor, int] | None:
    """Scales and minima [n, groups] in bytes, the exponents [n] of rows' steps, and the code whose
    values offsets are; None where they are no whole numbers of steps."""
    minimum = None if offset is None else offset - middle(bits) * scale
    lines = Lines.of(scale, minimum, bits)
    if lines is None:
        return None
    return lines.scale, lines.minimum, lines.exponent, middle(bits) if offset is None else 0


def _compact(
    scale: Tensor, offset: Tensor | None, middle: int
) -> tuple[Tensor, Tensor | None, None, int]:
    """Scales and offsets, no exponents, and the code whose values the offsets are. They are in
    bfloat16 where that holds both exactly. The code is 0 where bfloat16 holds its values, otherwise
    the middle one."""
    small = scale.bfloat16()
    if not torch.equal(small.float(), scale):
        return scale, offset, None, middle
    if offset is None:
        return small, None, None, middle
    for zero in (0, middle):
        shift = (middle - zero) * scale
        low = (offset - shift).bfloat16()
        if torch.equal(low.float() + shift, offset):
            return small, low, None, zero
    return scale, offset, None, middle


def accelerate_linears(model: Any, samples: Samples | None = None) -> dict[str, int]:
    """Replace linear layers in place; returns how many of each kind now run on native kernels.

    `samples`, where given, is filled for `timed_pairs`.
    """
    counts: dict[str, int] = {}
    weight = final_norm(model).weight
    if not has_kernels(weight):
        return counts
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            faster = _faster(child)
            library = not isinstance(child, GridLinear)  # which has no kernels of its own to time
            if samples is not None and library and isinstance(faster, PackedLinear):
                samples.setdefault(_named(child, faster), (faster, child))
            if faster is not None:
                setattr(parent, name, faster)
                kind = type(faster).__name__
                counts[kind] = counts.get(kind, 0) + 1
    return counts


class Multiplies(Protocol):
    """The native engine, which has its own kernel for packed layers."""

    def multiplier(self, layer: PackedLinear) -> Kernel:
        """A call that multiplies rows [rows, in] by the layer."""
        ...


def timed_pairs(
    samples: Samples, engine: Multiplies | None
) -> dict[str, tuple[int, Kernel, Kernel]]:
    """Kernels to time, by layer: inputs, our kernel (the engine's where it will run), the
    library's."""
    return {
        name: (ours.in_features, ours.streamed if engine is None else engine.multiplier(ours), old)
        for name, (ours, old) in samples.items()
    }


def _named(old: nn.Module, ours: PackedLinear) -> str:
    """`Linear4bit 4 bits 576 x 1536`: inputs last, as in a weight."""
    return f"{type(old).__name__} {ours.bits} bits {ours.out_features} x {ours.in_features}"


def has_kernels(weight: Tensor) -> bool:
    """Whether weights of this type and device have kernels of ours."""
    supported = weight.dtype in (torch.float32, torch.bfloat16)
    return supported and weight.device.type == "cpu" and build.library() is not None


def _faster(module: nn.Module) -> nn.Module | None:
    kind = type(module)
    if kind is nn.Linear and (module.weight.dtype == torch.float32 or not bfloat16_is_faster()):
        return DenseLinear(module)  # type: ignore[arg-type]
    if isinstance(module, GridLinear):
        return None if module.group % BLOCK else PackedLinear.of(module.grid(), module.bias)
    if kind.__name__ == "Linear4bit":
        return _from_bitsandbytes(module)
    if kind.__name__ == "Linear8bitLt":
        return _from_int8(module)
    if hasattr(module, "qweight") and hasattr(module, "g_idx"):
        return _from_gptq(module)
    return None


def _from_bitsandbytes(module: Any) -> PackedLinear | None:
    """NF4 or FP4 weights: two codes a byte, high nibble first, blocks along a row."""
    state = module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        return None  # it has run before: its codes are in the order of bitsandbytes' own kernel
    return _from_blocks(module.weight.data, state, module.bias)


def _from_blocks(data: Tensor, state: Any, bias: Tensor | None) -> PackedLinear | None:
    """A layer from bitsandbytes' codes and quantization state; None for blocks of other sizes."""
    rows, k = state.shape
    if k % state.blocksize or state.blocksize % BLOCK:
        return None
    absmax = state.absmax
    if state.nested:
        absmax = bitsandbytes_functions().dequantize_blockwise(absmax, state.state2) + state.offset
    data = data.view(-1)
    codes = torch.stack((data >> 4, data & 15), dim=1).view(rows, k)
    scale = absmax.float().view(rows, k // state.blocksize)
    return PackedLinear(codes, scale, None, state.code, bias)


def bitsandbytes_functions() -> Any:
    """The library's functions. An import statement would make an exported folder require the
    library."""
    need("packing weights as NF4", "bitsandbytes")
    return importlib.import_module("bitsandbytes.functional")  # noqa: TID251


def quantize_nf4(weight: Tensor, bias: Tensor | None) -> PackedLinear | None:
    """Weights [n, k] in bitsandbytes' NF4; None where k is not a multiple of its block."""
    if weight.shape[1] % NF4_BLOCK:
        return None
    codes, state = bitsandbytes_functions().quantize_4bit(
        weight.detach(), blocksize=NF4_BLOCK, quant_type="nf4"
    )
    return _from_blocks(codes, state, bias)


def gptq_weight(layer: Any) -> Tensor:
    """The weights [in, out] of gptqmodel's layer, by the method of its class.

    The method of some instances comes from torch.compile, which would call a C++ compiler for one
    use.
    """
    weight: Tensor = type(layer).dequantize_weight(layer)
    return weight


def int8_parts(module: Any) -> tuple[Tensor, Tensor]:
    """Codes [n, k], -127 to 127, and scales [n, 1] of bitsandbytes' LLM.int8 layer."""
    codes, scale = module.weight.CB, module.weight.SCB
    if codes is None:  # it has run before
        codes, scale = module.state.CB, module.state.SCB
    return (module.weight.data if codes is None else codes), scale.float().view(-1, 1) / 127


def _from_int8(module: Any) -> PackedLinear | None:
    """A scale for each row. Outliers need no search: each block of 32 activations has its own
    scale."""
    if module.in_features % BLOCK:
        return None
    codes, scale = int8_parts(module)
    return PackedLinear(codes.int() + 128, scale, None, None, module.bias, 8)


def _from_gptq(module: Any) -> PackedLinear | None:
    """GPTQ weights in group order: a column's codes are a stream of bits, lowest first, in integers
    of 32 bits. Layers in gptqmodel's other layout, planes of bits, run in torch."""
    bits, group = module.bits, module.group_size
    if bits not in BITS or group <= 0 or group % BLOCK or getattr(module, "planar", False):
        return None
    k = module.in_features
    groups = torch.arange(k) // group
    if not torch.equal(module.g_idx[:k].long().cpu(), groups):
        return None  # act-order: groups are scattered over the row
    streams = module.qweight.T.contiguous().view(torch.uint8)  # [n, bytes]
    codes = unpack_bits(streams, bits).T[:k]  # [k, n]
    scale = module.scales.float()  # [groups, n]
    # Two stored formats of zero points differ by one, and a module does not say which it holds by
    # now: its own dequantized weights tell, at the first row of each group.
    first = torch.arange(0, k, group)
    weights = gptq_weight(module).float()[first]  # [groups, n]
    steps = torch.where(scale == 0, torch.ones_like(scale), scale)  # auto-round has negative ones
    zeros = (codes[first] - weights / steps).round()
    offset = (2 ** (bits - 1) - zeros) * scale
    return PackedLinear(
        codes.T,
        scale.T,
        offset.T if offset.any() else None,
        None,
        module.bias,
        bits,
    )
