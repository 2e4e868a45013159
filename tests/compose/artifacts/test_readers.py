"""Other libraries read our packed folders to the same weights, and folders written for them.

What needs a library in an environment of its own is marked `peers` and skipped where that has not
been made: `make peers-test` makes them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peer_environments import USERS_CACHE, environment_of
from safetensors.torch import load_file, save_file

from compose.artifacts import compressed_tensors
from compose.artifacts.compressed_tensors import write_compressed
from compose.artifacts.folder import copy_companions, probe_ids
from compose.artifacts.packed_folder import IntegerLayer, PackedFolder, packed, unpacked
from compose.artifacts.zero_points import price_text
from compose.bench.peers.environment import python_of
from compose.bench.peers.table import ENGINES, Engine
from compose.errors import ArtifactError, StepError
from compose.stages.registry import STAGES, DataSpec, StageJob
from gateskip.quantization.folders import load_model

SCRIPTS = Path(__file__).with_name("readers")

COMPRESSED_TENSORS = Engine(
    name="compressed-tensors",
    script="",
    options={},
    distributions=("compressed-tensors", "transformers"),
    requirements=(
        "compressed-tensors>=0.15,<1",
        "transformers>=5.20,<6",
        "accelerate>=1.10,<2",
        "torch>=2.9,<3",
        "numpy>=2.0,<3",
    ),
)
Quantize = Callable[..., Path]

PACKED: dict[str, dict[str, Any]] = {
    "int4": {"use": "int4", "offset": "integer", "compensate": False},
    "int4-64": {"use": "int4", "offset": "integer", "compensate": False, "group_size": 64},
    "int8": {"use": "int8", "compensate": False},
    "gptq": {"use": "gptq"},
    "gptq-mixed": {"use": "gptq", "sym": True, "mixed": {"down_proj": 8}, "skip": ("o_proj",)},
}
"""Stages whose folders compressed-tensors can hold."""
GPTQ = [case for case in PACKED if case != "int8"]
"""Those whose folders are in the GPTQ format."""
LAYERS = 2


@pytest.fixture(scope="module")
def quantize(
    licence_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
    make_tiny: Callable[..., Path],
    make_job: Callable[..., StageJob],
) -> Quantize:
    """`quantize(use=..., ...)` makes a packed folder, the rest in bfloat16: each once, so a test
    that changes one copies it first."""
    made: dict[str, Path] = {}

    def go(family: str = "llama", **parameters: Any) -> Path:
        key = json.dumps([family, parameters], sort_keys=True)
        if key not in made:
            source = make_tiny(family, num_hidden_layers=LAYERS)
            target = tmp_path_factory.mktemp("packed")
            spec = DataSpec(source=str(licence_text), limit=8, length=64)
            job = make_job(source, target, dtype="bfloat16", calibration=spec)
            STAGES[parameters["use"]].model_validate(parameters).run(job)
            copy_companions(source, target)
            made[key] = target
        return made[key]

    return go


# --- Packed layers as integers -------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_packed_lowest_bits_first(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 64), dtype=torch.uint8)
    words = packed(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (3, 64 * bits // 32)
    assert int(words[1, 0]) & (2**bits - 1) == int(codes[1, 0])
    assert torch.equal(unpacked(words, bits), codes)
    odd = packed(codes[:, :5], bits)
    assert torch.equal(unpacked(odd, bits)[:, :5], codes[:, :5]), "the last word is filled up"


@pytest.mark.slow
@pytest.mark.parametrize("case", GPTQ)
def test_integers_give_the_weights_that_gptqmodel_multiplies_by(
    case: str, quantize: Quantize
) -> None:
    """As transformers, optimum and gptqmodel load the folder, in float16: int4's, too."""
    folder = quantize(**PACKED[case])
    source, model = PackedFolder(folder), load_model(folder, "float32")
    packed_ones = [name for name, module in model.named_modules() if hasattr(module, "qweight")]
    assert sorted(source.layers) == sorted(packed_ones) and not source.embeddings
    assert len(packed_ones) == LAYERS * (6 if case == "gptq-mixed" else 7)
    for name in source.layers:
        layer = source.layer(name)
        found = model.get_submodule(name).dequantize_weight().T.float()
        assert torch.equal(layer.weight().half().float(), found.half().float()), name
        assert (layer.zeros is None) == (case == "gptq-mixed")
    assert {name for name, _ in source.others()} >= {"model.embed_tokens.weight"}


def test_integers_of_our_own_format_are_its_grids(quantize: Quantize) -> None:
    folder = quantize(**PACKED["int8"])
    source, model = PackedFolder(folder), load_model(folder, "float32")
    assert source.embeddings == ["model.embed_tokens"] and len(source.layers) == LAYERS * 7
    for name in (*source.layers, *source.embeddings):
        assert torch.equal(source.layer(name).weight(), model.get_submodule(name).grid().weight())


# --- Folders for compressed-tensors --------------------------------------------------------------


@pytest.mark.parametrize("case", PACKED)
def test_a_folder_for_compressed_tensors_holds_the_same_integers(
    case: str, quantize: Quantize, tmp_path: Path
) -> None:
    """By the format's description: signed codes and zero points, shifted up to be packed."""
    source = PackedFolder(quantize(**PACKED[case]))
    target = tmp_path / "made"
    record = write_compressed(source.folder, target)
    tensors = load_file(target / "model.safetensors")
    stated = json.loads((target / "config.json").read_text())["quantization_config"]
    groups = stated["config_groups"].values()
    assert stated["quant_method"] == "compressed-tensors" and stated["format"] == "pack-quantized"
    for name in source.layers:
        layer = source.layer(name)
        scheme = next(g for g in groups if g["targets"] == ["Linear"] or name in g["targets"])
        bits, half = scheme["weights"]["num_bits"], 2 ** (scheme["weights"]["num_bits"] - 1)
        assert tensors[f"{name}.weight_shape"].tolist() == list(layer.codes.shape)
        codes = unpacked(tensors[f"{name}.weight_packed"], bits).int() - half
        zeros = torch.zeros_like(layer.scale, dtype=torch.int32)
        assert scheme["weights"]["symmetric"] == (f"{name}.weight_zero_point" not in tensors)
        if not scheme["weights"]["symmetric"]:
            zeros = unpacked(tensors[f"{name}.weight_zero_point"].T, bits).T.int() - half
        scale = tensors[f"{name}.weight_scale"].float()
        spread = [each.repeat_interleave(layer.group, 1) for each in (scale, zeros)]
        assert torch.equal(spread[0] * (codes - spread[1]), layer.weight()), name
    dense = set(source.embeddings) | {
        name.removesuffix(".weight") for name, each in source.others() if each.ndim == 2
    }
    assert set(stated["ignore"]) == dense | {"lm_head"}
    wanted = {8: "W8A16", 4: "W4A16"}
    assert record["schemes"] == sorted({wanted[g["weights"]["num_bits"]] for g in groups})
    assert len(groups) == (2 if case == "gptq-mixed" else 1)
    assert record["layers"] == len(source.layers) and record["floats"] == source.embeddings
    assert record["rounded_scales"] == case.startswith("gptq"), "those of gptqmodel are float16"
    exact = not record["floats"] and not record["rounded_scales"]
    assert abs(record["kl"]) < (1e-6 if exact else 1e-4)
    assert (target / "tokenizer.json").is_file()


@pytest.mark.parametrize("case", ["int4", "int8"])
def test_the_kl_is_that_of_the_weights_that_were_written(
    case: str, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any) -> Any:
        for name, value in right(*arguments):
            yield name, value * 2 if name.endswith("down_proj.weight_scale") else value

    right = compressed_tensors._tensors
    monkeypatch.setattr(compressed_tensors, "_tensors", wrong)
    assert write_compressed(quantize(**PACKED[case]), tmp_path / "made")["kl"] > 1e-3


def test_the_price_of_integer_zero_points_is_told(
    quantize: Quantize, make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    dense = make_tiny("llama", num_hidden_layers=LAYERS)
    price = write_compressed(quantize(**PACKED["int4"]), tmp_path / "4", dense)["zero_points"]
    assert 0 < price["real"] < price["integer"]
    (told,) = price_text(price)
    assert "with integer zero points" in told and "with real minima" in told
    price = write_compressed(quantize(**PACKED["int8"]), tmp_path / "8", dense)["zero_points"]
    assert price is None and price_text(price) == (), "8 bits have none"


def test_an_untied_head_is_written_as_floats(quantize: Quantize, tmp_path: Path) -> None:
    folder = quantize("qwen2", use="gptq", sym=True, lm_head=8)
    assert write_compressed(folder, tmp_path / "made")["floats"] == ["lm_head"]
    head = load_file(tmp_path / "made" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head, PackedFolder(folder).layer("lm_head").weight().bfloat16())


def test_large_folders_are_written_in_parts(
    quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantize(**PACKED["int4"])
    write_compressed(folder, tmp_path / "one")
    monkeypatch.setattr(compressed_tensors, "SHARD", 40_000)
    write_compressed(folder, tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in whole.values())
    for file in set(index["weight_map"].values()):
        for name, value in load_file(tmp_path / "many" / file).items():
            assert index["weight_map"][name] == file and torch.equal(value, whole[name])


def test_what_the_format_cannot_hold_is_refused(
    quantize: Quantize, tiny_llama: Path, tmp_path: Path
) -> None:
    """Each by name, and nothing is left."""
    target = tmp_path / "made"

    def refusal(folder: Path) -> ArtifactError:
        with pytest.raises(ArtifactError) as refused:
            write_compressed(folder, target)
        assert not target.exists()
        return refused.value

    assert "are not packed" in str(refusal(tiny_llama))
    assert "are bitsandbytes" in str(refusal(quantize(use="bnb", format="nf4")))
    real = refusal(quantize(use="int4", compensate=False))
    assert "real minimum for each group" in str(real) and "offset: integer" in str(real.fix)
    assert "has 2 bits" in str(refusal(quantize(use="int2", offset="integer", compensate=False)))
    scattered = tmp_path / "scattered"
    shutil.copytree(quantize(**PACKED["int4"]), scattered)
    tensors = load_file(scattered / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()  # as act_order leaves them
    save_file(tensors, scattered / "model.safetensors", {"format": "pt"})
    assert "act_order: false" in str(refusal(scattered).fix)
    gated = tmp_path / "gated"
    shutil.copytree(quantize(**PACKED["int4"]), gated)
    (gated / "gates.safetensors").write_bytes(b"")
    assert "has gates" in str(refusal(gated))
    target.mkdir()
    with pytest.raises(ArtifactError, match="exists, and is not replaced"):
        write_compressed(gated, target)


def test_a_folder_that_does_not_read_back_is_not_left(
    quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantize(**PACKED["int4"])
    wrong = lambda codes, bits: packed(codes.flip(1), bits)  # noqa: E731
    monkeypatch.setattr(compressed_tensors, "packed", wrong)
    with pytest.raises(
        StepError, match=r"codes of model\.layers\.0\..* differ from those that were written"
    ):
        write_compressed(folder, tmp_path / "made")
    assert not (tmp_path / "made").exists()


# --- Other libraries -----------------------------------------------------------------------------


def read_by(engine: Engine, script: str, *arguments: Path) -> None:
    """Run a script of `readers/` in an engine's environment; skip where that has not been made."""
    environment_of(engine)
    command = [python_of(engine, USERS_CACHE), SCRIPTS / script, *arguments]
    alone = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=alone, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.peers
@pytest.mark.parametrize("case", PACKED)
def test_compressed_tensors_reads_our_weights(
    case: str, quantize: Quantize, tmp_path: Path
) -> None:
    """Its compressor gives our weights bit by bit; transformers with it, in the float type."""
    folder = quantize(**PACKED[case])
    source, target = PackedFolder(folder), tmp_path / "made"
    write_compressed(folder, target)
    ids = probe_ids(folder)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    result = tmp_path / "result.safetensors"
    script = "compressed_tensors_weights.py"
    read_by(COMPRESSED_TENSORS, script, target, tmp_path / "ids.safetensors", result)
    found, written = load_file(result), load_file(target / "model.safetensors")
    names = {name.partition("/")[2] for name in found if "/" in name}
    assert names == set(source.layers)
    for name in names:
        layer = source.layer(name)
        assert torch.equal(found[f"float32/{name}"], layer.weight()), name
        stored = written[f"{name}.weight_scale"]
        if f"{name}.weight_zero_point" not in written:  # kept packed beside bfloat16 weights
            stored = stored.bfloat16()
        loaded = IntegerLayer(layer.bits, layer.codes, stored, layer.zeros).weight()
        assert torch.equal(found[f"library/{name}"], loaded.to(stored.dtype).bfloat16().float()), (
            name
        )
    with torch.inference_mode():
        ours = load_model(folder, "bfloat16")(ids).logits.float()
    assert (found["logits"] - ours).abs().mean() < 0.05 * ours.std()


@pytest.mark.peers
def test_onnxruntimes_model_builder_reads_our_gptq_folders(
    quantize: Quantize, tmp_path: Path
) -> None:
    """Its MatMulNBits nodes have our weights, bit by bit. It knows the older GPTQ format alone."""
    folder = quantize(use="gptq", sym=True)
    result = tmp_path / "weights.npz"
    read_by(ENGINES["onnxruntime"], "onnxruntime_weights.py", folder, tmp_path / "onnx", result)
    source = PackedFolder(folder)
    with numpy.load(result) as found:
        nodes = {name: torch.from_numpy(found[name]) for name in found.files}
    for index in range(LAYERS):
        own = {
            name.rpartition(".")[2]: source.layer(name).weight()
            for name in source.layers
            if name.startswith(f"model.layers.{index}.")
        }
        own["qkv_proj"] = torch.cat([own[f"{part}_proj"] for part in "qkv"])
        theirs = {n: w for n, w in nodes.items() if f"layers.{index}/" in n}
        assert theirs
        for name, weight in theirs.items():
            kind = name.split("/")[-2]
            assert torch.equal(weight, own[kind]), name
