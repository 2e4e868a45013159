"""Workers on a Ray cluster: each is the same process as a local one, started by an actor."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compose.errors import StepError, UserError
from compose.execution.messages import Message, Role
from compose.execution.worker_process import GRACE_S, LocalWorker, Worker


class RayWorker:
    """A worker that is a child of a Ray actor."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self.ray, self.actor = ray, actor
        self.stopped = False

    def send(self, message: Mapping[str, Any]) -> None:
        """Send it a command."""
        self._call(self.actor.send, message)

    def receive(self) -> Message:
        """The worker's next message; StepError when it, or its node, died."""
        message: Message = self._call(self.actor.receive)
        return message

    def stop(self) -> None:
        """End the worker, then the actor."""
        if self.stopped:
            return
        self.stopped = True
        # A RayError here: the node is gone, and the worker with it.
        with contextlib.suppress(self.ray.exceptions.RayError):
            self.ray.get(self.actor.stop.remote(), timeout=2 * GRACE_S)
        self.ray.kill(self.actor)

    def _call(self, method: Any, *arguments: Any) -> Any:
        try:
            return self.ray.get(method.remote(*arguments))
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, StepError):
                raise StepError(error.cause.message) from None
            raise
        except self.ray.exceptions.RayError as error:
            raise StepError(f"the Ray node of a worker failed: {error}") from error


class RayExecutor:
    """Workers on a Ray cluster. Runs, store and caches must be in folders that all nodes share.

    Steps and quality measurements run side by side, as many as the cluster has cores for. Speed is
    measured on the node where `gateskip run` runs, so that cells stay comparable.
    """

    local = False

    def __init__(
        self, threads: int | None = None, workers: int | None = None, address: str | None = None
    ) -> None:
        self.ray = _import_ray()
        self.threads = self.timed_threads = threads or 1
        self.started = not self.ray.is_initialized()
        if self.started:
            address = address or os.environ.get("RAY_ADDRESS")
            self.ray.init(address=address, log_to_driver=False, include_dashboard=False)
        cores = int(self.ray.cluster_resources().get("CPU", 1))
        self.slots = workers or max(1, cores // self.threads)

    def start(self, role: Role, job: Path, log: Path, *, on_this_machine: bool = False) -> Worker:
        """Start an actor that starts the worker; one `on_this_machine` reserves no core."""
        options: dict[str, Any] = {"num_cpus": self.threads, "max_restarts": 0}
        if on_this_machine:
            strategy = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
            node = self.ray.get_runtime_context().get_node_id()
            options |= {"num_cpus": 0, "scheduling_strategy": strategy(node, soft=False)}
        actor = self.ray.remote(LocalWorker).options(**options)
        return RayWorker(self.ray, actor.remote(role, job.resolve(), log.resolve(), self.threads))

    def close(self) -> None:
        """Leave the cluster, if this executor joined it."""
        if self.started:
            self.ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise UserError(
            "the executor 'ray' needs the package ray, which is not installed",
            fix="pip install 'gateskip-compose[ray]'",
        ) from error
    return ray
