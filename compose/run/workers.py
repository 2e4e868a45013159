"""The worker processes of one run: started on a job file, asked, and ended with the run."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

from compose.errors import StepError
from compose.outputs.run_folder import RunFolder
from compose.processes.executors import Executor
from compose.processes.messages import CellCommand, Role
from compose.processes.needs import ANYWHERE, Needs
from compose.processes.worker_process import Worker, await_answer
from compose.run.board import Line, show_progress
from compose.store import private_folder, write_json


class RunWorkers:
    """Starts the workers of a run. Safe to use from several threads."""

    def __init__(self, executor: Executor, folder: RunFolder) -> None:
        self.executor = executor
        self._folder = folder
        self._live: set[Worker] = set()
        self._lock = threading.Lock()
        self._ending = False

    def start(
        self, role: Role, name: str, job: Mapping[str, Any], needs: Needs = ANYWHERE
    ) -> Worker:
        """Start a worker on a job, with the job file and log of `name`.

        Raises:
            StepError: `end_all` was called before.
        """
        file = self._folder.job(f"{name}.{role}")
        private_folder(file.parent)  # a worker does what stands in it
        write_json(file, job)
        log = self._folder.log(name)
        with self._lock:
            if self._ending:
                raise StepError("the run is ending")
            worker = self.executor.start(role, file, log, needs)
            self._live.add(worker)
        return worker

    def call(
        self, role: Role, name: str, job: Mapping[str, Any], line: Line, needs: Needs = ANYWHERE
    ) -> dict[str, Any]:
        """Start a worker, wait for its one answer, and end it. Raises as `answer`."""
        worker = self.start(role, name, job, needs)
        try:
            return self.answer(worker, line)
        finally:
            self.end(worker)

    def ask(self, worker: Worker, command: CellCommand, line: Line) -> dict[str, Any]:
        """Send a worker a command and wait for the answer. Raises as `answer`."""
        worker.send(command)
        return self.answer(worker, line)

    def answer(self, worker: Worker, line: Line) -> dict[str, Any]:
        """The worker's next answer; its progress is shown on `line`.

        Raises:
            ComposeError: the work failed, or the worker died.
        """
        result: dict[str, Any] = await_answer(worker, partial(show_progress, line))
        return result

    def end(self, worker: Worker) -> None:
        """End a worker."""
        with self._lock:
            self._live.discard(worker)
        worker.stop()

    def end_all(self) -> None:
        """End every worker that is left, and refuse to start further ones."""
        with self._lock:
            self._ending = True
            left = list(self._live)
        stopping = [threading.Thread(target=worker.stop) for worker in left]
        for each in stopping:  # one that does not listen keeps no other waiting
            each.start()
        for each in stopping:
            each.join()
