"""The graph of tasks: order, slots, and what ends it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from compose.errors import AssetError
from compose.run.runner import run_graph, thread_pool
from compose.run.state import Task

PATIENCE_S = 60.0


def test_the_graph_keeps_order_and_uses_its_slots() -> None:
    done: list[str] = []
    running, most = 0, 0
    together = threading.Barrier(1)

    def work(name: str) -> Callable[[], None]:
        def body() -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            if name != "a":
                together.wait(PATIENCE_S)
            done.append(name)
            running -= 1

        return body

    tasks = [Task(n, work(n), needs) for n, needs in [("a", ()), ("b", ("a",)), ("c", ("a",))]]
    run_graph(tasks, 1, lambda: None, thread_pool(1))
    assert done == ["a", "b", "c"]
    assert most == 1
    done.clear()
    together = threading.Barrier(2)  # neither ends before the other runs
    run_graph(tasks, 3, lambda: None, thread_pool(3))
    assert done[0] == "a"
    assert most == 2


def test_what_a_task_raises_lets_others_end() -> None:
    """A text that is not to be had must not cost the hour that another step has worked."""
    done: list[str] = []
    aborted: list[bool] = []
    failed = threading.Event()

    def fail() -> None:
        failed.set()
        raise AssetError("gone")

    def go_on() -> None:
        assert failed.wait(PATIENCE_S)
        time.sleep(0.05)
        done.append("step")

    tasks = [
        Task("long", go_on),
        Task("a", fail),
        Task("b", lambda: done.append("b"), ("a",)),
        Task("after", lambda: done.append("after"), ("long",)),
    ]
    with pytest.raises(AssetError, match="gone"):
        run_graph(tasks, 2, lambda: aborted.append(True), thread_pool(2))
    assert done == ["step"], "what ran has ended, nothing else has begun"
    assert aborted == []


def test_ctrl_c_ends_what_runs() -> None:
    ended = threading.Event()

    def interrupted() -> None:
        raise KeyboardInterrupt

    tasks = [Task("long", lambda: ended.wait(PATIENCE_S) or None), Task("a", interrupted)]
    with pytest.raises(KeyboardInterrupt):
        run_graph(tasks, 2, ended.set, thread_pool(2))
    assert ended.is_set()
