"""Multiply-adds are counted against the dense model, whatever made the compressed one cheaper."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compose.bench.footprint import dense_work
from compose.stages.prune.edit import keep_layers
from gateskip.decoding.decoder import Decoder
from gateskip.gates.kinds import make_gates
from gateskip.gates.learned import ScalarGates
from gateskip.model.compute import Usage, Work, saving
from gateskip.model.families import backbone, find_branches
from gateskip.model.folders import load_model
from gateskip.runtime.skipping import SkippingModel

SEEN, CONTEXT = 20, 200


def counted(branches: int, kept: int = SEEN) -> Usage:
    return Usage([kept] * branches, SEEN, CONTEXT)


def test_what_was_cut_off_was_saved(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32")
    dense, layers = Work.of(model), len(backbone(model).layers)
    keep_layers(model, list(range(layers - 1)))
    usage = counted(2 * (layers - 1))
    none: list[bool] = [False] * len(usage.kept)
    found = saving(model, usage, None, "project", none, dense)
    assert found.gross == found.net == pytest.approx(1 / layers)
    assert 0 < found.model < found.net, "the LM head is as large as before"
    assert saving(model, usage, None, "project", none).gross == 0, "of its own work nothing"


def test_cutting_and_skipping_add_up(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32")
    dense, layers = Work.of(model), len(backbone(model).layers)
    keep_layers(model, list(range(layers - 1)))
    branches = 2 * (layers - 1)
    usage, gates = counted(branches, SEEN // 2), ScalarGates(branches, model.config.hidden_size)
    found = saving(model, usage, gates, "project", [True] * branches, dense)
    own = saving(model, usage, gates, "project", [True] * branches)
    assert own.gross == pytest.approx(0.5)
    assert 1 - found.gross == pytest.approx((1 - 1 / layers) * (1 - own.gross))
    assert 1 - found.net == pytest.approx((1 - 1 / layers) * (1 - own.net))


def test_a_smaller_lm_head_counts_in_the_whole_model_alone(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32")
    dense, usage = Work.of(model), counted(len(find_branches(model)))
    wider = Work(dense.branches, 3 * dense.head)
    found = saving(model, usage, None, "project", [False] * len(usage.kept), wider)
    assert found.net == 0
    whole = SEEN * wider.head + dense.of_branches(usage)
    assert found.model == pytest.approx(SEEN * 2 * dense.head / whole)


def test_gates_that_scale_cost_at_full_compute(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32")
    branches = len(find_branches(model))
    gates = make_gates("vector", branches, model.config.hidden_size, scales=True)
    decoder = Decoder(SkippingModel(model, gates), None, {0.5: [0.0] * branches})
    found = decoder.saved(counted(branches), 1.0)
    assert found.gross == 0 and found.net < 0
    decoder.skipping.gated = False
    assert decoder.saved(counted(branches), 1.0).net == 0


def test_the_dense_model_is_counted_without_its_weights(tiny_llama: Path) -> None:
    found = dense_work(tiny_llama)
    assert found == Work.of(load_model(tiny_llama, "float32"))
    assert torch.get_default_device().type == "cpu"
