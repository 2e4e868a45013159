"""Tasks that wait for each other, done side by side in threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass


@dataclass
class Task:
    """Something to do after all that it needs was tried.

    `work` keeps failures to itself: what it raises ends the whole graph.
    """

    name: str
    work: Callable[[], None]
    needs: tuple[str, ...] = ()
    """Names of other tasks."""


def thread_pool(slots: int) -> ThreadPoolExecutor:
    """Threads for `run_graph`. They must outlive every worker process that they start.

    The kernel ends a worker with the thread that started it (PR_SET_PDEATHSIG).
    """
    return ThreadPoolExecutor(max_workers=slots, thread_name_prefix="worker")


def run_graph(
    tasks: Iterable[Task], slots: int, abort: Callable[[], None], pool: ThreadPoolExecutor
) -> None:
    """Do all tasks, each after those it needs, at most `slots` at a time, else in their order.

    An exception of a task, or Ctrl-C, ends the graph: `abort` must end the tasks that are running.
    """
    waiting = list(tasks)
    done: set[str] = set()
    running: dict[Future[None], str] = {}
    try:
        while waiting or running:
            ready = [task for task in waiting if done.issuperset(task.needs)]
            for task in ready[: slots - len(running)]:
                waiting.remove(task)
                running[pool.submit(task.work)] = task.name
            assert running, f"tasks that can never begin: {[task.name for task in waiting]}"
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                done.add(running.pop(future))
                future.result()
    except BaseException:
        abort()
        wait(running)
        raise
