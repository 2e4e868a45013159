"""Work whose worker was taken away, tried again: a node that went, a process that was killed.

What a worker raised, a crash of its own and a limit that it hit are results. Being taken away is
none, so an executor of many machines starts the work again, on another one where there is one, and
a step goes on from its checkpoint. The number of attempts is bounded: work that needs more memory
than any node has is killed on each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from compose.errors import WorkerLost
from compose.processes.endings import ending_of
from compose.processes.failures import first_line
from compose.run.board import Line
from compose.run.state import RunState

Made = TypeVar("Made")


def attempted(run: RunState, name: str, line: Line, work: Callable[[], Made]) -> Made:
    """What `work` returns, begun again while its worker is taken away, up to the executor's bound.

    Raises as `work`; the last error where every attempt was lost.
    """
    most = run.workers.executor.attempts
    for attempt in range(1, most + 1):
        try:
            return work()
        except WorkerLost as error:
            if attempt == most or not ending_of(error).from_outside:
                raise
            run.board.print(f"! {name}, attempt {attempt} of {most}: {first_line(error)}")
            line.update(0, 1, f"attempt {attempt + 1} of {most}")
    raise AssertionError("an executor allows one attempt at least")
