"""Runs and replicas on a Ray cluster: what is asked of it, and what comes out where workers and
nodes go.

The last tests start a head and two further nodes on this machine, as processes of their own, and
compare the run with a local one, and the answers with those of `generate`. They are skipped where
the package ray is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import chaos
import httpx
import openai
import psutil
import pytest
from jobs import write_idle_job
from prometheus_client.parser import text_string_to_metric_families
from serving import without_end

from compose.contract import Allowed, Needs
from compose.errors import StepError, UserError, WorkerLost
from compose.processes.endings import Ending, ending_of, lost
from compose.processes.executors import make_executor
from compose.processes.ray_nodes import SPEED
from compose.serve.port import bound_socket

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_S = 900.0


# --- What is asked, on a cluster that is pretended ----------------------------------------------


class RayError(Exception):
    """As Ray's own."""


class RayTaskError(RayError):
    """What an actor raised."""

    cause: Exception


class PretendedRay:
    """As much of Ray as placing asks for: nodes, and actors that are only noted."""

    exceptions = types.SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, *nodes: dict[str, float]) -> None:
        self._nodes = nodes
        self.asked: list[dict[str, Any]] = []
        self.processors: dict[str, str] = {}
        self.arguments: list[tuple[Any, ...]] = []
        self.util = self
        self.scheduling_strategies = self

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": f"n{number}", "Alive": True, "Resources": resources}
            for number, resources in enumerate(self._nodes)
        ]

    def NodeAffinitySchedulingStrategy(self, node: str, *, soft: bool) -> tuple[str, bool]:
        return node, soft

    def get_runtime_context(self) -> Any:
        return type("Context", (), {"get_node_id": lambda _: "driver"})()

    def remote(self, *arguments: Any) -> Any:
        self.arguments.append(arguments)
        return self

    def get(self, _: Any) -> dict[str, Any]:
        """The environment of the node that was asked last."""
        node, _ = self.asked[-1]["scheduling_strategy"]
        return {"processor": self.processors[node], "threads": 2}

    def options(self, **options: Any) -> Any:
        self.asked.append(options)
        return self


def executor_on(*nodes: dict[str, float], threads: int = 2) -> tuple[Any, PretendedRay]:
    from compose.processes.ray_executor import RayExecutor

    executor = RayExecutor.__new__(RayExecutor)
    executor.ray = ray = PretendedRay(*nodes)
    executor.threads = executor.timed_threads = threads
    executor._left = {}
    return executor, ray


SMALL = {"CPU": 2.0, "memory": 4e9}
LARGE = {"CPU": 8.0, "memory": 64e9, "GPU": 1.0}


@pytest.mark.parametrize(
    ("needs", "nodes", "asked"),
    [
        (Needs(), [SMALL], {"num_cpus": 2}),
        (Needs(memory=3_000_000_000), [SMALL], {"num_cpus": 2, "memory": 3_000_000_000}),
        (Needs(gpu=True), [SMALL, LARGE], {"num_cpus": 2, "num_gpus": 1}),
        (Needs(gpu=True), [SMALL], {"num_cpus": 2}),
        (Needs(), [LARGE], {"num_cpus": 2}),
    ],
    ids=["cpus", "memory", "gpu", "no-gpu-there", "gpu-not-needed"],
)
def test_a_step_asks_for_what_it_needs(
    needs: Needs, nodes: list[dict[str, float]], asked: dict[str, Any], tmp_path: Path
) -> None:
    executor, ray = executor_on(*nodes)
    executor.start("step", tmp_path / "a.json", tmp_path / "a.log", needs)
    assert {
        k: v for k, v in ray.asked[-1].items() if k.startswith("num_") or k == "memory"
    } == asked


def test_a_worker_that_is_timed_runs_where_the_run_does(tmp_path: Path) -> None:
    executor, ray = executor_on(SMALL)
    executor.start("cell", tmp_path / "a.json", tmp_path / "a.log", Needs(here=True, memory=10**15))
    assert ray.asked[-1]["scheduling_strategy"] == ("driver", False)
    assert ray.asked[-1]["num_cpus"] == 0


def start_timed(executor: Any, folder: Path) -> str:
    """The node on which a timed worker is started."""
    executor.start("cell", folder / "a.json", folder / "a.log", Needs(here=True))
    node, soft = executor.ray.asked[-1]["scheduling_strategy"]
    assert not soft, "there or nowhere"
    return str(node)


MARKED = SMALL | {SPEED: 1.0}
MARKED_A100 = LARGE | {SPEED: 1.0, "accelerator_type:A100": 1.0}


def test_cells_are_timed_on_one_marked_node_and_then_on_another_of_its_kind(tmp_path: Path) -> None:
    executor, ray = executor_on(SMALL, MARKED, MARKED)
    ray.processors = {"n1": "EPYC", "n2": "EPYC"}
    assert [start_timed(executor, tmp_path) for _ in range(2)] == ["n1", "n1"]
    assert executor.environment(2) == {"processor": "EPYC", "threads": 2}
    ray._nodes = (SMALL, SMALL, MARKED)
    assert start_timed(executor, tmp_path) == "n2"
    ray._nodes, ray.processors["n3"] = (SMALL, SMALL, SMALL, MARKED), "Xeon"
    with pytest.raises(StepError, match="the kind EPYC, and none is left"):
        start_timed(executor, tmp_path)
    ray._nodes = (SMALL,)
    with pytest.raises(StepError, match="the kind EPYC, and none is left"):
        start_timed(executor, tmp_path)


@pytest.mark.parametrize(
    ("nodes", "processors", "told"),
    [
        ([MARKED, MARKED], ["EPYC", "Xeon"], r"2 kinds.*EPYC \(1 nodes\); Xeon \(1 nodes\)"),
        ([MARKED, MARKED_A100], ["EPYC", "EPYC"], "EPYC with A100"),
    ],
    ids=["processor", "accelerator"],
)
def test_nodes_of_two_kinds_are_not_timed_on(
    nodes: list[dict[str, float]], processors: list[str], told: str, tmp_path: Path
) -> None:
    executor, ray = executor_on(*nodes)
    ray.processors = {f"n{number}": each for number, each in enumerate(processors)}
    with pytest.raises(UserError, match=told):
        start_timed(executor, tmp_path)


def test_limits_travel_to_the_worker(tmp_path: Path) -> None:
    executor, ray = executor_on(SMALL)
    allowed = Allowed(5.0, 10, "limits.step")
    executor.start("step", tmp_path / "a.json", tmp_path / "a.log", Needs(allowed=allowed))
    assert ray.arguments[-1][-1] == allowed


@pytest.mark.parametrize(
    ("needs", "threads"), [(Needs(memory=5_000_000_000), 2), (Needs(), 4)], ids=["memory", "cpus"]
)
def test_what_no_node_has_is_refused_and_not_waited_for(
    needs: Needs, threads: int, tmp_path: Path
) -> None:
    executor, _ = executor_on(SMALL, threads=threads)
    with pytest.raises(StepError, match="no node of the Ray cluster has"):
        executor.start("step", tmp_path / "a.json", tmp_path / "a.log", needs)


def test_the_next_attempt_goes_to_another_node(tmp_path: Path) -> None:
    executor, ray = executor_on(SMALL, SMALL, LARGE)
    job = tmp_path / "a.json"
    executor.note_lost(job, "n0")
    executor.start("step", job, tmp_path / "a.log")
    assert ray.asked[-1]["scheduling_strategy"] == ("n1", True)
    executor.note_lost(job, "n1")
    executor.start("step", job, tmp_path / "a.log")
    assert ray.asked[-1]["scheduling_strategy"] == ("n2", True)
    executor.note_lost(job, "n2")
    executor.start("step", job, tmp_path / "a.log")
    assert "scheduling_strategy" not in ray.asked[-1], "none is left: anywhere"
    executor.start("step", tmp_path / "other.json", tmp_path / "a.log")
    assert "scheduling_strategy" not in ray.asked[-1]


def test_what_ended_a_worker_comes_over_from_its_node(tmp_path: Path) -> None:
    from compose.processes.ray_executor import RayWorker

    executor, ray = executor_on(SMALL)
    worker = RayWorker(executor, ray, tmp_path / "a.json")
    worker.node = "n0"
    error = RayTaskError()
    error.cause = lost(Ending(signal="SIGKILL", most_bytes=7))

    def raises(each: Exception) -> Callable[..., Any]:
        def get(*_: Any, **__: Any) -> Any:
            raise each

        return get

    ray.get = raises(error)  # type: ignore[attr-defined]
    with pytest.raises(WorkerLost, match="killed by SIGKILL") as caught:
        worker._call(ray)
    assert ending_of(caught.value) == Ending(signal="SIGKILL", most_bytes=7)
    ray.get = raises(RayError("the actor died"))  # type: ignore[attr-defined]
    with pytest.raises(WorkerLost, match="lost with its node") as caught:
        worker._call(ray)
    assert ending_of(caught.value) == Ending(node="n0", node_lost=True)
    assert "memory" not in str(caught.value), "nothing is guessed"
    assert executor._left == {tmp_path / "a.json": {"n0"}}


# Beside the clusters below in one file, hence in one process: Ray joins the cluster that it finds.
@pytest.mark.slow
def test_the_same_worker_runs_under_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    executor = make_executor("ray", 1)
    try:
        write_idle_job(tmp_path / "job.json")
        for here in (False, True):
            worker = executor.start(
                "cell", tmp_path / "job.json", tmp_path / "log", Needs(here=here)
            )
            worker.send({"do": "speed", "round": 0, "batch": 1})
            assert "before it was loaded" in worker.receive()["error"]
            worker.send({"do": "quit"})
            with pytest.raises(StepError, match="exit code 0"):
                worker.receive()
            worker.stop()
            worker.stop()
    finally:
        executor.close()


# --- A cluster of three nodes, here --------------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without cores, and two nodes with one each, the second marked for speed."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default other tests take most of the time
    # A head that went stays away.
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    made = start_cluster()
    try:
        yield made
    finally:
        made.shutdown()


def start_cluster(attempts: int = 3) -> Any:
    """The head and two nodes. Ray gives a node 30 s to start, which a busy machine exceeds."""
    from ray.cluster_utils import Cluster

    sizes = {"object_store_memory": 80_000_000, "memory": 4_000_000_000}
    marked: dict[str, Any] = {"resources": {SPEED: 1}}
    made = Cluster()
    try:
        made.add_node(num_cpus=0, include_dashboard=False, **sizes)
        made.workers = [made.add_node(num_cpus=1, **sizes, **more) for more in ({}, marked)]
        made.wait_for_nodes()
    except Exception as error:
        made.shutdown()
        if attempts == 1 or "timed out during startup" not in str(error):
            raise
        return start_cluster(attempts - 1)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> chaos.Chaos:
    """The pipeline of chaos, and what it gives where nothing goes."""
    return chaos.Chaos(tmp_path_factory.mktemp("whole"), 0, 1.0)


class Run:
    """`gateskip run --executor ray` on the pipeline of chaos, as a process of its own."""

    def __init__(self, whole: Any, out: Path, address: str, *more: str) -> None:
        self.whole, self.out = whole, out
        os.environ["RAY_ADDRESS"] = address
        try:
            self.process = whole.start(out, "--executor", "ray", "--retry-failed", *more)
        finally:
            del os.environ["RAY_ADDRESS"]

    def at_worker(self, role: str, part: str, do: Callable[[psutil.Process], Any]) -> Any:
        """What `do` gives for the worker of a job whose file has `part` in its name, once it runs:
        for the next one where it ends meanwhile."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            assert self.process.poll() is None, self.process.communicate()
            for each in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    words = each.cmdline()
                    job = Path(words[-1]) if words else Path()
                    ours = "compose.workers.main" in words and job.is_relative_to(self.out)
                    if ours and words[-2] == role and part in job.name:
                        return do(each)
            time.sleep(0.05)
        raise AssertionError(f"no worker {role} {part}")

    def finish(self) -> str:
        told, _ = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0, told
        return str(told)


@pytest.mark.slow
def test_a_matrix_on_a_cluster_that_falls_apart_ends_like_a_local_one(
    whole: chaos.Chaos, cluster: Any, tmp_path: Path
) -> None:
    out = tmp_path / "ray"
    _ends_although_workers_and_a_node_go(whole, cluster, out)
    steps = chaos.stored(out)
    _is_measured_elsewhere_where_the_cluster_goes(whole, cluster, out)
    assert chaos.stored(out) == steps, "finished steps are not made again"


def _ends_although_workers_and_a_node_go(whole: chaos.Chaos, cluster: Any, out: Path) -> None:
    run = Run(whole, out, cluster.address)
    run.at_worker("step", "gates", psutil.Process.kill)
    run.at_worker("cell", "cell-", psutil.Process.status)
    cluster.remove_node(cluster.workers[0], allow_graceful=False)
    run.at_worker("cell", "cell-", psutil.Process.kill)
    parents = run.at_worker("cell", "speed-", psutil.Process.parents)
    (raylet,) = cluster.workers[1].all_processes["raylet"]
    assert raylet.process.pid in {parent.pid for parent in parents}, "the marked node"
    told = run.finish()
    assert "attempt 1 of 3" in told and "SIGKILL" in told
    assert chaos.differences(whole.wanted, chaos.comparable(out)) == []
    assert chaos.left_files(out, whole.folder / "scratch") == []


def _is_measured_elsewhere_where_the_cluster_goes(
    whole: chaos.Chaos, cluster: Any, out: Path
) -> None:
    run = Run(whole, out, cluster.address, "--again")
    run.at_worker("cell", "cell-", psutil.Process.status)
    cluster.remove_node(cluster.head_node, allow_graceful=False)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.process.wait(timeout=180)
    if run.process.poll() is None:
        run.process.send_signal(signal.SIGTERM)
    run.process.communicate(timeout=120)
    assert run.process.returncode != 0
    code, told = whole.finish(out, "--retry-failed")
    assert code == 0, told
    assert chaos.differences(whole.wanted, chaos.comparable(out)) == []


# --- Replicas on this cluster ---------------------------------------------------------------------


@pytest.mark.slow
def test_settings_of_replicas_are_read_from_text(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray.serve")
    from compose.serve.ray import ClusterSettings, cluster_settings

    monkeypatch.setenv("GATESKIP_API_KEY", "secret")
    given = {"folder": str(tiny_llama), "replicas": "2", "threads": "3", "speculate": "false"}
    assert cluster_settings(given) == ClusterSettings(
        folder=tiny_llama.resolve(), replicas=2, threads=3, speculate=False, api_key="secret"
    )
    monkeypatch.chdir(tiny_llama.parent)
    relative = cluster_settings({"folder": tiny_llama.name, "budget": 0.8, "api_key": "other"})
    assert relative.folder == tiny_llama.resolve()
    assert (relative.budget, relative.api_key) == (0.8, "other")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"port": "80"}, r"port is a setting of Ray Serve\n.*--http-port"),
        ({"max_row": "4"}, r"unknown argument 'max_row'; did you mean 'max_rows'"),
        ({"max_rows": "many"}, r"^max_rows: .*integer"),
        ({"replicas": "0"}, r"replicas is 0\n.*1 or more"),
        ({"threads": "0"}, r"threads is 0\n.*1 or more"),
        ({"folder": "none"}, r"no folder none\n.*all machines"),
        ({"folder": "a.gguf"}, r"GGUF file"),
        ({"folder": None}, r"folder: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_of_replicas_is_named(
    wrong: dict[str, Any], message: str, tiny_llama: Path
) -> None:
    pytest.importorskip("ray.serve")
    from compose.serve.ray import deployment

    with pytest.raises(UserError, match=message):
        deployment({"folder": str(tiny_llama), **wrong})
    with pytest.raises(UserError, match=r"no model is named\n.*folder=DIR"):
        deployment({})


def test_counts_of_a_replica_that_ended_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.serve")
    from compose.serve.ray import OLD_S, ReplicaCounts

    counts, now = ReplicaCounts(), time.monotonic()
    asyncio.run(counts.exchange("a", {"rows": 1}))
    both = asyncio.run(counts.exchange("b", {"rows": 2}))
    assert both == {"a": {"rows": 1}, "b": {"rows": 2}}
    monkeypatch.setattr(time, "monotonic", lambda: now + 2 * OLD_S)
    assert asyncio.run(counts.exchange("b", {"rows": 3})) == {"b": {"rows": 3}}


KEY = "secret"
ROWS, QUEUE = 3, 1
MESSAGES: Any = [{"role": "user", "content": "What is a licence?"}]


class OnRay:
    """Two replicas, each on a node of its own, and a client that does not try again."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=300)
        self._ask: Any = self.client.chat.completions.create

    def chat(self, **more: Any) -> Any:
        return self._ask(model=self.folder.name, messages=MESSAGES, **more)

    def patient_chat(self, tokens: int) -> Any:
        """An answer by a client that asks again where a queue is full."""
        patient = self.client.with_options(max_retries=8)
        return patient.chat.completions.create(
            model=self.folder.name, messages=MESSAGES, max_tokens=tokens
        )

    def counts(self, metric: str) -> dict[str, float]:
        """A metric of each replica."""
        headers = {"authorization": f"Bearer {KEY}"}
        text = httpx.get(f"{self.url}/metrics", headers=headers, timeout=60).text
        return {
            sample.labels["replica"]: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == metric
        }

    def wait(self, metric: str, is_right: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """A metric of each replica, once it is right."""
        end = time.monotonic() + PATIENCE_S
        counts: Any = None
        while time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError, ValueError):
                if is_right(counts := self.counts(metric)):
                    return counts
            time.sleep(0.2)
        raise AssertionError(f"{metric}: {counts}")


@pytest.fixture
def patient_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, Ray's proxy takes longer to start than Ray waits by itself."""
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "300")
    monkeypatch.setenv("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "300")


@pytest.fixture
def on_ray(
    patient_ray: None, cluster: Any, make_tiny: Callable[..., Path], tmp_path: Path
) -> Iterator[OnRay]:
    """`serve run compose.serve.ray:deployment` on the cluster."""
    pytest.importorskip("ray.serve")
    folder = without_end(make_tiny("llama", max_position_embeddings=16384))
    with bound_socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    serve = str(Path(sys.executable).with_name("serve"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GATESKIP_API_KEY": KEY}
    environment["RAY_ADDRESS"] = cluster.address
    start = [serve, "start", "--http-port", str(port), "--proxy-location", "HeadOnly"]
    subprocess.run(start, check=True, env=environment)
    arguments = [f"folder={folder}", "replicas=2", f"max_rows={ROWS}", f"max_queue={QUEUE}"]
    arguments += ["max_context=16000", "max_body_kb=64", "cache_mb=500"]
    log = tmp_path / "serve.log"
    with log.open("w") as output:
        run = subprocess.Popen(
            [serve, "run", "compose.serve.ray:deployment", *arguments],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    served = OnRay(f"http://127.0.0.1:{port}", folder)
    try:
        served.wait("gateskip_running_requests", lambda counts: len(counts) == 2)
        yield served
    finally:
        print(log.read_text())
        run.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):  # Ray's own program, on a busy machine
            run.wait(15)
        run.kill()
        run.wait()


def replica_processes() -> list[psutil.Process]:
    """The processes of the replicas, which Ray names."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "ServeReplica:default:gateskip" in " ".join(process.cmdline()):
                found.append(process)
    return found


def expected_text(folder: Path, tokens: int, **settings: Any) -> str:
    """The text of the tokens of `Decoder.generate`."""
    from compose.bench.generate import answer_text, chat_ids, open_decoder

    decoder, _ = open_decoder(folder)
    ids = chat_ids(decoder.tokenizer, MESSAGES)
    return answer_text(decoder.tokenizer, decoder.generate([ids], tokens, **settings).tokens[0])


@pytest.mark.slow
def test_two_replicas_answer_as_generate_and_one_may_be_killed(on_ray: OnRay) -> None:
    _both_answer_as_generate(on_ray)
    _mistakes_are_named(on_ray)
    _a_full_queue_refuses(on_ray)
    _a_killed_replica_loses_only_its_requests(on_ray)


def _both_answer_as_generate(on_ray: OnRay) -> None:
    from gateskip.decoding.sampling import Sampler

    greedy = expected_text(on_ray.folder, 24)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: on_ray.patient_chat(24), range(12)))
    assert {answer.choices[0].message.content for answer in answers} == {greedy}
    tokens = on_ray.wait("gateskip_generated_tokens_total", lambda n: sum(n.values()) == 12 * 24)
    assert len(tokens) == 2 and all(tokens.values()), "both replicas answered"
    drawn = on_ray.chat(max_tokens=24, temperature=1.0, seed=7)
    sampler = Sampler(temperature=1.0)
    assert drawn.choices[0].message.content == expected_text(
        on_ray.folder, 24, sampler=sampler, seed=7
    )
    parts = list(on_ray.chat(max_tokens=3900, stream=True))  # seconds: chunks are 50 ms apart
    assert "".join(part.choices[0].delta.content or "" for part in parts).startswith(greedy)
    assert len(parts) > 2 and parts[-1].choices[0].finish_reason == "length"


def _mistakes_are_named(on_ray: OnRay) -> None:
    with pytest.raises(openai.AuthenticationError) as no_key:
        on_ray.client.with_options(api_key="wrong").models.list()
    assert no_key.value.code == "invalid_api_key"
    with pytest.raises(openai.BadRequestError, match="logit_bias is not supported"):
        on_ray.chat(logit_bias={"5": 1})
    with pytest.raises(openai.APIStatusError) as large:
        on_ray.client.completions.create(model=on_ray.folder.name, prompt="x" * 70_000)
    assert large.value.status_code == 413 and large.value.code == "body_too_large"


def _streams(on_ray: OnRay, count: int, tokens: int) -> tuple[list[Any], list[Exception]]:
    """Streams of long answers, and the refusals of those that two queues have no room for."""
    streams, refused = [], []
    for _ in range(count):
        try:
            streams.append(on_ray.chat(max_tokens=tokens, temperature=1.0, stream=True))
        except openai.RateLimitError as error:
            refused.append(error)
    return streams, refused


def _a_full_queue_refuses(on_ray: OnRay) -> None:
    most = 2 * (ROWS + QUEUE)
    streams, refused = _streams(on_ray, most + 4, 15_000)
    assert len(streams) <= most and len(refused) >= 4
    assert {error.code for error in refused} == {"queue_full"}  # type: ignore[attr-defined]
    for stream in streams:
        stream.close()
    on_ray.wait("gateskip_running_requests", lambda running: not any(running.values()))


def _a_killed_replica_loses_only_its_requests(on_ray: OnRay) -> None:
    streams, _ = _streams(on_ray, 4, 3900)
    running = on_ray.wait("gateskip_running_requests", lambda running: sum(running.values()) == 4)
    first, second = replica_processes()
    second.kill()
    ended = []
    for stream in streams:
        try:
            ended.append(list(stream)[-1].choices[0].finish_reason)
        except (openai.APIError, httpx.HTTPError):
            ended.append("lost")
    assert set(ended) == {"length", "lost"}
    assert ended.count("lost") in running.values()
    answer = on_ray.patient_chat(24)
    assert answer.choices[0].message.content == expected_text(on_ray.folder, 24)
    on_ray.wait("gateskip_running_requests", lambda now: len(now) == 2 and set(now) != set(running))
    assert first.is_running()
