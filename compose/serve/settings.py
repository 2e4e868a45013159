"""The settings of a server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compose.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY_VARIABLE = "GATESKIP_API_KEY"
LOWEST = {
    "max_rows": 1,
    "max_context": 2,
    "max_queue": 1,
    "max_body_kb": 1,
    "cache_mb": 1,
    "replicas": 1,
}
"""The lowest value of each number."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What is served, where, and within which limits. Raises UserError for a number too low."""

    folder: Path
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free port."""
    name: str | None = None
    """A further name of the model in requests; the folder's name is always one."""
    api_key: str | None = field(default=None, repr=False)
    budget: float | None = None
    speculate: bool | None = None
    max_rows: int = 32
    """Most answers that are decoded at the same time."""
    max_context: int | None = None
    """Most tokens of a prompt and its answer; None for 4096, or fewer if the model takes fewer."""
    max_queue: int = 256
    """Most answers that wait."""
    max_body_kb: int = 1024
    """Most kilobytes of a request's body."""
    cache_mb: int | None = None
    """Most megabytes of the KV cache; None for half of the memory that is free at
    the start, shared by the replicas."""
    prefix_dir: Path | None = None
    """Folder in which keys and values of prompts are kept; None keeps none on disk."""
    replicas: int = 1
    """Processes; the limits hold for each of them."""

    def __post_init__(self) -> None:
        for name, lowest in LOWEST.items():
            require_lowest(name, getattr(self, name), lowest)

    @property
    def loopback(self) -> bool:
        """Whether only programs of this machine reach the server."""
        return self.host in LOOPBACK

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model in requests, the first one in answers."""
        folder = self.folder.resolve().name
        return (folder,) if self.name in (None, folder) else (str(self.name), folder)

    def to_json(self) -> str:
        """The settings as one line of JSON."""
        return json.dumps(asdict(self), default=str)


def from_json(line: str) -> ServeSettings:
    """The settings that `to_json` wrote."""
    values: Mapping[str, Any] = json.loads(line)
    paths = {name: Path(values[name]) for name in ("folder", "prefix_dir") if values.get(name)}
    return ServeSettings(**{**values, **paths})


def require_lowest(name: str, value: int | None, lowest: int) -> None:
    """Raises UserError for a number below its lowest value."""
    if value is not None and value < lowest:
        raise UserError(f"{name} is {value}", fix=f"give {lowest} or more")
