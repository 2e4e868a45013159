"""Replicas on the machines of a Ray cluster: `serve run compose.serve.ray:deployment folder=DIR`.

Ray Serve starts the replicas, sends each request to one of them, and replaces a replica that ends.
A replica answers as `gateskip serve` does, without a port of its own: Ray has the address.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from ray import serve
from transformers.utils.logging import disable_progress_bar

from compose.artifacts.gguf.file import is_gguf
from compose.errors import UserError, suggest
from compose.processes.worker_process import THREAD_VARIABLES
from compose.serve.app import Service
from compose.serve.entrance import App
from compose.serve.metrics import Counts, Metrics
from compose.serve.model import ServedModel
from compose.serve.port import log_lines
from compose.serve.server import DRAIN_S, SHARE_S, scheduler_of
from compose.serve.settings import KEY_VARIABLE, ServeSettings, require_lowest

LOG = logging.getLogger("gateskip.serve")
NAME = "gateskip"
"""The name of the deployment in Ray Serve."""
ADDRESS = ("host", "port")
"""Settings that Ray has instead."""
SPARE = 64
"""Requests that Ray sends to a replica beside the answers that may run and wait there. More of them
would wait at Ray; the replica refuses them when its queue is full."""
OLD_S = 10.0
"""Seconds after which counts are those of a replica that has ended."""


@dataclass(frozen=True, kw_only=True)
class ClusterSettings(ServeSettings):
    """The settings of a server on a cluster; the limits hold for each replica."""

    threads: int = 1
    """CPUs that a replica reserves, and its threads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_lowest("threads", self.threads, 1)


def deployment(arguments: Mapping[str, Any]) -> serve.Application:
    """The application that Ray Serve runs. `arguments` are fields of `ClusterSettings`, also as
    text.

    Raises UserError for an argument that is unknown, wrong or missing.
    """
    settings = cluster_settings(arguments)
    if settings.api_key is None:
        LOG.warning("anyone who can reach Ray Serve can use this server; set %s", KEY_VARIABLE)
    variables = dict.fromkeys(THREAD_VARIABLES, str(settings.threads))
    variables["TOKENIZERS_PARALLELISM"] = "false"
    counts = serve.deployment(ReplicaCounts, ray_actor_options={"num_cpus": 0})
    replicas = serve.deployment(
        serve.ingress()(Replica),
        name=NAME,
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_rows + settings.max_queue + SPARE,
        graceful_shutdown_timeout_s=DRAIN_S,
        ray_actor_options={
            "num_cpus": settings.threads,
            "runtime_env": {"env_vars": variables},
        },
    )
    return replicas.bind(settings, counts.bind())


def cluster_settings(arguments: Mapping[str, Any]) -> ClusterSettings:
    """The settings that `arguments` name. Raises UserError."""
    kinds = get_type_hints(ClusterSettings)
    for name in arguments:
        if name in ADDRESS:
            fix = "start Ray Serve there: serve start --http-host ADDRESS --http-port PORT"
            raise UserError(f"{name} is a setting of Ray Serve", fix=fix)
        if name not in kinds:
            hint = suggest(name, [kind for kind in kinds if kind not in ADDRESS])
            raise UserError(f"unknown argument {name!r}; {hint}")
    values = {name: _value(name, kinds[name], value) for name, value in arguments.items()}
    values.setdefault("api_key", os.environ.get(KEY_VARIABLE) or None)
    values["folder"] = _folder(values.get("folder"))
    return ClusterSettings(**values)


def _value(name: str, kind: Any, value: Any) -> Any:
    """A value of a setting's type."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{name}: {error.errors()[0]['msg']}") from None


def _folder(folder: Path | None) -> Path:
    """The absolute path of a model folder."""
    if folder is None:
        raise UserError("no model is named", fix="give folder=DIR")
    if is_gguf(folder):
        raise UserError(
            f"{folder} is a GGUF file, which this machine would convert for itself alone",
            fix="serve a model folder that all machines have",
        )
    if not folder.is_dir():
        fix = "give a model folder that all machines have at the same path"
        raise UserError(f"there is no folder {folder}", fix=fix)
    return folder.resolve()


class Replica:
    """One copy of the model, in a process that Ray starts."""

    def __init__(self, settings: ServeSettings, counts: Any) -> None:
        name = serve.get_replica_context().replica_tag
        log_lines(f" replica {name}")
        LOG.info("loading %s; with drafts this can take minutes", settings.folder.name)
        disable_progress_bar()  # of weights, by transformers
        model = ServedModel(settings)
        self._scheduler = scheduler_of(model)
        self._metrics = ReplicaMetrics(name, counts)
        self._service = Service(settings, model, self._scheduler, self._metrics)

    async def __serve_build_asgi_app__(self) -> App:
        """Called by Ray: the paths of the server."""
        self._sharing = asyncio.create_task(self._share())
        return self._service.app()

    async def _share(self) -> None:
        while True:
            await self._metrics.exchange(self._scheduler.snapshot())
            await asyncio.sleep(SHARE_S)

    def __del__(self) -> None:
        """Called by Ray when the answers have ended, or have had their time."""
        if hasattr(self, "_scheduler"):
            self._scheduler.close()


class ReplicaMetrics(Metrics):
    """The counts of a replica; those of the others come from `ReplicaCounts`."""

    def __init__(self, name: str, counts: Any) -> None:
        super().__init__(name)
        self._counts = counts
        self._others: dict[str, Counts] = {}

    def others(self) -> dict[str, Counts]:
        """What replicas shared last."""
        return self._others

    async def exchange(self, snapshot: Any) -> None:
        """Give the counts of this replica, and take those of the others."""
        try:
            counts = self.counts(snapshot)
            self._others = await self._counts.exchange.remote(self._replica, counts)
        except Exception as error:  # it is being started again
            self._others = {}
            LOG.warning("the counts of other replicas are missing: %s", type(error).__name__)


class ReplicaCounts:
    """The latest counts of all replicas, in a process that Ray starts."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[float, Counts]] = {}

    async def exchange(self, name: str, counts: Counts) -> dict[str, Counts]:
        """Take the counts of a replica; those of all that run, by replica."""
        now = time.monotonic()
        self._latest[name] = now, counts
        self._latest = {
            name: (then, counts)
            for name, (then, counts) in self._latest.items()
            if now - then < OLD_S
        }
        return {name: counts for name, (_, counts) in self._latest.items()}
