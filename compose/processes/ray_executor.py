"""Workers on a Ray cluster: an actor starts the same process that runs locally.

An actor requests the CPUs, the memory and the GPU that its worker needs, so Ray places it where
they are free. Where a node is lost, or a worker is killed there, the work starts again
(`attempts`), on another node if one is alive.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from compose.capacity import free_memory
from compose.contract import ANYWHERE, Message, Needs, Role
from compose.errors import StepError, UserError
from compose.numbers import bytes_text
from compose.processes.endings import Ending, first_line, lost
from compose.processes.ray_nodes import Kind, Node, TimedNodes, accelerator_of
from compose.processes.worker_process import GRACE_S, LocalWorker, Worker
from compose.results.environment import capture_environment

ATTEMPTS = 3


class HostedWorker(LocalWorker):
    """A worker on the node of the actor that holds it."""

    def node(self) -> str:
        """The name of that node in the cluster."""
        import ray

        return str(ray.get_runtime_context().get_node_id())


class RayWorker:
    """A worker that is a child of a Ray actor."""

    def __init__(self, executor: RayExecutor, actor: Any, job: Path) -> None:
        self.executor, self.actor, self.job = executor, actor, job
        self.ray = executor.ray
        self.node: str | None = None
        self.stopped = False

    def send(self, message: Mapping[str, Any]) -> None:
        """Send it a command."""
        self._call(self.actor.send, message)

    def receive(self) -> Message:
        """The worker's next message; WorkerLost when the worker or its node was lost."""
        if self.node is None:
            self.node = self._call(self.actor.node)
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
        """The result of an actor's method.

        Raises:
            StepError: the worker's own; WorkerLost where the actor was lost with its node.
        """
        try:
            return self.ray.get(method.remote(*arguments))
        except self.ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, StepError):
                raise
            self.executor.note_lost(self.job, self.node)
            raise error.cause from None
        except self.ray.exceptions.RayError as error:
            if self.stopped:
                raise StepError("the worker was stopped") from None
            self.executor.note_lost(self.job, self.node)
            ending = Ending(node=self.node, node_lost=True)
            raise lost(ending, f": {type(error).__name__}\n    {first_line(error)}") from error


class RayExecutor:
    """Workers on a Ray cluster. Runs, store and caches must be in folders that all nodes share.

    Steps and quality measurements run side by side, as many as the cluster has cores for. Speed is
    measured on one node (`ray_nodes`), so that cells stay comparable.
    """

    local = False
    attempts = ATTEMPTS

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
        self._left: dict[Path, set[str]] = {}
        """Job file -> nodes on which its worker was lost."""

    def start(self, role: Role, job: Path, log: Path, needs: Needs = ANYWHERE) -> Worker:
        """Start an actor that starts the worker; a timed worker reserves no core.

        Raises:
            StepError: no node of the cluster is large enough, or none is left of the kind on which
                speed is measured.
        """
        # Two threads: `stop` must get through while `receive` waits.
        options: dict[str, Any] = {"max_restarts": 0, "max_concurrency": 2}
        if needs.here:
            timed = self._timed.choose(self._nodes())
            options |= {"num_cpus": 0, "scheduling_strategy": self._on(timed, soft=False)}
        else:
            options |= self._request(needs)
            if (other := self._other_node(job, options)) is not None:
                options["scheduling_strategy"] = self._on(other, soft=True)
        actor = self.ray.remote(HostedWorker).options(**options)
        arguments = (role, job.resolve(), log.resolve(), self.threads, needs.allowed)
        return RayWorker(self, actor.remote(*arguments), job)

    def environment(self, threads: int | None) -> dict[str, Any]:
        """The machine that timed workers run on."""
        timed = self._timed.choose(self._nodes())
        if timed == self._own:
            return capture_environment(threads)
        machine = dict(self._ask_node(timed, capture_environment, threads))
        (node,) = (node for node in self._nodes() if node["NodeID"] == timed)
        accelerator = machine.get("accelerator") or accelerator_of(node)
        return machine | ({"accelerator": accelerator} if accelerator else {})

    def free_bytes(self) -> int:
        """Free memory of that machine."""
        timed = self._timed.choose(self._nodes())
        return int(self._ask_node(timed, free_memory))

    def note_lost(self, job: Path, node: str | None) -> None:
        """Note that a job's worker ended on a node: the next attempt uses another node."""
        if node is not None:
            self._left.setdefault(job, set()).add(node)

    def close(self) -> None:
        """Leave the cluster, if this executor joined it."""
        if self.started:
            self.ray.shutdown()

    def _request(self, needs: Needs) -> dict[str, Any]:
        """The resources that an actor requests of its node: CPUs, memory and a GPU, where the
        cluster has any.

        Raises:
            StepError: no node has that much, so Ray would wait for ever.
        """
        request: dict[str, Any] = {"num_cpus": self.threads}
        if needs.memory is not None:
            request["memory"] = needs.memory
        nodes = self._nodes()
        if needs.gpu and any(node["Resources"].get("GPU", 0) >= 1 for node in nodes):
            request["num_gpus"] = 1
        if not any(_fits(node, request) for node in nodes):
            most = max((node["Resources"].get("memory", 0) for node in nodes), default=0)
            memory = "" if needs.memory is None else f" and {bytes_text(needs.memory)} of memory"
            raise StepError(
                f"no node of the Ray cluster has {self.threads} CPUs{memory}; the largest has "
                f"{bytes_text(most)} to give",
                fix="add a larger node (`ray start --memory=...`), or set a lower "
                "limits.step.memory_mb or limits.cell.memory_mb",
            )
        return request

    def _other_node(self, job: Path, request: Mapping[str, Any]) -> str | None:
        """A node that is alive and large enough, for a job that was lost on others; else None."""
        left = self._left.get(job, set())
        fit = [node["NodeID"] for node in self._nodes() if left and _fits(node, request)]
        return next((node for node in fit if node not in left), None)

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    @cached_property
    def _timed(self) -> TimedNodes:
        return TimedNodes(self._own, self._kind_of)

    @property
    def _own(self) -> str:
        """The id of the node that this process runs on."""
        return str(self.ray.get_runtime_context().get_node_id())

    def _kind_of(self, node: Node) -> Kind:
        machine = self._ask_node(node["NodeID"], capture_environment, self.threads)
        return Kind(machine.get("processor", "unknown"), accelerator_of(node))

    def _ask_node(self, node: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a function on a node."""
        options = {"num_cpus": 0, "scheduling_strategy": self._on(node, soft=False)}
        return self.ray.get(self.ray.remote(function).options(**options).remote(*arguments))

    def _on(self, node: str, *, soft: bool) -> Any:
        strategies = self.ray.util.scheduling_strategies
        return strategies.NodeAffinitySchedulingStrategy(node, soft=soft)


def _fits(node: Mapping[str, Any], request: Mapping[str, Any]) -> bool:
    """Whether a node has the requested resources in total."""
    has = node["Resources"]
    return all(
        has.get(name, 0) >= request.get(key, 0)
        for name, key in (("CPU", "num_cpus"), ("memory", "memory"), ("GPU", "num_gpus"))
    )


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
