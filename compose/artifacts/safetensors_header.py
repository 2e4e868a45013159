"""The header of a safetensors file, checked against the file's size; no tensor is read.

A file is eight bytes with the length of the header, the header (JSON: name -> type, shape, begin
and end), and the tensors' bytes. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.errors import ArtifactError, shortened

MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Bits of one number of each type."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]


def stored_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of a file by name.

    Raises:
        ArtifactError: the file is cut short, or is not a safetensors file; the message names it.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or not 2 <= length <= MOST_HEADER_BYTES:
                raise _refused(file, "it does not begin with the length of a header")
            if length > size - 8:
                raise _refused(file, f"it is cut short in its header: it has {size} bytes")
            header = json.loads(opened.read(length))
    except ArtifactError:
        raise
    except OSError as error:
        raise _refused(file, f"it cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _refused(file, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _refused(file, "its header is not a mapping")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return {name: _tensor(file, name, entry, size - 8 - length) for name, entry in entries.items()}


def _tensor(file: Path, name: str, entry: Any, data: int) -> Stored:
    shown = shortened(repr(name))
    try:
        dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        sound = all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape)) and begin <= end
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise _refused(file, f"its header has no valid entry for the tensor {shown}")
    if end > data:
        raise _refused(file, f"it is cut short: {shown} ends at byte {end} of {data}")
    bits = BITS.get(dtype)
    if bits is not None and math.prod(shape) * bits != (end - begin) * 8:
        raise _refused(
            file, f"{shown} has {end - begin} bytes, too few or too many for shape {list(shape)}"
        )
    return Stored(dtype, shape)


def _refused(file: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"{file.name} is not a complete safetensors file: {why}", fix="fetch or copy the file again"
    )
