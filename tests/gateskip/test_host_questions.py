"""On a device the host asks nothing inside a step, and decodes what the CPU decodes.

A pretended device counts the questions: tests/helpers/pretend_device.py. The table of
`python tools/host_syncs.py` comes from the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from host_syncs import BACKENDS, NEW_TOKENS, PATHS, count_waits, table
from pretend_device import DEVICE, PretendTensor, host_questions, pretend_device
from tiny_models import save_gated

from gateskip.decoding.sampling import accept_on_device, draw_on_device, match_on_device
from gateskip.model.families import to_device, to_host

SAMPLED = [path for path in PATHS if "sampled" in path]


@pytest.fixture(scope="module")
def gated(make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gated") / "model"
    return save_gated(make_tiny("llama"), folder, (0.6, 0.8), shortcuts=True)


def test_questions_are_counted() -> None:
    with pretend_device(), host_questions() as asked:
        x = to_device([1.0, 2.0], DEVICE)
        assert isinstance(x, PretendTensor) and not asked.in_steps
        assert to_host(x) == [1.0, 2.0] and not asked.in_steps and len(asked.reads) == 1
        waits: list[Callable[[], object]] = [
            lambda: x[0].item(),
            lambda: x.tolist(),
            lambda: bool((x > 0).all()),
            lambda: x.nonzero(),
            lambda: x[x > 1],
            lambda: x.cpu(),
            lambda: torch.tensor([1], device=DEVICE),
            lambda: torch.ones(2).to(DEVICE),
            lambda: torch.arange(2, device=DEVICE).repeat_interleave(
                torch.ones(2).to(DEVICE).int()
            ),
        ]
        for wait in waits:
            before = len(asked.in_steps)
            wait()
            assert len(asked.in_steps) > before


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_asks_the_host_nothing(gated: Path, backend: str, path: str) -> None:
    waits = count_waits(gated, backend, path, rows=2)
    assert waits.questions.in_steps == []
    steps = 2 * (NEW_TOKENS - 1)
    if backend == "gathered":  # one read a step or round of all rows, and one of counts
        assert 1 <= len(waits.questions.reads) <= steps + 1
    if path not in SAMPLED:  # drawing on a device takes other numbers of the random stream
        assert waits.tokens == count_waits(gated, "gathered", path, rows=2, device=False).tokens


@pytest.mark.parametrize("path", ["skip", "skip, copied keys", "speculate"])
@pytest.mark.parametrize("family", ["gemma3_text", "phi3"])
def test_windows_and_other_families(
    family: str, path: str, make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_gated(make_tiny(family), tmp_path / "gated", (0.6, 0.8), shortcuts=True)
    waits = count_waits(folder, "gathered", path)
    assert waits.questions.in_steps == []
    assert waits.tokens == count_waits(folder, "gathered", path, device=False).tokens


def test_the_table_has_a_line_for_each_path(gated: Path) -> None:
    waits = [count_waits(gated, "gathered", path) for path in ("plain", "speculate")]
    plain, speculate = table(waits).splitlines()[2:]
    assert plain == "| `gathered` | plain | 0.00 | 1.00 |"
    assert float(speculate.split("|")[4]) <= 1


def test_acceptance_on_a_device_matches_greedily() -> None:
    drafted, lengths = torch.tensor([[1, 2, 3], [1, 9, 3], [1, 2, 3]]), torch.tensor([3, 3, 1])
    targets = torch.tensor([[1, 2, 3, 4]] * 3)
    accepted, following = match_on_device(drafted, lengths, targets)
    assert accepted.tolist() == [3, 1, 1] and following.tolist() == [4, 2, 2]
    none = torch.zeros(3, 0, dtype=torch.long)
    accepted, following = match_on_device(none, torch.zeros(3, dtype=torch.long), targets[:, :1])
    assert accepted.tolist() == [0, 0, 0] and following.tolist() == [1, 1, 1]


@pytest.mark.parametrize("certain", [False, True])
def test_accepted_tokens_are_distributed_as_the_targets(certain: bool) -> None:
    """The first token of a round, drafted or not, has the target's distribution."""
    rows, generator = 40_000, torch.Generator().manual_seed(3)
    target = torch.tensor([0.5, 0.3, 0.2, 0.0])
    source = torch.tensor([0.1, 0.2, 0.3, 0.4])
    uniform = torch.rand(rows, 3, generator=generator, dtype=torch.float64)
    drafted = draw_on_device(source.expand(rows, 4), uniform[:, 2]).unsqueeze(1)
    drawn_from = None if certain else source.expand(rows, 1, 4)
    lengths, targets = torch.ones(rows, dtype=torch.long), target.expand(rows, 2, 4)
    accepted, following = accept_on_device(drafted, lengths, targets, drawn_from, uniform[:, :2])
    first = torch.where(accepted == 1, drafted[:, 0], following)
    shares = torch.bincount(first, minlength=4) / rows
    torch.testing.assert_close(shares, target, atol=0.01, rtol=0)
