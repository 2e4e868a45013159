"""Tiny models with gates, and schedulers that run them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from served import LIMITS, ids

import gateskip
from compose.artifacts.folder import copy_companions
from gateskip.calibration.reading import calibrate_prompts, prompt_sensitivity
from gateskip.calibration.thresholds import calibrate
from gateskip.calibration.warm_start import warm_start
from gateskip.checkpoint import GateFile, grid_of, save_gates
from gateskip.decoding.decoder import Decoder
from gateskip.kernels import autotune
from gateskip.quantization.folders import load_model
from gateskip.serving.requests import ServeLimits
from gateskip.serving.scheduler import Scheduler

BUDGETS = (0.9, 0.7, 0.5)


@pytest.fixture(autouse=True)
def our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopwatch beside other work would now and then choose the libraries' layers."""
    monkeypatch.setattr(autotune, "own_are_faster", lambda times: False)


@pytest.fixture(scope="session")
def make_decoder(
    make_tiny: Callable[..., Path],
    grid_folder: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Decoder]:
    """A tiny model with gates, by family and weights: `llama-int8`."""
    made: dict[str, Decoder] = {}

    def make(kind: str) -> Decoder:
        if kind not in made:
            source, form = make_tiny(kind.split("-")[0]), kind.split("-")[1]
            blocks = torch.tensor([ids(48, 10 + row) for row in range(6)])
            model = load_model(source, "float32")
            gates, _ = warm_start(model, blocks)
            grid, kept = grid_of(calibrate(model, gates.requires_grad_(False), blocks, BUDGETS))
            gates.prompt_sensitivity = prompt_sensitivity(model, gates, blocks[:2])
            prompts = calibrate_prompts(model, gates, blocks, BUDGETS)
            folder = tmp_path_factory.mktemp(kind) / "model"
            stored = grid_folder(source, "int8", group_size=32) if form == "int8" else source
            shutil.copytree(stored, folder)
            copy_companions(source, folder)
            save_gates(folder, GateFile(gates, "project", grid, kept, prompts=prompts))
            dtype = "float32" if form == "float32" else "bfloat16"
            made[kind] = gateskip.load(folder, dtype, "native")
        return made[kind]

    return make


@pytest.fixture
def serve() -> Iterator[Callable[..., Scheduler]]:
    """A scheduler that runs; it is closed at the end."""
    running: list[Scheduler] = []

    def make(decoder: Decoder, limits: ServeLimits = LIMITS) -> Scheduler:
        scheduler = Scheduler(decoder, limits)
        scheduler.start()
        running.append(scheduler)
        return scheduler

    yield make
    for scheduler in running:
        scheduler.close()
