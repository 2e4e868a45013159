"""The header of a GGUF file: its metadata and the place of each tensor, read without any library.

    magic "GGUF", version, tensors, metadata entries
    entries: key, type, value              strings and arrays state their length
    tensors: name, sizes, type, offset     sizes columns first, as ggml counts them
    data, from the next multiple of `general.alignment`

Planning reads sizes from here, so reading is quick and imports no numpy. A broken file raises an
error that says what is broken. Lengths and counts in a file may be wrong: each is checked against
the file's size, so libraries can trust a file that was read here. Layout: docs/gguf.md of ggml.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from compose.errors import ArtifactError, shortened

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1, with 32-bit counts, is not in use any more
ALIGNMENT = 32
MOST_ALIGNMENT = 1 << 20
MOST_NAME = 1 << 16  # bytes of a key, or of a tensor's name
MOST_DIMENSIONS = 4
MOST_VALUES = 1 << 24  # of a list in the metadata: vocabularies have less than a million
MOST_NESTED = 4  # lists in lists
STRING, ARRAY = 8, 9
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Type of a metadata value -> its code in `struct`."""


@dataclass(frozen=True)
class Storage:
    """A storage type: `weights` weights of a row take `bytes` bytes."""

    name: str
    weights: int
    bytes: int


STORAGES: dict[int, Storage] = {
    0: Storage("F32", 1, 4),
    1: Storage("F16", 1, 2),
    2: Storage("Q4_0", 32, 18),
    3: Storage("Q4_1", 32, 20),
    6: Storage("Q5_0", 32, 22),
    7: Storage("Q5_1", 32, 24),
    8: Storage("Q8_0", 32, 34),
    10: Storage("Q2_K", 256, 84),
    11: Storage("Q3_K", 256, 110),
    12: Storage("Q4_K", 256, 144),
    13: Storage("Q5_K", 256, 176),
    14: Storage("Q6_K", 256, 210),
    16: Storage("IQ2_XXS", 256, 66),
    17: Storage("IQ2_XS", 256, 74),
    18: Storage("IQ3_XXS", 256, 98),
    19: Storage("IQ1_S", 256, 50),
    20: Storage("IQ4_NL", 32, 18),
    21: Storage("IQ3_S", 256, 110),
    22: Storage("IQ2_S", 256, 82),
    23: Storage("IQ4_XS", 256, 136),
    29: Storage("IQ1_M", 256, 56),
    30: Storage("BF16", 1, 2),
    34: Storage("TQ1_0", 256, 54),
    35: Storage("TQ2_0", 256, 66),
    39: Storage("MXFP4", 32, 17),
}
"""GGML type -> its storage: all types that the gguf package can dequantize (tests compare)."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file."""

    name: str
    shape: tuple[int, ...]
    """Rows first, as torch counts."""
    type: int
    """A key of `STORAGES`."""
    start: int
    """Position of its first byte in the file."""

    @property
    def storage(self) -> Storage:
        """Storage type of its weights."""
        return STORAGES[self.type]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[-1] // self.storage.weights * self.storage.bytes

    @property
    def rows(self) -> int:
        """Number of rows; a vector has one."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class GgufFile:
    """A file's metadata and tensors, by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, without metadata, in which the vocabulary is."""
        return sum(tensor.rows * tensor.row_bytes for tensor in self.tensors.values())

    def floats(self, name: str) -> list[float]:
        """The values of a small tensor in float32."""
        tensor = self.tensors[name]
        if tensor.storage.name != "F32":
            self.refuse(f"{name} is stored as {tensor.storage.name}, not as F32")
        count = tensor.rows * tensor.shape[-1]
        with self.path.open("rb") as file:
            file.seek(tensor.start)
            return list(struct.unpack(f"<{count}f", file.read(4 * count)))

    def refuse(self, reason: str, fix: str | None = None) -> NoReturn:
        """Raise the ArtifactError that this file cannot be read, with the reason."""
        raise _refused(self.path, reason, fix)


def is_gguf(source: str | Path) -> bool:
    """Whether a model's source is a GGUF file, by its name."""
    return str(source).lower().endswith(SUFFIX)


def open_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file and check that all its tensors are there.

    Raises:
        ArtifactError: the file does not exist, is not a GGUF file, is cut short, or has a tensor of
        an unknown type.
    """
    try:
        with path.open("rb") as file:
            return _Header(path, file).read()
    except FileNotFoundError:
        raise ArtifactError(f"there is no file {path}", fix="check the path") from None
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from None


def _refused(path: Path, reason: str, fix: str | None) -> ArtifactError:
    return ArtifactError(f"{path.name} cannot be read: {reason}", fix=fix)


class _Header:
    """Reads a header from front to back."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = path.stat().st_size

    def read(self) -> GgufFile:
        if self._size < len(MAGIC) or self._file.read(len(MAGIC)) != MAGIC:
            raise _refused(self._path, "it is not a GGUF file", "name a GGUF file")
        version = self._number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            said = "its numbers are big-endian" if swapped else f"it is GGUF version {version}"
            raise _refused(self._path, said, f"supported: versions {VERSIONS}, little-endian")
        tensors, entries = self._number("Q"), self._number("Q")
        if max(tensors, entries) > self._size:  # each takes bytes
            self._cut_short(f"it states {tensors} tensors and {entries} entries")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string(MOST_NAME)
            metadata[key] = self._value(self._number("I"))
        parsed = [self._tensor() for _ in range(tensors)]
        data = self._data_start(metadata.get("general.alignment", ALIGNMENT))
        placed = [GgufTensor(name, shape, kind, data + at) for name, shape, kind, at in parsed]
        held = {tensor.name: self._whole(tensor) for tensor in placed}
        if len(held) < len(placed):
            twice = Counter(tensor.name for tensor in placed).most_common(1)[0][0]
            raise _refused(self._path, f"{shortened(twice)} occurs twice in it", None)
        return GgufFile(self._path, metadata, held)

    def _data_start(self, align: object) -> int:
        """Position of the first tensor's first byte."""
        if not isinstance(align, int) or not 1 <= align <= MOST_ALIGNMENT:
            raise _refused(self._path, f"its alignment is {shortened(repr(align))}", None)
        return -(-self._file.tell() // align) * align

    def _whole(self, tensor: GgufTensor) -> GgufTensor:
        """The tensor, if its storage type is known and the file has all of it."""
        storage, name = STORAGES.get(tensor.type), shortened(tensor.name)
        if storage is None:
            readable = ", ".join(kind.name for kind in STORAGES.values())
            said = f"{name} is stored as GGML type {tensor.type}"
            raise _refused(self._path, said, f"supported types: {readable}")
        if not tensor.shape or tensor.shape[-1] % storage.weights:
            raise _refused(self._path, f"{name} has the sizes {tensor.shape}", None)
        end = tensor.start + tensor.rows * tensor.row_bytes
        if end > self._size:
            self._cut_short(f"{name} would end at byte {end:,}")
        return tensor

    def _cut_short(self, where: str) -> NoReturn:
        said = f"it is cut short: {where}, and the file has {self._size:,}"
        raise _refused(self._path, said, "fetch the file again")

    def _bytes(self, count: int) -> bytes:
        content = self._file.read(count) if count <= self._size else b""
        if len(content) < count:
            self._cut_short("its header does not end")
        return content

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))
        return value

    def _string(self, most: int | None = None) -> str:
        length = self._number("Q")
        if most is not None and most < length <= self._size:
            raise _refused(self._path, f"a name in it has {length:,} bytes", None)
        return self._bytes(length).decode("utf-8", "replace")

    def _value(self, kind: int, depth: int = 0) -> Any:
        """A metadata value: a number, a text, or a list of them."""
        if kind in NUMBERS:
            return self._number(NUMBERS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise _refused(self._path, f"its metadata has a value of type {kind}", None)
        if depth == MOST_NESTED:
            raise _refused(self._path, "its metadata nests lists too deeply", None)
        inner, count = self._number("I"), self._number("Q")
        width = struct.calcsize(f"<{NUMBERS[inner]}") if inner in NUMBERS else 1
        if count * width > self._size:
            self._cut_short("its header does not end")
        if count > MOST_VALUES:
            raise _refused(self._path, f"its metadata has a list of {count:,} values", None)
        if inner in NUMBERS:
            return list(struct.unpack(f"<{count}{NUMBERS[inner]}", self._bytes(count * width)))
        return [self._value(inner, depth + 1) for _ in range(count)]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, sizes, type, and first byte after the data's start."""
        name, dimensions = self._string(MOST_NAME), self._number("I")
        if dimensions > MOST_DIMENSIONS:
            said = f"{shortened(name)} has {dimensions} dimensions"
            raise _refused(self._path, said, None)
        sizes = tuple(self._number("Q") for _ in range(dimensions))
        return name, sizes[::-1], self._number("I"), self._number("Q")
