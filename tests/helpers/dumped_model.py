"""A model's native structures in a file, for a program without Python: kernels/arm/decode.cpp."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import Any, BinaryIO

from gateskip.kernels import abi
from gateskip.kernels.abi import ROWS_PER_TILE, Kind

NORMS = ("norm_attention", "norm_mlp", "after_attention", "after_mlp", "norm_q", "norm_k")


def dump(backend: Any, capacity: int, file: Path) -> None:
    """Write the model of a backend `native`, without gates, and the tables of `capacity` positions.

    Its matrices must be whole.
    """
    engine, cache = backend.engine, backend.new_cache(1, capacity)
    view, model = engine._view(cache), engine.model
    with file.open("wb") as out:
        sizes = ("layers", "hidden", "heads", "kv_heads", "head_dim", "inner", "anchors")
        _ints(out, model, sizes)
        _norm(out, model.norm_final)
        for layer in model.layer[: model.layers]:
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                _matrix(out, getattr(layer, name))
            for name in NORMS:
                _norm(out, getattr(layer, name))
            out.write(struct.pack("ff", layer.scaling, layer.softcap))
            _ints(out, layer, ("window", "rope", "rotary_dim", "activation", "parallel"))
        _matrix(out, engine.parts.embedding.table)
        out.write(struct.pack("if", engine.parts.embedding.bf16, engine.parts.embedding.scale))
        _matrix(out, engine.head)
        _ints(out, view, ("capacity", "bf16"))
        widths = list(engine.parts.rotary_dims.values())
        out.write(struct.pack("i", len(widths)))
        for i, width in enumerate(widths):
            for tables in (view.cos, view.sin):
                table = ctypes.cast(tables, ctypes.POINTER(ctypes.c_void_p))[i]
                _array(out, table, 4 * view.capacity * width)


def _ints(out: BinaryIO, structure: Any, names: tuple[str, ...]) -> None:
    out.write(struct.pack(f"{len(names)}i", *(getattr(structure, name) for name in names)))


def _array(out: BinaryIO, address: int | None, size: int) -> None:
    """The bytes at an address, with their number before them; none without an address."""
    content = ctypes.string_at(address, size) if address else b""
    out.write(struct.pack("q", len(content)) + content)


def _norm(out: BinaryIO, norm: abi.Norm) -> None:
    for address in (norm.weight, norm.bias):
        _array(out, address, 4 * norm.width)
    _ints(out, norm, ("kind", "width"))
    out.write(struct.pack("f", norm.epsilon))


def _matrix(out: BinaryIO, w: abi.Matrix) -> None:
    assert w.run == w.n, "a part of a fused weight"
    kind = Kind(w.kind)
    _ints(out, w, ("kind", "n", "k", "group", "zero", "run", "stride"))
    if kind in (Kind.FP32, Kind.BF16):
        _array(out, w.weights, w.n * w.k * (4 if kind == Kind.FP32 else 2))
        scales = 0
    else:
        tiles = -(-w.n // ROWS_PER_TILE)
        _array(out, w.weights, tiles * ROWS_PER_TILE * w.k * kind.bits // 8)
        scales = tiles * ROWS_PER_TILE * (w.k // w.group) * (2 if kind.rounded else 4)
    for address in (w.scale, w.offset):
        _array(out, address, scales)
    _array(out, w.table, 16 if kind.rounded else 64)
    _array(out, w.bias, 4 * w.n)
