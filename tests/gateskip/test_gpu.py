"""The main paths on a CUDA card: `tools/on_a_gpu.sh` runs these tests where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import cell_job
from tiny_models import save_gated

import gateskip
from gateskip.quantization.folders import load_model
from gateskip.rounding.compensate import Rounding
from gateskip.rounding.layerwise import round_layers
from gateskip.training.heal import heal
from gateskip.training.loop import training_on
from gateskip.training.recipe import HealConfig

pytestmark = pytest.mark.gpu
PROMPTS = [[5, 6, 7, 8, 9, 5, 6, 7], [11, 12, 13]]


@pytest.fixture(scope="module")
def gated(make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gated") / "model"
    return save_gated(make_tiny("llama"), folder, (0.6, 0.8), shortcuts=True)


@contextmanager
def no_questions() -> Iterator[None]:
    """Within this context a question of the host to the card is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_both(folder: Path, mode: Any, **settings: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of the card and of the CPU, in float32."""
    card, cpu = (
        gateskip.load(folder, "float32", "gathered", device=device) for device in ("cuda", "cpu")
    )
    assert card.skipping.device.type == "cuda"
    one, other = (each.generate(PROMPTS, 16, mode, **settings).tokens for each in (card, cpu))
    return one, other


def test_plain_decoding_gives_the_tokens_of_the_cpu(gated: Path) -> None:
    card, cpu = on_both(gated, "plain")
    assert card == cpu


def test_skipping_gives_the_tokens_of_the_cpu(gated: Path) -> None:
    card, cpu = on_both(gated, "skip", budget=0.6)
    assert card == cpu


def test_speculation_is_lossless(gated: Path) -> None:
    settings = {"draft_budget": 0.6, "draft_weights": "own", "draft_length": 4}
    speculated, _ = on_both(gated, "speculate", **settings)
    assert speculated == on_both(gated, "plain")[0]


@pytest.mark.parametrize("budget", [1.0, 0.6])
def test_a_step_asks_the_host_nothing(gated: Path, budget: float) -> None:
    decoder = gateskip.load(gated, "float32", device="cuda")
    model, limits = decoder.skipping, decoder.thresholds(budget)
    cache = model.new_cache(1, 64)
    model.forward(torch.tensor([PROMPTS[0]], device="cuda"), cache, [0])
    ids = torch.tensor([[9]], device="cuda")
    model.step(ids, cache, [0], [8], limits)  # loads kernels
    with no_questions():
        model.head(model.step(ids, cache, [0], [8], limits)).argmax(-1)


def test_one_training_step(tiny_llama: Path) -> None:
    model, teacher = (load_model(tiny_llama, "float32") for _ in range(2))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    blocks = torch.randint(3, 512, (2, 32), generator=torch.Generator().manual_seed(1))
    with training_on("cuda"):
        curve = heal(model, teacher, blocks, HealConfig(steps=1, batch=2, validate_every=0))
    assert curve[-1]["loss"] > 0
    assert {p.device.type for p in model.parameters()} == {"cuda"}


def test_rounding_gives_the_error_of_the_cpu(tiny_llama: Path) -> None:
    blocks = torch.randint(3, 512, (4, 32), generator=torch.Generator().manual_seed(1))
    errors = []
    for device in ("cuda", "cpu"):
        model, how = load_model(tiny_llama, "float32").to(device), Rounding(4, 32, "real", 0.01)
        rounded = dict(round_layers(model, blocks.to(device), lambda name, how=how: how))
        assert {each.grid.codes.device.type for each in rounded.values()} == {"cpu"}
        errors.append([each.error for each in rounded.values()])
    torch.testing.assert_close(torch.tensor(errors[0]), torch.tensor(errors[1]), rtol=0.1, atol=0)


def test_a_cell_is_scored(gated: Path, tmp_path: Path) -> None:
    from compose.assets import default_cache
    from compose.bench.cell import CellBench
    from compose.language.schema import Benchmark

    benchmark = Benchmark().model_dump(mode="json")
    benchmark["quality"] |= {"perplexity": ["heldout-text"], "perplexity_tokens": 512, "tasks": []}
    scores = []
    for device in ("cuda", "cpu"):
        scratch = tmp_path / device
        scratch.mkdir()
        given: dict[str, Any] = {"benchmark": benchmark, "asset_cache": default_cache()}
        bench = CellBench(cell_job(gated, scratch, device=device, **given))
        bench.load()
        scores.append(bench.quality(scratch / "reference")["perplexity"]["value"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)
