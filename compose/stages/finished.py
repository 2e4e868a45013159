"""Parts of a stage that are finished: a step that was killed goes on after the last of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from compose.store import read_json, write_text

Part = TypeVar("Part")


def once(file: Path, kind: Any, work: Callable[[], Part]) -> Part:
    """The result of `work`: the one in `file`, where an earlier try of the step left it, else it is
    made and written there. `kind` is its type: plain values, or a dataclass of them."""
    adapter: TypeAdapter[Part] = TypeAdapter(kind)
    try:
        return adapter.validate_python(read_json(file))
    except ValidationError:  # there is none, or it is damaged
        result = work()
        write_text(file, json.dumps(adapter.dump_python(result)))
        return result
