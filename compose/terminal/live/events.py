"""`--json-lines`: what happens in a run as JSON objects, one a line (docs/progress.md has each)."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from compose.run.runner import RunResult
from compose.terminal.live.messages import message_and_code
from compose.terminal.live.stopping import exit_code, resuming_command


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
    except Exception as error:  # also one that nobody foresaw: a last line is promised
        if events is not None:
            message, code = message_and_code(error)
            events.emit("error", message=message, exit_code=code)
        raise
    except KeyboardInterrupt as stop:
        if events is not None:
            events.emit("interrupted", exit_code=exit_code(stop), resume=resuming_command())
        raise


def last_line(result: RunResult) -> dict[str, Any]:
    """The fields of the `result` line that a run without `--json-lines` ends with: `result_event`
    with counts, and the names of what failed, for `cells`."""
    event = result_event(result)
    cells = event.pop("cells")
    return event | {
        "measured": sum(cell["status"] == "ok" for cell in cells),
        "failed": [cell["cell"] for cell in cells if cell["status"] == "failed"],
    }


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
