"""A server in this process, in a thread, and the model that it serves."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.serve.metrics import Metrics
from compose.serve.model import ServedModel
from compose.serve.port import bound_socket, url_of
from compose.serve.server import ModelServer, scheduler_of
from compose.serve.settings import ServeSettings


@dataclass
class Running:
    """A server that takes requests."""

    url: str
    model: ServedModel
    scheduler: Any
    server: ModelServer

    def wait(self, **counts: int) -> Any:
        """A snapshot with these counts, which come within 20 seconds."""
        for _ in range(2000):
            snapshot = self.scheduler.snapshot()
            if all(getattr(snapshot, name) == count for name, count in counts.items()):
                return snapshot
            time.sleep(0.01)
        raise AssertionError(f"{counts} never came: {snapshot}")


@contextlib.contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Running]:
    """A server on a free port of this machine."""
    given = ServeSettings(folder=folder, port=0, **settings)
    model = ServedModel(given)
    scheduler = scheduler_of(model)
    server = ModelServer(given, model, scheduler, Metrics())
    bound, ready = bound_socket("127.0.0.1", 0), threading.Event()
    url = url_of(bound)
    thread = threading.Thread(target=server.run_on, args=(bound, ready.set))
    thread.start()
    try:
        assert ready.wait(30)
        yield Running(url, model, scheduler, server)
    finally:
        server.drain()
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def without_end(folder: Path) -> Path:
    """A copy of a model that has no end token: its answers are as long as they may be."""
    target = folder.with_name(f"{folder.name}-endless")
    shutil.copytree(folder, target, dirs_exist_ok=True)
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        values = json.loads((target / file).read_text())
        for name in ("eos_token_id", "eos_token"):
            values.pop(name, None)
        (target / file).write_text(json.dumps(values))
    return target
