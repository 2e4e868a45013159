"""Exports: the files of the folder, its model card, and what is never overwritten."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import save_gated

from compose.artifacts.folder import LINEAGE, lineage, write_lineage
from compose.errors import StepError, UserError
from compose.outputs.export import (
    assemble,
    decode_default,
    model_card,
    refuse_foreign,
    verify_tokens,
)
from compose.outputs.gather import _source_notes
from compose.outputs.run_folder import RunFolder
from compose.processes.executors import make_executor
from compose.results.schema import CellResult, Results


def cell(name: str, chain: tuple[str, ...], **more: Any) -> CellResult:
    return CellResult.model_validate({"name": name, "chain": chain, "status": "ok", **more})


@pytest.fixture
def results() -> Results:
    perplexity = {"dataset": "wikitext2", "value": 12.5, "tokens": 64, "ratio_to_baseline": 1.25}
    tasks = {"piqa": {"metric": "acc", "value": 0.625, "n": 500, "ci95": (0.58, 0.67)}}
    speed = {"decode_tokens_per_s": {"median": 31.25, "repeats": (30.0, 31.25, 32.0)}}
    steps = ({"name": "gates", "use": "gate"}, {"name": "spec", "use": "speculate"})
    speculation = {"acceptance_rate": 0.75}
    quality = {"perplexity": perplexity, "tasks": tasks}
    arithmetic = {"backend": "native", "weights": "bfloat16"}
    arithmetic |= {"activations": "float32", "accumulation": "float32"}
    spec = {
        "arithmetic": arithmetic,
        "steps": steps,
        "speed": speed,
        "speculation": speculation,
        "lossless_check": {"lossless": True, "prompts": 16, "tokens": 1024},
        "quality_of": "gates",
    }
    return Results(
        run="trial",
        model="smollm2-135m-instruct",
        environment={"processor": "A processor", "threads": 2},
        cells=(
            cell("dense", (), quality={"perplexity": {**perplexity, "value": 10.0}}),
            cell("gates", ("gates",), quality=quality),
            cell("gates+spec", ("gates", "spec"), **spec),
        ),
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A gated model folder, as far as an export looks at it."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "model_type": "llama"}))
    (folder / "model.safetensors").write_text("weights")
    (folder / "gates.safetensors").write_text("gates")
    (folder / "gateskip.json").write_text(json.dumps({"kind": "scalar", "decode": {}}))
    origin = {"name": "source", "use": "source", "origin": "hub:owner/name@abc"}
    write_lineage(folder, {**origin, "licence": "apache-2.0", "parameters": {}})
    gate = {"name": "gates", "use": "gate", "parameters": {"steps": 300, "kv": "project"}}
    write_lineage(folder, gate, lineage(folder))
    return folder


SPEC = {"use": "speculate", "draft_budget": 0.5, "draft_length": "auto"}


@pytest.fixture
def export(tmp_path: Path, source: Path, results: Results) -> Path:
    target = tmp_path / "export"
    target.mkdir()
    assemble(target, source, results, results.cell("gates+spec"), {"weights": "k", "decode": SPEC})
    return target


def test_that_weights_were_quantized_is_said(
    tmp_path: Path, source: Path, results: Results
) -> None:
    """What the source's step notes of its weights stands in the card and in the results."""
    note = "the weights once were Q4_1"
    entries = lineage(source)
    entries[0]["record"] = {"notes": [note]}
    (source / LINEAGE).write_text(json.dumps({"schema_version": 1, "stages": entries}))
    cell = results.cell("gates")
    assert f"**Note:** {note}." in model_card(source, results, cell, lineage(source))
    run: Any = SimpleNamespace(store=SimpleNamespace(model=lambda key: source))
    plan: Any = SimpleNamespace(cells=[SimpleNamespace(weights="k")])
    assert _source_notes(run, plan) == [note]


def test_a_model_without_gates_drafts_too(tmp_path: Path, source: Path, results: Results) -> None:
    for name in ("gates.safetensors", "gateskip.json"):
        (source / name).unlink()
    target = tmp_path / "drafting"
    target.mkdir()
    spec = {"use": "speculate", "draft_budget": 1.0, "draft_weights": "nf4"}
    planned = {"weights": "k", "decode": spec}
    assemble(target, source, results, results.cell("gates+spec"), planned)
    decode = {"mode": "speculate", "draft_budget": 1.0, "draft_weights": "nf4"}
    assert json.loads((target / "gateskip.json").read_text()) == {"decode": decode}
    assert (target / "custom_generate/generate.py").is_file()


def test_the_folder_states_how_it_is_decoded(export: Path, source: Path) -> None:
    settings = json.loads((export / "gateskip.json").read_text())
    assert settings["decode"] == {"mode": "speculate", "draft_budget": 0.5, "draft_length": "auto"}
    assert settings["kind"] == "scalar"
    assert json.loads((source / "gateskip.json").read_text())["decode"] == {}, "only read"
    assert (export / "gates.safetensors").read_text() == "gates"


def test_the_lineage_goes_on_to_the_export(export: Path) -> None:
    entries = lineage(export)
    assert [entry["use"] for entry in entries] == ["source", "gate", "export"]
    assert entries[2]["input_sha256"] == entries[1]["output_sha256"]
    assert entries[2]["arithmetic"]["backend"] == "native"
    assert entries[2]["output_sha256"] != entries[1]["output_sha256"]


def test_the_numbers_travel_with_it(export: Path) -> None:
    numbers = json.loads((export / "measurements.json").read_text())
    assert numbers["cell"]["speed"]["decode_tokens_per_s"]["repeats"] == [30.0, 31.25, 32.0]
    assert numbers["baseline"]["name"] == "dense"
    assert numbers["quality_of"]["name"] == "gates"


def test_the_card_has_chain_numbers_licence_and_how_to_load(export: Path) -> None:
    card = (export / "README.md").read_text()
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert "license: apache-2.0" in head
    assert "base_model: owner/name" in head
    assert "| gates | gate | steps 300, kv project |" in body
    assert "| decode tokens/s | 31.25 |" in body
    assert "| perplexity | 12.5 | 10 |" in body, "speculation has its plain cell's quality"
    assert "| piqa, acc | 62.5 % (n=500) | – |" in body
    assert "exactly the tokens of plain greedy decoding on 16 prompts, 1024 tokens" in body
    assert "gateskip.load(" in body
    assert "`speculate`" in body
    assert "{{" not in card
    assert "{%" not in card
    assert "None" not in card


def test_the_card_of_mixed_bits_names_what_reads_them(
    tmp_path: Path, source: Path, results: Results
) -> None:
    packed = {"quant_method": "gptq", "bits": 4, "dynamic": {"^model.x$": {"bits": 8}}}
    config = {"dtype": "bfloat16", "model_type": "llama", "quantization_config": packed}
    (source / "config.json").write_text(json.dumps(config))
    target = tmp_path / "mixed"
    target.mkdir()
    assemble(target, source, results, results.cell("gates+spec"), {"weights": "k", "decode": SPEC})
    card = (target / "README.md").read_text()
    assert "GPTQModel.load(" in card
    assert "gateskip.load(" in card
    assert "AutoModelForCausalLM" not in card


@pytest.mark.parametrize(
    ("decode", "wanted"),
    [
        (None, {"mode": "plain"}),
        ({"use": "skip", "budget": 0.8}, {"mode": "skip", "budget": 0.8}),
    ],
)
def test_decode_stages_become_defaults(decode: dict[str, Any] | None, wanted: Any) -> None:
    assert decode_default(decode) == wanted


def test_only_an_earlier_export_is_replaced(export: Path, tmp_path: Path) -> None:
    refuse_foreign(export)
    refuse_foreign(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    refuse_foreign(tmp_path / "empty")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    for taken in (tmp_path / "thesis", tmp_path / "thesis" / "chapter.tex"):
        with pytest.raises(UserError, match="not an earlier export"):
            refuse_foreign(taken)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


@pytest.mark.slow
def test_the_export_gives_the_tokens_of_its_source(
    make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Each in a process of its own; another model is another text, from its first token on."""
    run = RunFolder(tmp_path / "runs" / "small")
    shutil.copytree(make_tiny("llama"), run.store.model("key"))
    planned = {"weights": "key", "decode": None}
    with contextlib.closing(make_executor("local", 1)) as executor:
        verify_tokens(make_tiny("llama"), run, planned, executor)
        with pytest.raises(StepError, match="other tokens than its source from token 0 on"):
            verify_tokens(make_tiny("llama", seed=1), run, planned, executor)


@pytest.mark.slow
def test_an_export_that_is_decoded_in_another_way_gives_other_tokens(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Gates that skip at half the compute: the settings that the export states are what it runs."""

    from compose.bench.generate import continue_probe

    decode = {"mode": "skip", "budget": 0.5}
    folder = save_gated(tiny_llama, tmp_path / "gated", (0.5,), decode=decode)
    tokens = continue_probe(folder, 32)
    assert len(tokens) == 32
    assert tokens == continue_probe(folder, 32, decode)
    plain = continue_probe(folder, 32, {"mode": "plain"})
    assert tokens != plain
    auto = {"mode": "speculate", "draft_budget": 0.5, "draft_length": "auto"}
    assert continue_probe(folder, 32, auto) == plain
