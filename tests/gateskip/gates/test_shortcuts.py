"""Shortcuts find what is linear in a branch, act on skipped tokens only, travel with the gates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gateskip.calibration.fit_shortcuts import _Sums, fit_shortcuts
from gateskip.checkpoint import GateFile, load_gates, read_gates, save_gates, write_gates
from gateskip.errors import FormatError
from gateskip.gates.learned import ScalarGates
from gateskip.gates.shortcuts import Shortcuts
from gateskip.model.compute import Usage, saving
from gateskip.model.families import Branch, find_branches
from gateskip.model.reference import masked_forward
from gateskip.quantization.folders import load_model


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 512, (rows, length), generator=torch.Generator().manual_seed(seed))


def mlp_skips(branch: Branch, z: torch.Tensor) -> torch.Tensor:
    return torch.full_like(z, float(branch.kind == "attention"))


def test_a_linear_map_of_low_rank_is_found() -> None:
    torch.manual_seed(0)
    x, truth = torch.randn(4000, 24), torch.randn(24, 3) @ torch.randn(3, 24) / 24
    sums = _Sums(24)
    for part in x.split(1000):
        sums.add(part, part @ truth + 0.5)
    down, up, bias = sums.solve(3)
    assert down.shape == (3, 24) and up.shape == (24, 3)
    found = x @ down.T @ up.T + bias
    error = (found - x @ truth - 0.5).norm() / (x @ truth).norm()
    assert float(error) < 0.05, "the ridge shrinks a little, and that is all"


def test_a_token_with_huge_activations_does_not_own_the_fit() -> None:
    torch.manual_seed(0)
    x, truth = torch.randn(2000, 16), torch.randn(16, 2) @ torch.randn(2, 16) / 16
    output = x @ truth
    output[0] = 1e4
    sums = _Sums(16)
    sums.add(x, output)
    down, up, bias = sums.solve(2)
    error = (x[1:] @ down.T @ up.T + bias - output[1:]).norm() / output[1:].norm()
    assert float(error) < 0.2


def test_skipping_with_shortcuts_is_nearer_to_the_dense_model(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32")
    branches = len(find_branches(model))
    gates, ids = ScalarGates(branches, 64), tokens(4, 64, 9)
    with torch.no_grad():
        dense = masked_forward(model, ids)
        bare = masked_forward(model, ids, gates, mlp_skips)
        gates.shortcuts = fit_shortcuts(model, tokens(40, 64), 16)
        helped = masked_forward(model, ids, gates, mlp_skips)
        full = masked_forward(model, ids, gates, lambda branch, z: torch.ones_like(z))
    assert float((helped - dense).norm()) < 0.95 * float((bare - dense).norm()), "random weights"
    torch.testing.assert_close(full, dense, atol=1e-4, rtol=0)


def test_they_travel_with_the_gates(tmp_path: Path) -> None:
    gates = ScalarGates(8, 16)
    gates.shortcuts = Shortcuts(8, 16, 4)
    with torch.no_grad():
        gates.shortcuts.up.normal_()
    gates.shortcuts.settle()
    save_gates(tmp_path, GateFile(gates, "project", {0.5: [0.0] * 8}))
    found = load_gates(tmp_path)
    assert found is not None and found.gates.shortcuts is not None
    assert torch.equal(found.gates.shortcuts.up, gates.shortcuts.up)
    fewer = gates.rows([5, 2]).shortcuts
    assert fewer is not None and torch.equal(fewer.up, gates.shortcuts.up[[5, 2]])


def test_ranks_may_differ(tiny_llama: Path, tmp_path: Path) -> None:
    """By branch in the fit, in what is computed, in the file and in what is counted."""
    model = load_model(tiny_llama, "float32")
    ranks = [2, 16] * (len(find_branches(model)) // 2)
    gates, x = ScalarGates(len(ranks), 64), torch.randn(5, 64)
    gates.shortcuts = fit_shortcuts(model, tokens(12, 32), ranks)
    gates.shortcuts.settle()
    alone = fit_shortcuts(model, tokens(12, 32), 2)
    alone.settle()
    assert torch.equal(gates.shortcuts(0, x), alone(0, x)), "as if all had its rank"
    assert not torch.equal(gates.shortcuts(1, x), alone(1, x))
    assert [gates.shortcuts.macs(branch) for branch in (0, 1)] == [2 * 2 * 64, 2 * 16 * 64]
    save_gates(tmp_path, GateFile(gates, "project", {0.5: [0.0] * len(ranks)}))
    found = load_gates(tmp_path)
    assert found is not None and found.gates.shortcuts is not None
    stored = load_file(tmp_path / "gates.safetensors")
    assert len(stored["shortcuts.down"]) == len(stored["shortcuts.up"]) == sum(ranks)
    fewer = gates.rows([3, 2]).shortcuts
    assert found.gates.shortcuts.ranks == tuple(ranks) and fewer is not None
    assert fewer.ranks == (16, 2)
    for branch in range(len(ranks)):
        assert torch.equal(found.gates.shortcuts(branch, x), gates.shortcuts(branch, x))
    assert torch.equal(fewer(0, x), gates.shortcuts(3, x))
    usage = [Usage([10 + (i % 2 == 1) * 5 for i in range(len(ranks))], seen=20, context=200)]
    every = saving(model, usage[0], gates, "project", [True] * len(ranks))
    gates.shortcuts = Shortcuts(len(ranks), 64, 2)
    least = saving(model, usage[0], gates, "project", [True] * len(ranks))
    assert least.net > every.net


@pytest.mark.parametrize("ranks", [[2, 15], [2, -2], [65, 1], [], [18]])
def test_ranks_that_are_not_those_of_the_tensors(tmp_path: Path, ranks: list[int]) -> None:
    gates, file = ScalarGates(2, 64), tmp_path / "gates.safetensors"
    gates.shortcuts = Shortcuts(2, 64, [2, 16])
    write_gates(file, gates)
    state = load_file(file) | {"shortcuts.ranks": torch.tensor(ranks, dtype=torch.int32)}
    save_file(state, file, metadata={"gates": "scalar 2 64"})
    with pytest.raises(FormatError, match="of other sizes"):
        read_gates(file)


def test_what_was_saved_pays_for_them(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32")
    branches = len(find_branches(model))
    usage = Usage([10] * branches, seen=20, context=200)
    gates = ScalarGates(branches, 64)
    bare = saving(model, usage, gates, "project", [True] * branches)
    gates.shortcuts = Shortcuts(branches, 64, 4)
    paid = saving(model, usage, gates, "project", [True] * branches)
    assert paid.gross == bare.gross and paid.net < bare.net
