"""The stages int8, int4, int3 and int2: folders that load anywhere, and cost what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

import gateskip
from compose.artifacts.bundle import write_loader
from compose.artifacts.folder import copy_companions, probe_ids, probe_logits
from compose.bench.quality.text import load_head
from compose.bench.speed.measure import held_bytes
from compose.errors import RuleBroken, UserError
from compose.stages.registry import STAGES, DataSpec, Gate, Int4, Int8, ModelShape, StageJob
from compose.stages.shape import FUSED_QKV
from gateskip.model.families import FAMILIES
from gateskip.quantization.folders import load_model
from gateskip.quantization.grid_linear import GridEmbedding, GridLinear, SharedHead, grids_of
from gateskip.quantization.packed_embedding import PackedEmbedding

Made = tuple[Path, dict[str, Any]]


@pytest.fixture
def round_it(
    tmp_path: Path, licence_text: Path, tiny_llama: Path, make_job: Callable[..., StageJob]
) -> Callable[..., Made]:
    """`round_it(use=..., ...)` makes a folder; returns it and the stage's record."""
    spec = DataSpec(source=str(licence_text), limit=8, length=64)

    def go(source: Path = tiny_llama, dtype: str = "float32", **parameters: Any) -> Made:
        target = tmp_path / f"made-{len(list(tmp_path.iterdir()))}"
        target.mkdir()
        train = spec.model_copy(update={"limit": 40})
        job = make_job(source, target, dtype=dtype, train=train, calibration=spec, dense=tiny_llama)
        stage = STAGES[parameters["use"]].model_validate(parameters)
        told = json.loads(json.dumps(stage.model_dump(mode="json")))  # as a worker is
        record = STAGES[parameters["use"]].model_validate(told).run(job)
        copy_companions(source, job.target)
        return job.target, record

    return go


def kl(folder: Path, dense: Path) -> float:
    """Mean KL of the dense model's distribution to the folder's on the probe text."""
    p, q = (probe_logits(each).log_softmax(-1) for each in (dense, folder))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("use", ["int8", "int6", "int4"])
def test_a_loaded_folder_takes_the_bytes_of_its_file(
    use: str, round_it: Callable[..., Made]
) -> None:
    """One copy of every weight, the embedding's too."""
    folder, _ = round_it(use=use, dtype="bfloat16")
    model = gateskip.load(folder).skipping.model
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    weights = sum(each.nbytes for each in load_file(folder / "model.safetensors").values())
    tables = sum(each.nbytes for name, each in model.named_buffers() if "inv_freq" in name)
    held = held_bytes((*model.parameters(), *model.buffers()))
    assert held <= 1.02 * (weights + tables)


def test_loading_never_unpacks_the_table(
    round_it: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take several times the bytes of the file for a moment."""
    folder, _ = round_it(use="int4", dtype="bfloat16")

    def unpacks(table: GridEmbedding) -> None:
        raise AssertionError("the table was unpacked")

    monkeypatch.setattr(GridEmbedding, "_unpacked", unpacks)
    model = gateskip.load(folder).skipping.model
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)


def test_an_unpacked_table_follows_its_model(round_it: Callable[..., Made]) -> None:
    """In its type, and in training after it was made where nothing is recorded."""
    folder, _ = round_it(use="int4", dtype="bfloat16")
    model = load_model(folder)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    model = load_model(folder, "float32")
    with torch.inference_mode():
        wide = model(input_ids=torch.tensor([[3, 4]])).logits
    assert wide.dtype == torch.float32
    weight = torch.ones(1, requires_grad=True)
    (model.get_input_embeddings().weight * weight).sum().backward()
    assert weight.grad is not None
    assert load_model(folder).get_input_embeddings().float().weight.dtype == torch.float32


@pytest.mark.parametrize("use", ["int8", "int4", "int3", "int2"])
def test_a_folder_comes_back_as_it_was_rounded(
    use: str, round_it: Callable[..., Made], tiny_llama: Path
) -> None:
    folder, record = round_it(use=use)
    model = load_model(folder)
    layers = grids_of(model)
    assert len(layers) == len(record["layer_errors"]) > 0
    values = {name for name in layers if name.endswith("v_proj")}
    assert {layers[name].bits for name in layers.keys() - values} == {int(use[3:])}
    assert len(values) == 4 and {layers[name].bits for name in values} == {8}
    assert isinstance(model.get_input_embeddings(), GridEmbedding)
    tensors = load_file(folder / "model.safetensors")
    assert not any(f"{name}.weight" in tensors for name in layers)
    for name, layer in layers.items():
        assert torch.equal(layer.codes, tensors[f"{name}.codes"])
    logits = model(probe_ids(folder)).logits
    assert logits.isfinite().all()
    states = model.model(probe_ids(folder)).last_hidden_state
    torch.testing.assert_close(load_head(folder)(states), logits, atol=1e-5, rtol=1e-5)


def test_more_bits_are_nearer_to_the_dense_model(
    round_it: Callable[..., Made], tiny_llama: Path
) -> None:
    stages = ("int8", "int6", "int4", "int3", "int2")
    far = [kl(round_it(use=use)[0], tiny_llama) for use in stages]
    assert far == sorted(far) and far[0] < far[-1] / 100


def test_layers_of_6_bits_beside_4_load_without_a_minimum(round_it: Callable[..., Made]) -> None:
    folder, _ = round_it(use="int4", mixed={"down_proj": 6})
    layer = load_model(folder).get_submodule("model.layers.0.mlp.down_proj")
    assert (layer.bits, layer.minimum) == (6, None)


def test_compensation_lowers_errors_in_the_model(round_it: Callable[..., Made]) -> None:
    errors = [
        sum(round_it(use="int3", compensate=each)[1]["layer_errors"].values())
        for each in (False, True)
    ]
    assert errors[1] < 0.9 * errors[0]


def test_weights_alone_are_rounded_without_text(
    round_it: Callable[..., Made], tiny_llama: Path
) -> None:
    """No text is read, and every weight is within half a step of its grid, whatever reads it."""
    alone, record = round_it(use="int8")
    weighed, _ = round_it(use="int8", calibrate=True)
    assert record["blocks"] == 0 and max(record["layer_errors"].values()) < 0.01
    assert kl(alone, tiny_llama) < 2 * kl(weighed, tiny_llama) < 0.01
    assert grids_of(load_model(alone)).keys() == grids_of(load_model(weighed)).keys()


def test_keys_of_calibrated_stages_are_as_before() -> None:
    """A step that was made before `calibrate` came is found again."""
    assert "calibrate" not in Int4().identity({})["params"]
    assert Int4(calibrate=False).identity({})["params"]["calibrate"] is False
    assert Int4().reads_data == ("calibration",) and Int4(calibrate=False).reads_data == ()


def test_8_bits_read_text_where_it_is_asked_for() -> None:
    assert Int8().reads_data == () and not Int8().compensate
    for asked in ({"compensate": True}, {"allocate": {"size_mb": 1}}):
        stage = Int8.model_validate(asked)
        assert stage.reads_data == ("calibration",) and stage.compensate
    assert not Int8(calibrate=True).compensate


@pytest.mark.parametrize("wish", [{"compensate": True}, {"allocate": {"size_mb": 1}}])
def test_what_needs_text_is_refused_without_it(wish: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="need calibrate"):
        Int4.model_validate({"use": "int4", "calibrate": False, **wish})


def test_the_native_engine_multiplies_these_weights(round_it: Callable[..., Made]) -> None:
    folder, _ = round_it(use="int4")
    decoder = gateskip.load(folder, backend="native", rounded=False)
    reference = gateskip.load(folder, backend="reference")
    prompt = probe_ids(folder)[0].tolist()
    assert decoder.generate([prompt], 12).tokens == reference.generate([prompt], 12).tokens


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [8, 6, 4, None])
def test_embedding_and_head_are_packed_in_the_file(
    tied: bool,
    bits: int | None,
    round_it: Callable[..., Made],
    make_tiny: Callable[..., Path],
) -> None:
    source = make_tiny("llama", tie_word_embeddings=tied)
    folder, _ = round_it(source, use="int4", embedding=bits)
    tensors = load_file(folder / "model.safetensors")
    model = load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    if bits is None:
        assert "model.embed_tokens.weight" in tensors
        return
    codes = tensors["model.embed_tokens.codes"]
    assert codes.shape == (vocabulary, hidden * bits // 8)
    head = model.get_output_embeddings()
    assert isinstance(head, SharedHead if tied else GridLinear)
    assert ("lm_head.codes" in tensors) is not tied
    ids = torch.tensor([[3, 5, 7]])
    table = model.get_input_embeddings().grid().weight()
    torch.testing.assert_close(model.get_input_embeddings()(ids).float()[0], table[ids[0]])


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_is_only_looked_up_may_have_fewer_bits(
    tied: bool, round_it: Callable[..., Made], make_tiny: Callable[..., Path]
) -> None:
    source = make_tiny("llama", tie_word_embeddings=tied)
    folder, _ = round_it(source, use="int4", embedding=8, untied_embedding=4)
    model = load_model(folder)
    assert model.get_input_embeddings().bits == (8 if tied else 4)
    head = model.get_output_embeddings()
    assert isinstance(head, SharedHead) if tied else head.bits == 8
    native = gateskip.load(folder, backend="native", rounded=False)
    reference = gateskip.load(folder, backend="reference")
    prompt = probe_ids(folder)[0].tolist()
    assert native.generate([prompt], 12).tokens == reference.generate([prompt], 12).tokens


def test_bits_differ_by_layer(round_it: Callable[..., Made]) -> None:
    folder, _ = round_it(use="int4", mixed={"down_proj": 8}, skip=("v_proj",))
    layers = grids_of(load_model(folder))
    assert {layer.bits for name, layer in layers.items() if "down_proj" in name} == {8}
    assert not any("v_proj" in name for name in layers)
    assert all(layer.minimum is None for name, layer in layers.items() if "down_proj" in name)


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({"values": None}, {4}),
        ({"values": 3}, {3}),
        ({"mixed": {"layers.1.self_attn.v_proj": 4}}, {4, 8}),
        ({"offset": "integer"}, None),
    ],
)
def test_values_have_bits_of_their_own(
    settings: dict[str, Any], bits: set[int] | None, round_it: Callable[..., Made]
) -> None:
    folder, _ = round_it(use="int4", compensate=False, **settings)
    if bits is None:
        words = load_file(folder / "model.safetensors")["model.layers.0.self_attn.v_proj.qweight"]
        assert words.shape[0] * 8 == 64, "eight codes of 4 bits in a word"
        return
    layers = grids_of(load_model(folder))
    assert {layer.bits for name, layer in layers.items() if name.endswith("v_proj")} == bits
    assert {layer.bits for name, layer in layers.items() if name.endswith("k_proj")} == {4}


def test_values_in_eight_bits_are_nearer_to_the_dense_model(
    round_it: Callable[..., Made], tiny_llama: Path
) -> None:
    near, far = (kl(round_it(use="int2", **each)[0], tiny_llama) for each in ({}, {"values": None}))
    assert near < far


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fused_values_have_the_bits_of_the_rest(
    family: str, round_it: Callable[..., Made], make_tiny: Callable[..., Path]
) -> None:
    """And the plan knows in which families these are no layer of their own."""
    assert (len(FAMILIES[family].qkv) == 1) is (family in FUSED_QKV)
    if family not in FUSED_QKV:
        return
    embedding = None if family == "gpt_neox" else 8
    folder, _ = round_it(make_tiny(family), use="int4", compensate=False, embedding=embedding)
    assert {layer.bits for layer in grids_of(load_model(folder)).values()} == {4}


def test_the_same_seed_gives_the_same_file(round_it: Callable[..., Made]) -> None:
    one, two = (round_it(use="int4")[0] / "model.safetensors" for _ in range(2))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("learning", ["scales", "codes"])
def test_scales_and_minima_learn_and_codes_where_asked(
    learning: str, round_it: Callable[..., Made]
) -> None:
    """A weight's place begins up to 0.3 grid steps from its code and changes it at 0.5. Twenty
    steps of training move it by 0.21 at most: the last bits of sums, which follow threads and
    instructions, would decide whether any code changes. Forty move it by up to 0.41."""
    folder, _ = round_it(use="int2")
    healed, record = round_it(
        folder, use="heal", backbone=learning, steps=40, lr=3e-3, validate_every=20
    )
    assert record["held_out"]["after"] < record["held_out"]["before"]
    before, after = (load_file(each / "model.safetensors") for each in (folder, healed))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.endswith(".scale") for name in changed)
    assert any(name.endswith(".minimum") for name in changed)
    assert any(name.endswith(".codes") for name in changed) is (learning == "codes")
    assert all(after[name].dtype == before[name].dtype for name in before)


def test_codes_bring_more_than_scales_alone(round_it: Callable[..., Made]) -> None:
    folder, _ = round_it(use="int2", compensate=False)
    settings = {"use": "heal", "steps": 40, "lr": 3e-3, "validate_every": 20}
    scales, codes = (
        round_it(folder, backbone=learning, **settings)[1]["held_out"]
        for learning in ("scales", "codes")
    )
    assert scales["before"] == codes["before"], "both begin with the codes of the folder"
    assert codes["after"] < scales["after"]


def test_integer_zero_points_are_a_gptq_folder(round_it: Callable[..., Made]) -> None:
    """Read by gptqmodel through transformers: other code than what wrote it."""
    folder, record = round_it(use="int4", offset="integer")
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == (
        "gptq_v2"
    )
    model = load_model(folder)
    layer = model.model.layers[0].mlp.down_proj
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    shifts = torch.arange(0, 32, 4)
    words = tensors[f"{name}.qweight"].long() & 0xFFFFFFFF
    codes = ((words.unsqueeze(1) >> shifts.view(1, -1, 1)) & 15).flatten(0, 1)  # [in, out]
    zeros = tensors[f"{name}.qzeros"].long() & 0xFFFFFFFF
    zeros = ((zeros.unsqueeze(2) >> shifts) & 15).flatten(1)  # [groups, out]
    groups = tensors[f"{name}.g_idx"].long()
    wanted = (codes - zeros[groups]) * tensors[f"{name}.scales"].float()[groups]
    found = layer.dequantize_weight().float()[: len(wanted)]
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0.02)
    assert set(record["layer_errors"]) and probe_logits(folder).isfinite().all()


def test_gates_go_along(round_it: Callable[..., Made]) -> None:
    gated, _ = round_it(use="gate", steps=2, length=32, budgets=[0.8])
    folder, _ = round_it(gated, use="int4")
    decoder = gateskip.load(folder)
    assert decoder.kept(0.8) == gateskip.load(gated).kept(0.8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offset": "integer", "embedding": 8}, "embedding: null"),
        ({"offset": "integer", "mixed": {"down_proj": 8}}, "offset: real"),
        ({"offset": "integer", "values": 8}, "leave mixed and values out"),
        ({"embedding": None, "untied_embedding": 4}, "set embedding: 6 or 8"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Int4.model_validate({"use": "int4", **settings})


def test_a_head_of_another_name_is_refused(
    round_it: Callable[..., Made], make_tiny: Callable[..., Path]
) -> None:
    """GPT-NeoX files call it `embed_out`, its model `lm_head`."""
    with pytest.raises(UserError, match="has another name") as caught:
        round_it(make_tiny("gpt_neox"), use="int8")
    assert "embedding: null" in str(caught.value.fix)


def test_groups_divide() -> None:
    shape = ModelShape("llama", 64, 96, 2, 4, 2, 16, 100, True)
    with pytest.raises(RuleBroken, match="96 inputs"):
        Int4(use="int4", group_size=64).check(shape, ())
    with pytest.raises(RuleBroken, match="quantized weights cannot be trained"):
        Gate(use="gate").check(shape, (Int4(use="int4"),))


@pytest.mark.parametrize(("by", "tied"), [("gradients", True), ("measured", False)])
def test_bits_are_shared_out_under_a_size(
    by: str, tied: bool, round_it: Callable[..., Made], make_tiny: Callable[..., Path]
) -> None:
    source = make_tiny("llama", num_hidden_layers=3, tie_word_embeddings=tied)
    made = {use: round_it(source, use=use, untied_embedding=4)[0] for use in ("int2", "int8")}
    sizes = {
        use: sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
        for use, folder in made.items()
    }
    limit = (sizes["int2"] + sizes["int8"]) / 2
    folder, record = round_it(
        source,
        use="int4",
        compensate=False,
        untied_embedding=4,
        allocate={"size_mb": limit / 1e6, "among": [2, 4, 8], "by": by},
    )
    taken = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    assert 0.85 * limit < taken <= limit
    layers = grids_of(load_model(folder))
    found = {name: layer.bits for name, layer in layers.items() if name != "lm_head"}
    assert found == record["layer_bits"]
    groups = {name: layer.group for name, layer in layers.items() if name != "lm_head"}
    assert groups == record["layer_groups"]
    assert set(groups.values()) == {32, 64}, "groups are chosen, too"
    assert len(set(record["layer_bits"].values())) > 1
    allocation = record["allocation"]
    assert allocation["by"] == by
    measured = allocation["sensitivities"].keys()
    assert measured == record["layer_bits"].keys(), "values are not set apart"
    assert ("kl" in allocation) is (by == "measured"), "gradients have no model to measure with"
    lost = allocation.get("kl") or kl(folder, source)
    assert allocation["predicted_kl"] / 2 < lost < 2 * allocation["predicted_kl"]


def test_values_that_are_asked_for_stand_above_bits_by_need(round_it: Callable[..., Made]) -> None:
    asked = {"bits_per_weight": 4, "among": [2, 4]}
    folder, record = round_it(use="int4", compensate=False, values=8, allocate=asked)
    layers = grids_of(load_model(folder))
    assert {layer.bits for name, layer in layers.items() if name.endswith("v_proj")} == {8}
    assert not any(name.endswith("v_proj") for name in record["allocation"]["sensitivities"])


def test_a_size_that_cannot_be_met_is_refused(round_it: Callable[..., Made]) -> None:
    with pytest.raises(UserError, match="allocate finds no bits that fit"):
        round_it(use="int4", allocate={"size_mb": 0.001})
    with pytest.raises(ValidationError, match="either size_mb or bits_per_weight"):
        Int4.model_validate({"use": "int4", "allocate": {}})


@pytest.mark.slow
def test_transformers_alone_loads_what_carries_its_code(
    round_it: Callable[..., Made], tmp_path: Path
) -> None:
    """In a process that cannot import this package."""
    folder, _ = round_it(use="int4", mixed={"down_proj": 8})
    write_loader(folder)
    script = (
        "import sys, torch; sys.modules['gateskip'] = sys.modules['compose'] = None\n"
        "from transformers import AutoModelForCausalLM as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "ids = torch.tensor([[3, 5, 7, 9]])\n"
        "torch.save(model(ids).logits, sys.argv[2])\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    found = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        ours = load_model(folder)(torch.tensor([[3, 5, 7, 9]])).logits
    torch.testing.assert_close(found, ours)
