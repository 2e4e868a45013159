"""What all tests share: few threads, folders of their own, tiny models, and the one real model.

Tiny models are saved Hugging Face folders with random weights and a tokenizer trained on the spot;
they need no network. The real model is downloaded once into the cache that a user would have; a
test that asks for it is marked `real` and `slow` by itself, and such tests run last.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Before anything imports torch or the hub's client: both read these once. Files that run side by
# side share the cores, and so do processes that tests start: where threads wait for each other on
# cores that others use, a stage took nine times as long.
os.environ["OMP_NUM_THREADS"] = (
    str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    if "PYTEST_XDIST_WORKER" in os.environ
    else os.environ.get("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
from hypothesis import settings
from tiny_models import save_tiny

ROOT = Path(__file__).resolve().parents[1]

settings.register_profile(
    "repeatable", derandomize=True
)  # never red by chance; `make fuzz` draws anew
settings.load_profile("repeatable")

LONGEST = (
    "test_ray.py",
    "test_wheels.py",
    "test_chains.py",
    "test_arm.py",
    "test_end_to_end.py",
    "test_step_memory.py",
    "test_compress.py",
    "test_runner.py",
    "test_progress.py",
    "test_bench.py",
    "test_peers.py",
    "test_quantize.py",
    "test_cell_files.py",
    "test_real_scheduler.py",
    "test_speculative_distribution.py",
    "test_against_lm_eval.py",
    "test_notebook.py",
    "test_train.py",
    "test_reports.py",
    "test_report_browser.py",
)
"""Files that take from six minutes to half of one, the longest first."""


@cache
def _has_card() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the real model as `real`, and that and other engines as `slow`.

    Where files run side by side, those that take longest come first, so that none is left over.
    """
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker("real")
        if item.get_closest_marker("real") or item.get_closest_marker("peers"):
            item.add_marker("slow")
        if item.get_closest_marker("gpu") and not _has_card():
            item.add_marker(pytest.mark.skip(reason="no CUDA device: see tools/on_a_gpu.sh"))
    items.sort(key=lambda item: item.get_closest_marker("real") is not None)
    if "PYTEST_XDIST_WORKER" in os.environ:
        begun = {name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: begun.get(item.path.name, len(begun)))


KERNELS = ROOT / "build" / "kernels"
"""Compiled kernels of earlier tests. Their names say what they were built of; compiling takes eight
seconds of a core, in each process that has a cache of its own."""


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each test has its cache. pytest's own folders would be numbered, and a new number is
    found by reading the names of all before it: of thousands, each time."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def _folders_of_its_own(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caches: Path,
) -> Iterator[None]:
    """Keep a test out of the user's caches and away from local data, unless it is `real`."""
    if request.node.get_closest_marker("real") is not None:
        yield
        return
    with tempfile.TemporaryDirectory(dir=caches, ignore_cleanup_errors=True) as cache:
        native = Path(cache) / "native"
        monkeypatch.setenv("GATESKIP_CACHE", cache)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        monkeypatch.delenv("GATESKIP_DATA", raising=False)
        _share_kernels(KERNELS, native)
        yield
        _share_kernels(native, KERNELS)


def pytest_collection_finish() -> None:
    """What collecting has compiled, in the user's cache, serves the processes that tests start."""
    build = sys.modules.get("gateskip.kernels.build")
    if build is not None and build.library() is not None:
        _share_kernels(build.cache_folder(), KERNELS)


def _share_kernels(source: Path, target: Path) -> None:
    """Have the compiled kernels of one folder in another, too."""
    for file in source.glob("kernels-*.so"):
        with contextlib.suppress(OSError):  # two tests at once, or a tree that is read-only
            target.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not (target / file.name).exists():
                _link(file, target / file.name)


def _link(file: Path, name: Path) -> None:
    """Another name for a file; a copy where that lies on another disk."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copy2(file, name.with_name(f".{os.getpid()}-{name.name}"))
        name.with_name(f".{os.getpid()}-{name.name}").replace(name)


@pytest.fixture(autouse=True)
def _draws_as_alone() -> None:
    """Have a test draw the same numbers whatever ran before it in its process."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:  # torch.manual_seed also notes a call stack for CUDA: a millisecond
        sys.modules["torch"].default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _older_objects_are_not_collected() -> None:
    """Take what earlier tests imported and hold out of later collections: in a process that has
    imported everything each takes a third of a second, and gptqmodel asks for many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def accelerate_as_new() -> Iterator[None]:
    """accelerate as a new process has it: one process trains with one precision."""
    _reset_accelerate()  # fixtures of a whole file train before this one
    yield
    _reset_accelerate()


def _reset_accelerate() -> None:
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def licence_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with this project's licence, a paragraph a line: some English to train on."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (ROOT / "LICENSE").read_text().splitlines()
    file.write_text("\n\n".join(line.strip() for line in lines if line.strip()))
    return file


def _kept_tiny(key: str) -> Path | None:
    """A tiny model that is kept over sessions, where `GATESKIP_TINY_MODELS` names a folder.

    Mutation testing runs a session for each mutant, and most of them would build a model.
    """
    kept = os.environ.get("GATESKIP_TINY_MODELS")
    if not kept:
        return None
    family, seed, overrides = json.loads(key)
    folder = Path(kept) / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not folder.exists():
        temporary = folder.with_name(f"{folder.name}-{os.getpid()}")
        save_tiny(temporary, family, seed, **overrides).rename(folder)
    return folder


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_tiny("llama", num_hidden_layers=6)`: the folder of such a model, made once a session.

    Folders are shared by all tests, so a test that changes one copies it first.
    """
    made: dict[str, Path] = {}

    def make(family: str, seed: int = 0, **overrides: Any) -> Path:
        key = json.dumps([family, seed, overrides], sort_keys=True)
        if key not in made:
            made[key] = _kept_tiny(key) or save_tiny(
                tmp_path_factory.mktemp(f"tiny-{family}"), family, seed, **overrides
            )
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_job() -> Callable[..., Any]:
    """`make_job(source, target, train=spec)`: a stage's job, in float32, scratch beside it."""
    from compose.stages.registry import StageJob

    def make(source: Path, target: Path, **given: Any) -> StageJob:
        usual: dict[str, Any] = {
            "seed": 0,
            "dtype": "float32",
            "train": None,
            "calibration": None,
            "dense": source,
            "progress": lambda done, total, phase, **_: None,
            "work": target.with_name(f"{target.name}-work"),
            "asset_cache": target.with_name("cache"),
        }
        return StageJob(source=source, target=target, **usual | given)

    return make


@pytest.fixture(scope="session")
def grid_folder(
    make_job: Callable[..., Any], licence_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`grid_folder(source, "int4", embedding=6)`: what that stage makes of a folder, made once."""
    from compose.stages.registry import STAGES, DataSpec

    made: dict[str, Path] = {}

    def make(source: Path, use: str, **settings: Any) -> Path:
        key = json.dumps([str(source), use, settings], sort_keys=True)
        if key not in made:
            target = tmp_path_factory.mktemp(use) / "model"
            target.mkdir()
            text = DataSpec(source=str(licence_text), limit=4, length=64)
            stage = STAGES[use].model_validate({"use": use, "compensate": False, **settings})
            stage.run(make_job(source, target, calibration=text))
            made[key] = target
        return made[key]

    return make


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """Nothing is recorded for a backward pass, as while decoding."""
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def tiny_llama(make_tiny: Callable[..., Path]) -> Path:
    """Four Llama layers, hidden 64, grouped-query attention, tied embeddings as in SmolLM2."""
    return make_tiny("llama")


@pytest.fixture(scope="session")
def tiny_qwen2(make_tiny: Callable[..., Path]) -> Path:
    """Four Qwen2 layers: biases on q, k and v, untied embeddings."""
    return make_tiny("qwen2")


@pytest.fixture(scope="session")
def tiny_gemma2(make_tiny: Callable[..., Path]) -> Path:
    """Four Gemma2 layers: norms after the branches, alternating windows, softcapped logits."""
    return make_tiny("gemma2")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched once into the user's own cache."""
    from compose.assets import default_cache, resolve_model

    return resolve_model("smollm2-135m-instruct", default_cache()).path
