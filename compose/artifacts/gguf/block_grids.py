"""A GGUF file's blocks as the grids of a model folder.

    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0   the file's codes, and its float16 scales and minima
    Q4_K, Q5_K                     the file's codes; scales and minima, which are products of two
                                   numbers, are rounded to numbers that bfloat16 holds
    all others                     8 bits with a scale for 32 weights: no grid here has groups of
                                   16 (Q6_K, Q3_K, Q2_K) or tables of values (IQ4_NL)

Of the first row, weights equal the file's, bit by bit, wherever torch or a kernel multiplies in
float32. Native products of 8-bit activations round these scales and minima to bfloat16: KL 0.0007
on SmolLM2's Q4_1 file, a fifth of the cost of rounding the activations. The embedding and the LM
head have no minima here: they are dequantized from Q4_1 and Q5_1, and take 8 bits from Q4_K and
Q5_K.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compose.artifacts.folder import GRID_METHOD
from compose.artifacts.gguf.file import GgufFile, GgufTensor

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 32
FLOATS = ("F32", "F16", "BF16")
EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
ROUNDED = ("Q4_K", "Q5_K")
WITH_MINIMUM = ("Q4_1", "Q5_1", *ROUNDED)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CHUNK = 4096  # rows that are read at a time
FLOAT16_BITS = 11  # of a number's significand
SAMPLE = 64  # rows of a chunk whose errors are measured

Tensors = list[tuple[str, GgufTensor]]
"""Each weight's name in transformers -> the file's tensor."""


@dataclass(frozen=True)
class Held:
    """How a weight in blocks is held as a grid."""

    kind: str
    """Its storage type in the file."""
    bits: int
    minimum: bool

    @property
    def keeps_codes(self) -> bool:
        """Whether the grid's codes are the file's."""
        return self.is_exact or self.minimum

    @property
    def is_exact(self) -> bool:
        """Whether the grid's weights are the file's."""
        return self.kind in EXACT

    @property
    def offset(self) -> str:
        """As config.json names it."""
        return "real" if self.minimum else "none"


@dataclass
class Errors:
    """Squared differences between weights of the grids and of the file, on sampled rows."""

    held: set[Held] = field(default_factory=set)
    sums: dict[Held, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    """Of the differences, and of the file's weights."""

    def add(self, held: Held, given: Tensor, stored: Tensor) -> None:
        """Count some rows [n, k] of a grid, and the same rows of the file."""
        sums = self.sums[held]
        sums[0] += float((given - stored).square().sum())
        sums[1] += float(stored.square().sum())

    def text(self) -> str:
        """For users: the types that are used as they are, and the errors of the others, which are
        root mean squares relative to the weights'."""
        kept = sorted({held.kind for held in self.held if held.is_exact})
        parts = [f"{', '.join(kept)} as in the file"] if kept else []
        for held, (difference, size) in sorted(self.sums.items(), key=lambda row: str(row[0])):
            how = "with scales in bfloat16" if held.keeps_codes else "in 8 bits"
            error = (difference / size) ** 0.5 if size else 0.0
            parts.append(f"{held.kind} {how} (error {error:.2%})")
        return "; ".join(parts)


def has_blocks(file: GgufFile) -> bool:
    """Whether any layer of a file is quantized."""
    return any(kind not in FLOATS for kind in _kinds(file))


def require_blocks_in(file: GgufFile) -> None:
    """Refuse a file whose layers have no blocks that can be kept.

    Raises:
        ArtifactError: with the types in which they are stored.
    """
    if not has_blocks(file):
        stored = ", ".join(kind for kind, _ in _kinds(file).most_common())
        file.refuse(
            f"its layers are stored as {stored}, so it has no blocks to keep",
            "leave keep_blocks out",
        )


def _kinds(file: GgufFile) -> Counter[str]:
    """Storage types of the matrices in a file's layers."""
    return Counter(
        tensor.storage.name
        for name, tensor in file.tensors.items()
        if name.startswith("blk.") and len(tensor.shape) == 2
    )


def block_weights(tensors: Tensors) -> dict[str, Held]:
    """Name -> how it is held, of the weights that are held as grids."""
    grids = {
        name: _held(tensor.storage.name, inside=_inside(name))
        for name, tensor in tensors
        if (_inside(name) and len(tensor.shape) == 2) or name in (EMBEDDING, HEAD)
        if tensor.storage.name not in FLOATS and tensor.shape[-1] % GROUP == 0
    }
    return {name: held for name, held in grids.items() if held is not None}


def _held(kind: str, *, inside: bool) -> Held | None:
    """How a weight inside of layers is held, or a table outside, which has no minima; None where
    it is dequantized."""
    minimum = kind in WITH_MINIMUM
    if kind in EXACT + ROUNDED and (inside or not minimum):
        return Held(kind, int(kind[1]), minimum)
    return None if kind in EXACT else Held(kind, 8, minimum=False)


def quantization(tensors: Tensors, grids: Mapping[str, Held]) -> dict[str, Any]:
    """config.json's `quantization_config`: the bits of most layers, and the layers that differ."""
    layers = {name.removesuffix(".weight"): held for name, held in grids.items() if _inside(name)}
    usual, _ = Counter((held.bits, held.offset) for held in layers.values()).most_common(1)[0]
    linears = [name for name, tensor in tensors if _inside(name) and len(tensor.shape) == 2]
    linears += [name for name, _ in tensors if name == HEAD]
    outer = {
        key: {"bits": grids[name].bits, "group_size": GROUP} if name in grids else None
        for key, name in (("embedding", EMBEDDING), ("head", HEAD))
    }
    return {
        "quant_method": GRID_METHOD,
        "bits": usual[0],
        "group_size": GROUP,
        "offset": usual[1],
        "scales": "float16",
        "layers": {
            name: {"bits": held.bits, "group_size": GROUP, "offset": held.offset}
            for name, held in layers.items()
            if (held.bits, held.offset) != usual
        },
        "unpacked": [name.removesuffix(".weight") for name in linears if name not in grids],
        **outer,
    }


def grid_tensors(
    name: str, stored: Any, type_number: int, held: Held, errors: Errors
) -> Iterator[tuple[str, Tensor]]:
    """A weight's tensors in the folder, from its rows of blocks uint8 [n, bytes]."""
    import torch

    from gateskip.quantization.grid import pack_bits

    errors.held.add(held)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for first in range(0, len(stored), CHUNK):
        grid = _grid(stored[first : first + CHUNK], type_number, held)
        if not held.is_exact:
            values = _values(stored[first : first + SAMPLE], type_number)
            errors.add(held, grid.rows(slice(SAMPLE)).weight(), values)
        parts["codes"].append(pack_bits(grid.codes, grid.bits))
        parts["scale"].append(grid.scale.half())
        if grid.minimum is not None:
            parts["minimum"].append(grid.minimum.half())
    module = name.removesuffix("weight")
    for part, rows in parts.items():
        yield f"{module}{part}", torch.cat(rows)


def _grid(stored: Any, type_number: int, held: Held) -> Any:
    """Some rows of blocks as a grid, whose scales and minima float16 holds."""
    import torch

    from compose.artifacts.gguf.blocks import read_blocks
    from gateskip.quantization.grid import Grid

    if not held.keeps_codes:
        return _in_bytes(_values(stored, type_number))
    blocks = read_blocks(stored, held.kind)
    codes, scale = torch.from_numpy(blocks.codes), torch.from_numpy(blocks.scale).float()
    minimum = None if blocks.minimum is None else torch.from_numpy(blocks.minimum).float()
    if held.kind in ROUNDED:
        assert minimum is not None, "these blocks have minima"
        scale, minimum = _rounded(codes, scale, minimum, held.bits)
    return Grid(codes, scale, minimum, held.bits)


def _rounded(codes: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales that bfloat16 holds, and minima that float16 holds, with middle codes' values that
    bfloat16 holds: those are small, so little is lost. Each group keeps its mean."""
    import torch

    from gateskip.quantization.grid import SMALLEST, exact_scale, middle

    near, half = exact_scale(scale), middle(bits)
    size = 1.01 * torch.maximum(minimum.abs(), half * near)  # minima may grow by so much
    exponent = torch.frexp(size).exponent
    step = torch.ldexp(torch.ones_like(scale), exponent - FLOAT16_BITS).clamp_min(SMALLEST)
    # Coarser than bfloat16 only in groups whose weights are all far below zero
    unit = (step / half).clamp_min(SMALLEST)
    near = (near / unit).round() * unit
    mean = codes.float().unflatten(1, (-1, GROUP)).mean(2)
    value = minimum + half * scale + (scale - near) * (mean - half)  # of the middle code
    return near, (exact_scale(value) / step).round() * step - half * near


def _in_bytes(values: Tensor) -> Any:
    """Weights [n, k] on a symmetric grid of 8 bits."""
    import torch

    from gateskip.quantization.grid import Grid, exact_scale, middle

    groups = values.unflatten(1, (-1, GROUP))
    scale = exact_scale(groups.abs().amax(2) / 127)
    steps = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = (groups / steps.unsqueeze(2)).round().clamp(-127, 127) + middle(8)
    return Grid(codes.to(torch.uint8).flatten(1), scale, None, 8)


def _values(stored: Any, type_number: int) -> Tensor:
    """Rows of blocks in float32 [n, k]."""
    import torch
    from gguf import GGMLQuantizationType, dequantize

    return torch.from_numpy(dequantize(stored, GGMLQuantizationType(type_number)))


def _inside(name: str) -> bool:
    """Whether this is a weight of a decoder layer."""
    return name.startswith("model.layers.")
