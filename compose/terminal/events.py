"""`--json-lines`: what happens in a run as JSON objects, one a line (docs/progress.md has each)."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from compose.errors import ComposeError
from compose.execution.runner import RunResult
from compose.terminal.stopping import exit_code, resuming_command


class JsonLines:
    """Writes events to a stream, each whole and at once. Safe to call from any thread."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event; floats are rounded to six digits."""
        shown = {
            name: float(f"{value:.6g}") if isinstance(value, float) else value
            for name, value in fields.items()
        }
        with self._lock:
            self._stream.write(json.dumps({"event": event} | shown) + "\n")
            self._stream.flush()


@contextmanager
def reported(events: JsonLines | None) -> Iterator[None]:
    """Emit `error` or `interrupted` for what ends the run inside the block, and let it pass on."""
    try:
        yield
    except ComposeError as error:
        if events is not None:
            events.emit("error", message=str(error), exit_code=error.exit_code)
        raise
    except KeyboardInterrupt as stop:
        if events is not None:
            events.emit("interrupted", exit_code=exit_code(stop), resume=resuming_command())
        raise


def result_event(result: RunResult) -> dict[str, Any]:
    """The fields of a run's last event: how it ended, cell by cell, and where its files are."""
    root = result.folder.root
    cells = []
    for cell in result.results.cells:
        verdict = getattr(cell, "verdict", None)
        cells.append(
            {
                "cell": cell.name,
                "status": cell.status,
                "reason": cell.reason,
                "verdict": None if verdict is None else verdict.verdict,
                "why": None if verdict is None else verdict.why,
            }
        )
    return {
        "run": result.results.run,
        "exit_code": result.exit_code,
        "worked": result.worked,
        "cells": cells,
        "results": str(root / "results.json"),
        "report": str(root / "report.html"),
    }
