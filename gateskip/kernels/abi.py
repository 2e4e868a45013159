"""The boundary to the compiled kernels: the declarations of src/api.h, as ctypes.

The header is the only declaration. Structures here take their fields from it, functions their
argument types; `check` refuses by name a library that was built from another header. It is plain C
behind ctypes. Two alternatives were weighed: torch.utils.cpp_extension, and nanobind with
torch.library operators. An extension is compiled against torch's headers (18 s for one empty
function, where all kernels here take 13 s), has to be compiled again for every version of torch and
Python, and needs the headers of both; importing cpp_extension alone takes as long as importing
torch. A dispatcher adds autograd and meta tensors, which decoding does not need, and costs
microseconds a call. cffi's ABI mode was measured, too: docs/experiments.md.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

HEADER = Path(__file__).parent / "src" / "api.h"
SIZES = {"MAX_ROWS": 64, "ROWS_PER_TILE": 16, "BLOCK": 32, "SLOTS_PER_PACK": 32}
"""Sizes that both sides know, by their name in the header, which explains them."""
MAX_ROWS, ROWS_PER_TILE, BLOCK, SLOTS_PER_PACK = SIZES.values()
Pointer, Int, Float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
PARTS = ("linear", "attention", "gates", "lm head")
"""Parts of a decoder's time, in the order of the header's enum `Part`."""


class AbiMismatch(RuntimeError):
    """A library, or a number here, differs from the header; the message names the difference."""


class Kind(IntEnum):
    """Storage kinds of a matrix: MatrixKind of the header, which explains each."""

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
        """The kind of codes with that many bits. They may look values up in a table, and
        activations may be rounded to 8 bits."""
        return cls[f"INT{bits}{'_TABLE' * table}{'_A8' * rounded}"]

    @property
    def rounded(self) -> bool:
        """Whether activations are rounded to 8 bits."""
        return self.name.endswith("_A8")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return int(self.name[3])


class Activation(IntEnum):
    """The function that an MLP applies to its gate, or to its only projection."""

    SILU = 0
    GELU_TANH = 1
    GELU = 2


class NormKind(IntEnum):
    """Kinds of norms."""

    RMS_NORM = 0
    RMS_NORM_FP32 = 1
    LAYER_NORM = 2


class Entering(IntEnum):
    """Whether a token of a prompt enters a branch."""

    PADDING = 0
    BY_GATE = 1
    ALWAYS = 2


class GroupOffset(IntEnum):
    """What a group of weights has beside its scale."""

    OFFSET_REAL = 0
    OFFSET_INTEGER = 1
    OFFSET_NONE = 2


class PrefillUnits(IntEnum):
    """The units that multiply the rows of a prefill."""

    NO_UNITS = 0
    VECTORS = 1
    TILE_UNITS = 2


ENUMS: dict[str, type[IntEnum]] = {
    "MatrixKind": Kind,
    "Activation": Activation,
    "NormKind": NormKind,
    "Entering": Entering,
    "GroupOffset": GroupOffset,
    "PrefillUnits": PrefillUnits,
}


STRUCTURES: dict[str, type[Structure]] = {}


class Structure(ctypes.Structure):
    """A structure of the header with its fields; other names are refused. `held` keeps objects that
    it points to alive."""

    __slots__ = ("held",)

    def __init_subclass__(cls) -> None:
        STRUCTURES[cls.__name__] = cls


class Matrix(Structure):
    """A weight [n, k] and its bias, dense or packed."""

    __slots__ = ()

    def part(self, first: int, count: int, run: int, stride: int) -> Matrix:
        """Rows of a packed weight in runs of `run`, which begin `stride` apart from row `first`:
        whole tiles, without the bias."""
        kind = Kind(self.kind)
        part = Matrix.from_buffer_copy(self)
        groups = self.k // self.group * ROWS_PER_TILE  # scales of a tile
        line = groups * (1 if self.exponent else 2 if kind.rounded else 4)
        sizes = {"weights": 2 * self.k * kind.bits, "scale": line, "offset": line}
        for name, size in {**sizes, "exponent": ROWS_PER_TILE}.items():
            whole = getattr(self, name)
            if whole is not None:
                setattr(part, name, whole + first // ROWS_PER_TILE * size)
        part.n, part.run, part.stride, part.bias = count, run, stride, None
        return part


class Norm(Structure):
    """A norm of rows [width]; without a weight nothing is normed."""

    __slots__ = ()


class Shortcut(Structure):
    """The shortcut of a branch, for rows that skip it."""

    __slots__ = ()


class Layer(Structure):
    """A decoder layer: its matrices, norms, gates and shortcuts."""

    __slots__ = ()


class Model(Structure):
    """A decoder: its sizes, final norm and layers."""

    __slots__ = ()


class CacheView(Structure):
    """The place of a KV cache and its rope tables."""

    __slots__ = ()


class Step(Structure):
    """Tokens of one forward pass, each a row with its place in the cache."""

    __slots__ = ()


class Sampling(Structure):
    """How a token is drawn from logits."""

    __slots__ = ()


class Embedding(Structure):
    """The embedding of tokens."""

    __slots__ = ()


class DraftNetwork(Structure):
    """A small network that drafts."""

    __slots__ = ()


class Draft(Structure):
    """The settings of a draft, beyond the tokens of a row."""

    __slots__ = ()


class DecodeRequest(Structure):
    """Tokens of one row that are decoded one after the other."""

    __slots__ = ()


class Round(Structure):
    """A draft of one row, and its outcome."""

    __slots__ = ()


class Speculation(Structure):
    """Rounds of speculation of one row."""

    __slots__ = ()


class PrefillRows(Structure):
    """The places of a prefill's tokens."""

    __slots__ = ()


class Entry(Structure):
    """Which tokens of a prompt enter a branch, and the shortcut of those that skip it."""

    __slots__ = ()


class GroupSteps(Structure):
    """The values that one group of columns of a weight can have."""

    __slots__ = ()


class DescentBlock(Structure):
    """Columns of a weight whose lines and codes are chosen anew."""

    __slots__ = ()


class RangeSearch(Structure):
    """A weight whose groups each get the best of several ranges."""

    __slots__ = ()


OnToken = ctypes.CFUNCTYPE(Int, Int)
Propose = ctypes.CFUNCTYPE(Int, ctypes.POINTER(Int), Int)
_CALLBACKS = {"OnToken": OnToken, "Propose": Propose}


class Address:
    """A pointer among a function's arguments: a tensor's, an address, or null for None."""

    @staticmethod
    def from_param(pointed: Any) -> Any:
        """The value that ctypes passes for it."""
        number = pointed is None or type(pointed) is int
        return Pointer.from_param(pointed if number else pointed.data_ptr())


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
    """The declarations of src/api.h."""

    version: int
    structures: dict[str, list[tuple[str, Any]]]
    """Name and ctypes type of each field, by structure."""
    functions: dict[str, Function]
    enums: dict[str, dict[str, int]]
    """Entries, by name, of the enums that `ENUMS` lists."""
    sizes: dict[str, int]


@cache
def read_header(path: Path = HEADER) -> Header:
    """Parse src/api.h. Raises OSError where it is missing, AbiMismatch where it cannot be
    parsed."""
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
        {name: Function(_type(result), _arguments(args)) for result, name, args in prototypes},
        {name: _numbers(enums[name], r"(\w+) = (\d+)") for name in ENUMS},
        _numbers(text, r"static const int32_t (\w+) = (\d+)"),
    )


def _numbers(text: str, pattern: str) -> dict[str, int]:
    """`FP32 = 0, BF16 = 1,` -> name and value of each."""
    return {name: int(value) for name, value in re.findall(pattern, text)}


def _declared(text: str) -> list[tuple[str, str]]:
    """`int32_t n; const void* weights;` -> name and C type of each."""
    declared = [" ".join(part.split()) for part in text.split(";") if part.strip()]
    pairs = [re.fullmatch(r"(.*?)(\w+)", part) for part in declared]
    return [(pair[2], pair[1].strip()) for pair in pairs if pair is not None]


def _fields(body: str) -> list[tuple[str, Any]]:
    return [(name, _type(declared)) for name, declared in _declared(body)]


def _arguments(text: str) -> tuple[Any, ...]:
    if text.strip() == "void":
        return ()
    types = [(declared, _type(declared)) for _, declared in _declared(text.replace(",", ";"))]
    # An arena is an address already; numbers are what may come as a tensor.
    return tuple(
        Address if kind is Pointer and not declared.startswith("Arena") else kind
        for declared, kind in types
    )


def _type(declared: str) -> Any:
    """The ctypes type of a C type."""
    name = declared.replace("const", "").strip()
    if not name.endswith("*"):
        types: dict[str, Any] = _SCALARS | STRUCTURES
        if name not in types:
            raise AbiMismatch(f"{HEADER.name}: type {declared!r} has no counterpart in Python")
        return types[name]
    pointed = name[:-1].strip()
    if pointed in STRUCTURES:
        return ctypes.POINTER(STRUCTURES[pointed])
    return ctypes.c_char_p if pointed == "char" else _CALLBACKS.get(pointed, Pointer)


def _take_fields() -> None:
    """Give structures the header's fields; none where an export has no sources."""
    if not HEADER.exists():
        return
    fields = read_header().structures
    if set(fields) != set(STRUCTURES):
        odd = sorted(set(fields) ^ set(STRUCTURES))
        raise AbiMismatch(f"structures of {HEADER.name} and abi.py differ: {', '.join(odd)}")
    for name in fields:
        STRUCTURES[name]._fields_ = fields[name]


_take_fields()


def check(library: Any, header: Header) -> None:
    """Raise AbiMismatch where numbers here, or the library, differ from the header."""
    if header.sizes != SIZES:
        raise AbiMismatch(f"sizes in {HEADER.name} are {header.sizes}, in abi.py {SIZES}")
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


def declare(library: Any, header: Header) -> None:
    """Set argument and result types of every function that the library has."""
    for name, function in header.functions.items():
        if hasattr(library, name):
            call = getattr(library, name)
            call.argtypes, call.restype = function.arguments, function.result
