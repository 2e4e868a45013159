"""The process of one replica: `python -m compose.serve.replica`, started by `replicas`.

It reads one line of JSON from stdin, {"settings", "replica", "cores", "counts"}, writes one line to
stdout when it serves or cannot, and ends when stdin is closed: then its parent has ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from compose.errors import ComposeError
from compose.extras import leave_out_torchao
from compose.serve.port import bound_socket
from compose.serve.settings import from_json


def main() -> int:
    """Serve until SIGTERM; 0, or the exit code of the error."""
    line = sys.stdin.readline()
    if not line:  # the parent ended already
        return 0
    job: dict[str, Any] = json.loads(line)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job["cores"])
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    leave_out_torchao()
    from compose.serve.server import serve_one

    try:
        settings = from_json(json.dumps(job["settings"]))
        bound = bound_socket(settings.host, settings.port, shared=True)
        counts = Path(job["counts"])
        serve_one(settings, bound, _tell("ready"), replica=job["replica"], counts=counts)
    except ComposeError as error:
        _tell("error")(str(error))
        return error.exit_code
    return 0


def _tell(kind: str) -> Any:
    def tell(text: str) -> None:
        print(json.dumps({kind: text}), flush=True)

    return tell


def _end_with_parent() -> None:
    while sys.stdin.read(1 << 10):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
