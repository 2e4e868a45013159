"""A model folder: placed in another dtype, its lineage and hashes, and the check that it loads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from compose.artifacts.folder import (
    GRID_METHOD,
    LINEAGE,
    clean_config,
    copy_companions,
    copy_source,
    dtype_of,
    hash_folder,
    is_gated,
    lineage,
    reload_check,
    require_model,
    save_probe,
    write_lineage,
)
from compose.errors import ArtifactError, AssetError, StepError
from gateskip.quantization.grid_linear import METHOD


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    """A folder that a test may change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.mark.parametrize("link", [False, True])
def test_a_source_in_its_own_dtype_is_placed_as_it_is(
    tiny_llama: Path, tmp_path: Path, link: bool
) -> None:
    target = tmp_path / "placed"
    target.mkdir()
    copy_source(tiny_llama, target, "float32", link=link)
    assert (target / "model.safetensors").read_bytes() == (
        tiny_llama / "model.safetensors"
    ).read_bytes()
    same = os.path.samefile(target / "model.safetensors", tiny_llama / "model.safetensors")
    assert same == link
    assert hash_folder(target) == hash_folder(tiny_llama)


def test_a_source_is_cast_tensor_by_tensor(tiny_llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "placed"
    target.mkdir()
    copy_source(tiny_llama, target, "bfloat16", link=True)
    assert dtype_of(target) == "bfloat16"
    assert dtype_of(tiny_llama) == "float32", "the source must not change through a link"
    wanted = load_file(tiny_llama / "model.safetensors")
    found = load_file(target / "model.safetensors")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name].bfloat16()) for name in wanted)
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(target).chat_template


def test_a_sharded_source_keeps_its_shards_and_states_its_size(
    tiny_llama: Path, tmp_path: Path
) -> None:
    sharded, target = tmp_path / "sharded", tmp_path / "placed"
    target.mkdir()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(sharded, max_shard_size="200KB")
    copy_companions(tiny_llama, sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    copy_source(sharded, target, "bfloat16", link=False)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    shards = list(target.glob("*.safetensors"))
    assert index["metadata"]["total_size"] == sum(shard.stat().st_size for shard in shards)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(target, dtype="auto").lm_head.weight,
        model.lm_head.weight.bfloat16(),
    )


def test_a_pickled_source_is_refused_and_code_stays_behind(copy: Path, tmp_path: Path) -> None:
    target, other = tmp_path / "placed", tmp_path / "other"
    target.mkdir(), other.mkdir()
    config = json.loads((copy / "config.json").read_text())
    own = {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}
    (copy / "config.json").write_text(json.dumps(config | own))
    (copy / "modeling.py").write_text("raise SystemExit('it ran')")
    copy_source(copy, target, "float32", link=False)
    clean_config(target)
    assert not list(target.glob("*.py"))
    assert "auto_map" not in require_model(target)
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(AssetError, match=r"pickled weights \(pytorch_model\.bin\)"):
        copy_source(copy, other, "float32", link=False)
    assert not list(other.iterdir())


def test_a_quantized_source_and_gates_are_never_cast(copy: Path, tmp_path: Path) -> None:
    target = tmp_path / "placed"
    target.mkdir()
    save_file({"weight": torch.ones(2, 2)}, copy / "gates.safetensors")
    copy_source(copy, target, "bfloat16", link=False)
    assert is_gated(target)
    assert load_file(target / "gates.safetensors")["weight"].dtype == torch.float32
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
    )
    again = tmp_path / "quantized"
    again.mkdir()
    copy_source(copy, again, "bfloat16", link=False)
    assert hash_folder(again) == hash_folder(copy)


def test_companions_do_not_replace_what_a_stage_wrote(copy: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "generation_config.json").write_text("{}")
    copy_companions(copy, target)
    assert (target / "generation_config.json").read_text() == "{}"
    assert (target / "tokenizer.json").is_file()
    assert (target / "chat_template.jinja").is_file()
    assert not (target / "model.safetensors").exists()


def test_lineage_is_a_chain_of_hashes(copy: Path) -> None:
    write_lineage(copy, {"name": "source"})
    first = lineage(copy)
    assert first[0]["output_sha256"] == hash_folder(copy)
    config = copy / "config.json"
    config.write_text(config.read_text() + "\n")
    write_lineage(copy, {"name": "drop", "input_sha256": first[-1]["output_sha256"]}, first)
    second = lineage(copy)
    assert [entry["name"] for entry in second] == ["source", "drop"]
    assert second[0] == first[0]
    assert second[1]["output_sha256"] == hash_folder(copy) != first[0]["output_sha256"]


def test_the_hash_covers_names_and_contents_but_not_the_lineage(copy: Path) -> None:
    before = hash_folder(copy)
    (copy / LINEAGE).write_text("{}")
    assert hash_folder(copy) == before
    (copy / "generation_config.json").rename(copy / "other.json")
    assert hash_folder(copy) != before


def test_folders_that_are_no_artifacts_are_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no folder"):
        require_model(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"config\.json"):
        require_model(tmp_path / "empty")
    with pytest.raises(ArtifactError, match="lineage"):
        lineage(copy)


def test_paths_of_this_machine_leave_the_config(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "_name_or_path": str(copy)}))
    clean_config(copy)
    assert str(copy) not in (copy / "config.json").read_text()
    assert require_model(copy)["hidden_size"] == 64


def test_a_folder_that_loads_to_the_same_model_passes(copy: Path, tmp_path: Path) -> None:
    save_probe(copy, tmp_path / "check.safetensors")
    found = reload_check(copy, tmp_path / "check.safetensors")
    assert found["max_abs_diff"] <= 1e-5
    assert found["allowed_share"] == 1e-4
    assert found["range"] > 0.1


def test_a_folder_that_loads_to_another_model_is_refused(copy: Path, tmp_path: Path) -> None:
    save_probe(copy, tmp_path / "check.safetensors")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] *= 1.05
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StepError, match="same logits"):
        reload_check(copy, tmp_path / "check.safetensors")


def test_a_model_that_gives_no_numbers_is_refused(copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StepError, match="finite"):
        save_probe(copy, tmp_path / "check.safetensors")


def test_grids_have_the_name_that_the_engine_knows() -> None:
    assert GRID_METHOD == METHOD
