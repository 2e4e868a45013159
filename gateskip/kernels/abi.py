"""The structures that cross into the compiled kernels, compared with src/api.h and with a library.

The boundary is plain C behind ctypes. torch.utils.cpp_extension and nanobind with torch.library
operators were weighed against it: an extension is compiled against torch's headers (18 s for one
empty function where all kernels here take 13 s), has to be compiled anew for every version of torch
and Python, and needs the headers of both; importing cpp_extension alone takes as long as importing
torch. A dispatcher brings autograd and meta tensors, of which decoding needs neither, and costs
microseconds a call. What ctypes lacks is a check of types, and that is this module: the header is
the one declaration, `read_header` reads it, `check` refuses by name structures or a library that
differ from it, and argument types of every function are set from its prototype.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

HEADER = Path(__file__).parent / "src" / "api.h"
ROWS_PER_TILE, BLOCK = 16, 32  # rows and columns of packed weights that lie together, as in simd.h
Pointer, Int, Float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
PARTS = ("linear", "attention", "gates", "lm head")
"""What a decoder's time is spent on, in the order of the header's enum `Part`."""


class AbiMismatch(RuntimeError):
    """A library, or a structure here, differs from the header; the message names what does."""


class Kind(IntEnum):
    """How a matrix is stored: MatrixKind of the header, which says what each stands for."""

    FP32 = 0
    BF16 = 1
    INT2 = 2
    INT3 = 3
    INT4 = 4
    INT4_TABLE = 5
    INT6 = 6
    INT8 = 7
    INT2_A8 = 8
    INT3_A8 = 9
    INT4_A8 = 10
    INT4_TABLE_A8 = 11
    INT6_A8 = 12
    INT8_A8 = 13

    @classmethod
    def packed(cls, bits: int, table: bool, rounded: bool) -> Kind:
        """That of codes of some bits, which may look values up in a table, with activations that
        may be rounded to 8 bits."""
        return cls[f"INT{bits}{'_TABLE' * table}{'_A8' * rounded}"]

    @property
    def rounded(self) -> bool:
        """Whether activations are rounded to 8 bits."""
        return self.name.endswith("_A8")

    @property
    def bits(self) -> int:
        """Of a code."""
        return int(self.name[3])


class Activation(IntEnum):
    """What an MLP does to its gate, or to its only projection."""

    SILU = 0
    GELU_TANH = 1
    GELU = 2


class NormKind(IntEnum):
    """How rows are normed."""

    RMS_NORM = 0
    RMS_NORM_FP32 = 1
    LAYER_NORM = 2


class Entering(IntEnum):
    """Whether a token of a prompt enters a branch."""

    PADDING = 0
    BY_GATE = 1
    ALWAYS = 2


class PromptUnits(IntEnum):
    """What multiplies a prompt's rows."""

    NO_UNITS = 0
    VECTORS = 1
    TILE_UNITS = 2


ENUMS: dict[str, type[IntEnum]] = {
    "MatrixKind": Kind,
    "Activation": Activation,
    "NormKind": NormKind,
    "Entering": Entering,
    "PromptUnits": PromptUnits,
}


class Matrix(ctypes.Structure):
    """A weight [n, k] and its bias, dense or packed."""

    _fields_ = (
        *((name, Int) for name in ("kind", "n", "k", "group", "zero", "run", "stride")),
        *((name, Pointer) for name in ("weights", "scale", "offset", "table", "bias")),
    )

    def part(self, first: int, count: int, run: int, stride: int) -> Matrix:
        """Rows of a packed weight in runs of `run`, which begin `stride` apart from row `first`:
        whole tiles. Its bias is left out."""
        kind = Kind(self.kind)
        part = Matrix.from_buffer_copy(self)
        groups = self.k // self.group * ROWS_PER_TILE  # scales of a tile
        sizes = (2 * self.k * kind.bits, *[groups * (2 if kind.rounded else 4)] * 2)
        for name, size in zip(("weights", "scale", "offset"), sizes, strict=True):
            whole = getattr(self, name)
            if whole is not None:
                setattr(part, name, whole + first // ROWS_PER_TILE * size)
        part.n, part.run, part.stride, part.bias = count, run, stride, None
        return part


class Norm(ctypes.Structure):
    """A norm of rows [width]; without a weight nothing is normed."""

    _fields_ = (
        *((name, Pointer) for name in ("weight", "bias")),
        *((name, Int) for name in ("kind", "width")),
        ("epsilon", Float),
    )


class Shortcut(ctypes.Structure):
    """What a row gets that skips a branch."""

    _fields_ = (*((name, Pointer) for name in ("down", "up", "bias")), ("rank", Int))


class Layer(ctypes.Structure):
    """A decoder layer: its matrices, norms, gates and shortcuts."""

    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, Norm) for name in ("norm_attention", "norm_mlp")),
        *((name, Norm) for name in ("after_attention", "after_mlp", "norm_q", "norm_k")),
        *((name, Pointer) for name in ("weight_attention", "weight_mlp")),
        *((name, Shortcut) for name in ("short_attention", "short_mlp")),
        *((name, Float) for name in ("bias_attention", "bias_mlp", "scaling", "softcap")),
        *((name, Int) for name in ("window", "rope", "rotary_dim", "activation", "parallel")),
    )


class Model(ctypes.Structure):
    """A decoder: its sizes, final norm and layers."""

    _fields_ = (
        *((name, Int) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim")),
        *((name, Int) for name in ("inner", "anchors", "widest_shortcut")),
        ("norm_final", Norm),
        ("layer", ctypes.POINTER(Layer)),
    )


class CacheView(ctypes.Structure):
    """Where a KV cache and its rope tables are."""

    _fields_ = (
        *((name, Pointer) for name in ("keys", "values", "cos", "sin")),
        *((name, Pointer) for name in ("key_scales", "value_scales", "slots")),
        *((name, Int) for name in ("capacity", "bf16")),
    )


class Step(ctypes.Structure):
    """Tokens of one forward pass, each a row with its own place in the cache."""

    _fields_ = (
        *((name, Int) for name in ("rows", "copies")),
        *((name, Pointer) for name in ("cache_row", "slot", "hidden", "thresholds", "kept")),
        *((name, Pointer) for name in ("spent", "entered")),
        ("stride", Int),
    )


class Sampling(ctypes.Structure):
    """How a token is drawn from logits."""

    _fields_ = (
        ("temperature", Float),
        ("top_k", Int),
        *((name, Float) for name in ("top_p", "min_p")),
    )


OnToken = ctypes.CFUNCTYPE(Int, Int)
Propose = ctypes.CFUNCTYPE(Int, ctypes.POINTER(Int), Int)


class Embedding(ctypes.Structure):
    """What tokens are at the input."""

    _fields_ = (("table", Matrix), ("bf16", Int), ("scale", Float))


class DraftNetwork(ctypes.Structure):
    """A small network that drafts."""

    _fields_ = (
        *((name, Norm) for name in ("norm_state", "norm_token", "norm_mlp", "norm_final")),
        *((name, Matrix) for name in ("fuse", "gate", "up", "down")),
    )


class Draft(ctypes.Structure):
    """Tokens of one row, one after the other."""

    _fields_ = (
        *((name, Int) for name in ("token", "count")),
        ("least", Float),
        ("accepted", Pointer),
        ("levels", Int),
        ("embedding", Embedding),
        ("cap", Float),
        ("draft_head", ctypes.POINTER(Matrix)),
        ("head_tokens", Pointer),
        ("rerank_head", ctypes.POINTER(Matrix)),
        *((name, Pointer) for name in ("tokens", "chances")),
        ("on_token", OnToken),
        ("ended", Int),
        ("sampling", ctypes.POINTER(Sampling)),
        *((name, Pointer) for name in ("uniform", "distributions")),
    )


class Round(ctypes.Structure):
    """A draft of one row, and what became of it."""

    _fields_ = (
        *((name, Int) for name in ("drafted", "accepted", "looked_up")),
        *((name, Float) for name in ("draft_s", "verify_s")),
    )


class Speculation(ctypes.Structure):
    """Rounds of speculation of one row."""

    _fields_ = (
        *((name, Int) for name in ("token", "left", "rounds", "drafts", "length", "longest")),
        ("embedding", Embedding),
        ("drafter", ctypes.POINTER(Model)),
        ("drafting", ctypes.POINTER(Step)),
        ("network", ctypes.POINTER(DraftNetwork)),
        ("draft", ctypes.POINTER(Draft)),
        ("state", Pointer),
        ("propose", Propose),
        ("on_token", OnToken),
        *((name, Pointer) for name in ("logits", "shares", "uniform")),
        ("round", ctypes.POINTER(Round)),
        ("chances", Pointer),
    )


class PromptRows(ctypes.Structure):
    """Where a prompt's tokens stand."""

    _fields_ = (
        *((name, Int) for name in ("batch", "count", "first", "capacity")),
        *((name, Pointer) for name in ("slots", "cos", "sin", "keys", "values")),
    )


class Entry(ctypes.Structure):
    """Which tokens of a prompt enter a branch, and what those get that skip it."""

    _fields_ = (
        ("tokens", Pointer),
        ("least", Float),
        ("rank", Int),
        *((name, Pointer) for name in ("down", "up", "bias")),
    )


class GroupSteps(ctypes.Structure):
    """What one group of columns of a weight can be."""

    _fields_ = (
        *((name, Pointer) for name in ("scale", "inverse", "lowest")),
        *((name, Int) for name in ("n", "group", "least", "most", "threads")),
    )


STRUCTURES: dict[str, type[ctypes.Structure]] = {
    each.__name__: each
    for each in (
        *(Matrix, Norm, Shortcut, Layer, Model, CacheView),
        *(Step, Sampling, Embedding, DraftNetwork, Draft, Round, Speculation, PromptRows, Entry),
        GroupSteps,
    )
}
_SCALARS: dict[str, Any] = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "void": None,
}


@dataclass(frozen=True)
class Function:
    """A prototype of the header as ctypes types."""

    result: Any
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Header:
    """What src/api.h declares."""

    version: int
    structures: dict[str, list[tuple[str, str]]]
    """Name and C type of each field, by structure."""
    functions: dict[str, Function]
    enums: dict[str, dict[str, int]]
    """Entries of those that `ENUMS` has here, by name."""


def read_header(path: Path = HEADER) -> Header:
    """Parse src/api.h. Raises OSError where it is missing, AbiMismatch for what cannot be read."""
    text = re.sub(r"/\*.*?\*/", " ", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    version = re.search(r"#define GATESKIP_ABI_VERSION (\d+)", text)
    enums = dict(re.findall(r"enum (\w+) \{(.*?)\}", text, re.DOTALL))
    missing = sorted(ENUMS.keys() - enums.keys())
    if version is None or missing:
        lacks = f"enum {missing[0]}" if missing else "GATESKIP_ABI_VERSION"
        raise AbiMismatch(f"{path.name} has no {lacks}")
    bodies = re.findall(r"typedef struct (\w+) \{(.*?)\} \w+;", text, re.DOTALL)
    prototypes = re.findall(r"^([\w *]+?)\b(gateskip_\w+)\(([^)]*)\);", text, re.MULTILINE)
    return Header(
        int(version[1]),
        {name: _fields(body) for name, body in bodies},
        {name: Function(_type(out), _arguments(given)) for out, name, given in prototypes},
        {name: _entries(enums[name]) for name in ENUMS},
    )


def _entries(body: str) -> dict[str, int]:
    """`FP32 = 0, BF16 = 1,` -> name and value of each."""
    return {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", body)}


def _fields(body: str) -> list[tuple[str, str]]:
    """`int32_t n; const void* weights;` -> name and type of each."""
    declared = [" ".join(part.split()) for part in body.split(";") if part.strip()]
    pairs = [re.fullmatch(r"(.*?)(\w+)", each) for each in declared]
    return [(pair[2], pair[1].strip()) for pair in pairs if pair is not None]


def _arguments(given: str) -> tuple[Any, ...]:
    return (
        ()
        if given.strip() == "void"
        else tuple(_type(kind) for _, kind in _fields(given.replace(",", ";")))
    )


def _type(declared: str) -> Any:
    """The ctypes type of a C type."""
    name = declared.replace("const", "").strip()
    if not name.endswith("*"):
        if name not in _SCALARS:
            raise AbiMismatch(f"{HEADER.name}: type {declared!r} has no counterpart in Python")
        return _SCALARS[name]
    pointed = name[:-1].strip()
    if pointed == "char":
        return ctypes.c_char_p
    return ctypes.POINTER(STRUCTURES[pointed]) if pointed in STRUCTURES else ctypes.c_void_p


def check(library: Any, header: Header) -> None:
    """Raise AbiMismatch where structures here, or the library, differ from the header."""
    for name, fields in header.structures.items():
        _check_fields(name, fields)
    if set(header.structures) != set(STRUCTURES):
        odd = sorted(set(header.structures) ^ set(STRUCTURES))
        raise AbiMismatch(f"structures of {HEADER.name} and abi.py differ: {', '.join(odd)}")
    for name, entries in header.enums.items():
        if entries != {entry.name: entry.value for entry in ENUMS[name]}:
            raise AbiMismatch(f"enum {name} of {HEADER.name} is not {ENUMS[name].__name__}")
    built = library.gateskip_abi_version()
    if built != header.version:
        raise AbiMismatch(f"the library has ABI version {built}, {HEADER.name} {header.version}")
    for name, structure in STRUCTURES.items():
        there, here = library.gateskip_struct_size(name.encode()), ctypes.sizeof(structure)
        if there != here:
            raise AbiMismatch(f"structure {name} has {there} bytes in the library, {here} here")


def _check_fields(name: str, fields: list[tuple[str, str]]) -> None:
    if name not in STRUCTURES:
        return
    own = [(field[0], _written(field[1])) for field in STRUCTURES[name]._fields_]
    declared = [(field, "pointer" if "*" in kind else kind) for field, kind in fields]
    for mine, theirs in zip(own, declared, strict=False):
        if mine != theirs:
            raise AbiMismatch(
                f"structure {name}: {theirs[1]} {theirs[0]} in {HEADER.name}, "
                f"{mine[1]} {mine[0]} in abi.py"
            )
    if len(own) != len(declared):
        raise AbiMismatch(
            f"structure {name} has {len(declared)} fields in {HEADER.name}, {len(own)} in abi.py"
        )


def _written(kind: Any) -> str:
    """A field's ctypes type as the header writes it; `pointer` for all pointers."""
    if kind is Int:
        return "int32_t"
    if kind is Float:
        return "float"
    return str(kind.__name__) if kind in STRUCTURES.values() else "pointer"


def declare(library: Any, header: Header) -> None:
    """Set argument and result types of every function that the library has."""
    for name, function in header.functions.items():
        if hasattr(library, name):
            call = getattr(library, name)
            call.argtypes, call.restype = function.arguments, function.result
