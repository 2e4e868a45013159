"""Workers as processes: messages, logs, and that none of them outlives its parent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import psutil
import pytest
from jobs import write_idle_job

from compose.contract import AnswerJob, ProbeJob, Role, write_job
from compose.errors import ArtifactError, StepError, UserError
from compose.processes import fork_server, worker_process
from compose.processes.executors import make_executor
from compose.processes.fork_server import ForkedProcess, ForkServer
from compose.processes.worker_process import (
    LocalWorker,
    StartProcess,
    Worker,
    ask_once,
    await_answer,
    start_process,
    worker_environment,
)
from compose.workers.main import ROLES

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "helpers"))),
}


def soon(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether the condition comes true within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def forks() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(params=["imports", "forked"])
def start(request: pytest.FixtureRequest, forks: ForkServer) -> StartProcess:
    """How a worker's process is started."""
    return start_process if request.param == "imports" else forks.start


def idle_cell(folder: Path, start: StartProcess = start_process) -> LocalWorker:
    """A worker of role `cell`: it imports nothing heavy and waits for commands."""
    job = folder / "job.json"
    write_idle_job(job)
    return LocalWorker("cell", job, folder / "logs" / "cell.log", 3, start=start)


def group_of(worker: LocalWorker) -> list[int]:
    """The worker's processes: itself and its guard."""
    leader = worker.process.pid
    assert soon(lambda: len(psutil.Process(leader).children()) == 1)
    return [leader, *(child.pid for child in psutil.Process(leader).children())]


def test_an_answer_is_data_and_so_is_an_error(tmp_path: Path, start: StartProcess) -> None:
    worker = idle_cell(tmp_path, start)
    worker.send({"do": "speed", "round": 0, "batch": 1})
    message = worker.receive()
    assert not message["ok"]
    assert "before it was loaded" in message["error"]
    assert message["kind"] == "StepError"
    assert "Traceback" in message["traceback"]
    worker.send({"do": "quit"})
    with pytest.raises(StepError, match="exit code 0"):
        worker.receive()
    worker.stop()


def test_stop_ends_the_whole_group_and_may_be_called_twice(
    tmp_path: Path, start: StartProcess
) -> None:
    worker = idle_cell(tmp_path, start)
    pids = group_of(worker)
    worker.stop()
    worker.stop()
    assert soon(lambda: not any(map(alive, pids)))
    worker.send({"do": "load"})  # to a dead worker: no error
    with pytest.raises(StepError):
        worker.receive()


def test_the_error_of_a_killed_worker_has_its_signal_and_the_end_of_its_log(
    tmp_path: Path, start: StartProcess
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "cell.log").write_text("from an earlier run\n")
    worker = idle_cell(tmp_path, start)
    pids = group_of(worker)
    assert soon(lambda: "--- cell" in (tmp_path / "logs" / "cell.log").read_text())
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(StepError) as caught:
        worker.receive()
    message = str(caught.value)
    assert "SIGKILL" in message
    assert "--- cell" in message
    assert "earlier run" not in message
    assert soon(lambda: not any(map(alive, pids)))


LIGHT = """
from compose.workers import fork_server
fork_server.import_libraries = fork_server.set_threads = lambda *_: None
fork_server.run()
"""
"""A fork server that imports no library, which takes ten seconds on a busy machine."""

PARENT = """
import sys, time
from pathlib import Path
from compose.processes import fork_server
from compose.processes.executors import LocalExecutor
from jobs import write_idle_job
folder = Path(sys.argv[1])
fork_server.SERVER = [sys.executable, "-c", sys.argv[2]]
write_idle_job(folder / "job.json")
worker = LocalExecutor().start("cell", folder / "job.json", folder / "cell.log")
worker.send({"do": "speed", "round": 0, "batch": 1})
worker.receive()
print(worker.process.pid, flush=True)
time.sleep(600)
"""


def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), LIGHT],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    pids = [worker, *(child.pid for child in psutil.Process(worker).children())]
    assert len(pids) == 2, "the worker and its guard"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert soon(lambda: not any(map(alive, pids)))


# What a stage may do: start a program, fork a child that keeps every pipe open, then block.
FAMILY = """
import os, subprocess, sys, time
from compose.workers.protocol import die_with_parent
from compose.workers.protocol import Channel
if sys.argv[1] == "without":
    import ctypes  # the guard alone, as where the kernel offers nothing
    ctypes.CDLL = lambda *a, **k: type("none", (), {"prctl": staticmethod(lambda *a: 0)})
die_with_parent(os.getppid())
channel = Channel()
program = subprocess.Popen(["sleep", "600"])
forked = os.fork()
if forked == 0:
    time.sleep(600)
channel.send({"pids": [os.getpid(), program.pid, forked]})
time.sleep(600)
"""


@pytest.mark.parametrize("kernel", ["with", "without"])
def test_what_a_worker_started_dies_with_the_parent_too(kernel: str) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", FAMILY, kernel],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    assert worker.stdout is not None
    assert worker.stdin is not None
    pids = json.loads(worker.stdout.readline())["pids"]
    assert all(map(alive, pids))
    worker.stdin.close()  # what a parent's death does
    worker.wait(timeout=60)
    worker.stdout.close()
    assert soon(lambda: not any(map(alive, pids)))


def test_a_worker_that_died_beside_a_forked_child_does_not_keep_us_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = [sys.executable, "-c", FAMILY, "with"]
    monkeypatch.setattr(worker_process, "worker_command", lambda role, job: family)
    worker = idle_cell(tmp_path)
    pids = worker.receive()["pids"]
    os.kill(pids[0], signal.SIGKILL)  # the forked child still holds the pipe open
    with pytest.raises(StepError, match="SIGKILL"):
        worker.receive()
    assert soon(lambda: not any(map(alive, pids)))


PRINTING = """
import os, sys
from compose.workers.protocol import Channel
channel = Channel()
print("from Python")
os.system("echo from a program")
os.write(1, b"from C\\n")
print("to stderr", file=sys.stderr)
assert sys.stdin.read() == "", "nobody else may read commands"
channel.send({"commands": [command["n"] for command in channel.receive()]})
"""


def test_what_libraries_print_goes_to_the_log_and_messages_go_to_the_pipe() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINTING],
        input='{"n": 1}\n{"n": 2}\n',
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=True,
    )
    assert json.loads(done.stdout) == {"commands": [1, 2]}
    for printed in ("from Python", "from a program", "from C", "to stderr"):
        assert printed in done.stderr


def test_the_environment_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    assert worker_environment(None)["OMP_NUM_THREADS"] == "7"
    environment = worker_environment(2)
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "2"
    assert environment["PYTHONPATH"].split(os.pathsep) == ["/somewhere", str(ROOT)]
    assert environment.get("HF_HUB_OFFLINE") == os.environ.get("HF_HUB_OFFLINE"), "not forced"


def open_sockets(pid: int) -> list[str]:
    opened = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            opened.append(os.readlink(descriptor))
    return [name for name in opened if name.startswith("socket:")]


def test_a_forked_worker_has_what_it_was_started_with(
    forks: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "probe.json"
    role = write_job(job, ProbeJob())
    monkeypatch.chdir(tmp_path)
    worker = LocalWorker(role, job, tmp_path / "log", 3, start=forks.start)
    assert worker.receive()["threads"] == 3
    assert psutil.Process(worker.process.pid).cwd() == str(tmp_path)
    assert os.getsid(worker.process.pid) == worker.process.pid
    assert not open_sockets(worker.process.pid), "the fork server's is closed"
    worker.stop()
    assert worker.process.returncode == -signal.SIGTERM


def test_workers_start_where_the_fork_server_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "SERVER", [sys.executable, "-c", LIGHT])
    forks = ForkServer()
    worker = idle_cell(tmp_path, forks.start)
    assert isinstance(worker.process, ForkedProcess)
    assert forks._server is not None
    forks._server.kill()
    worker.send({"do": "speed"})
    assert not worker.receive()["ok"], "what was forked goes on"
    worker.stop()
    worker = idle_cell(tmp_path, forks.start)
    assert isinstance(worker.process, subprocess.Popen)
    worker.stop()
    forks.close()


def test_a_folder_named_compose_where_the_user_stands_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "compose").mkdir()
    (tmp_path / "compose" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path)
    worker = idle_cell(tmp_path / "run")
    worker.send({"do": "speed"})
    assert not worker.receive()["ok"]
    worker.stop()


def test_a_worker_raises_here_what_it_raised_there() -> None:
    class Scripted(Worker):
        def __init__(self, *messages: dict[str, object]) -> None:
            self.messages = list(messages)

        def send(self, message: dict[str, object]) -> None: ...

        def receive(self) -> dict[str, object]:
            return self.messages.pop(0)

        def stop(self) -> None: ...

    progress: list[dict[str, object]] = []
    worker = Scripted({"progress": [1, 2, ""]}, {"ok": True, "result": 7})
    assert await_answer(worker, progress.append) == 7
    assert progress == [{"progress": [1, 2, ""]}]
    refusal = {"ok": False, "error": "no such folder", "traceback": "Traceback ..."}
    with pytest.raises(ArtifactError, match="no such folder"):
        await_answer(Scripted({**refusal, "kind": "ArtifactError"}))
    with pytest.raises(StepError) as caught:
        await_answer(Scripted({**refusal, "kind": "SomethingElse"}))
    assert caught.value.__notes__ == ["Traceback ..."]


def test_every_role_is_served() -> None:
    assert {*ROLES, "cell", "chat"} == set(get_args(Role))


def test_unknown_executors_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'local'"):
        make_executor("locl", None)


def test_ray_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"gateskip-compose\[ray\]"):
        make_executor("ray", 1)


@pytest.mark.slow
def test_a_one_off_question_is_answered(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no folder"):
        ask_once(
            AnswerJob(
                folder=tmp_path / "absent",
                prompt="?",
                max_new_tokens=8,
                budget=None,
                speculate=None,
                sampling={},
                seed=0,
                stop=(),
            )
        )
