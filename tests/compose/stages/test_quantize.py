"""Quantizers: every setting reaches the library, and the folder is what others read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import gateskip
from compose.artifacts.folder import copy_companions, probe_ids
from compose.errors import RuleBroken, UserError
from compose.stages.quantize.errors import layer_errors
from compose.stages.registry import STAGES, DataSpec, StageJob
from gateskip.quantization.folders import load_model, mixed_bits
from gateskip.quantization.packed_linear import accelerate_linears

SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)
KERNELS_DIFFER = 0.05  # gptqmodel's kernels for float32 compute in bfloat16
Made = tuple[Path, dict[str, Any]]


@pytest.fixture
def quantize(
    tmp_path: Path, licence_text: Path, tiny_llama: Path, make_job: Callable[..., StageJob]
) -> Callable[..., Made]:
    """`quantize(use=..., ...)` makes a folder; returns it and the stage's record."""

    def go(source: Path = tiny_llama, dtype: str = "float32", **parameters: Any) -> Made:
        target = tmp_path / f"made-{len(list(tmp_path.iterdir()))}"
        target.mkdir()
        spec = DataSpec(source=str(licence_text), limit=8, length=64)
        job = make_job(source, target, dtype=dtype, calibration=spec)
        record = STAGES[parameters["use"]].model_validate(parameters).run(job)
        copy_companions(source, job.target)
        return job.target, record

    return go


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def mean(record: dict[str, Any]) -> float:
    errors = record["layer_errors"]
    return float(sum(errors.values()) / len(errors))


def autogptq_weight(tensors: dict[str, Tensor], layer: str) -> Tensor:
    """What AutoGPTQ's own kernels multiply by, from its format's description: [out, in]."""
    packed, zeros = tensors[f"{layer}.qweight"], tensors[f"{layer}.qzeros"]
    codes = (packed.unsqueeze(1) >> SHIFTS.view(1, -1, 1) & 15).reshape(-1, packed.shape[1])
    zeros = (zeros.unsqueeze(2) >> SHIFTS & 15).flatten(1) + 1  # [groups, out]
    groups = tensors[f"{layer}.g_idx"].long()
    scales = tensors[f"{layer}.scales"].float()
    return (scales[groups] * (codes - zeros[groups])).T


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_gptqmodels_own_loader_takes_our_folders(bits: int, quantize: Callable[..., Made]) -> None:
    """And vLLM's finds what it reads: four tensors a layer, and these entries of the config."""
    from gptqmodel import BACKEND, GPTQModel

    folder, _ = quantize(use="gptq", group_size=32, bits=bits)
    theirs = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH)
    ids = probe_ids(folder)
    with torch.inference_mode():
        found = theirs.model(ids).logits.float()
        ours = load_model(folder, "float32")(ids).logits
    assert (found - ours).abs().mean() < 0.05 * ours.std()
    stated = settings(folder)
    assert {"quant_method", "bits", "group_size", "desc_act"} <= stated.keys()
    tensors = load_file(folder / "model.safetensors")
    layer = {n.rpartition(".")[2] for n in tensors if n.startswith("model.layers.0.mlp.up_proj.")}
    assert layer == {"qweight", "qzeros", "scales", "g_idx"}


def test_loading_mixed_bits_leaves_transformers_tables_as_they_were(
    quantize: Callable[..., Made],
) -> None:
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
    )

    folder, _ = quantize(**MIXED)  # optimum and gptqmodel may register their own
    before = dict(AUTO_QUANTIZATION_CONFIG_MAPPING), dict(AUTO_QUANTIZER_MAPPING)
    load_model(folder)
    assert before == (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING)
    with pytest.raises(KeyError), mixed_bits():
        raise KeyError(folder)
    assert before == (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING)


MIXED = {"use": "gptq", "group_size": 32, "mixed": {"down_proj": 8, "0.self_attn.v_proj": 8}}


@pytest.mark.slow
def test_layers_may_differ_in_bits(quantize: Callable[..., Made]) -> None:
    """Errors fall where bits were added; the engine and gptqmodel's own loader see one model."""
    from gptqmodel import BACKEND, GPTQModel

    _, before = quantize(use="gptq", group_size=32)
    folder, record = quantize(**MIXED, skip=("1.mlp.up_proj",))
    errors, wide = record["layer_errors"], 0.1
    for name, error in errors.items():
        eight = name.endswith("down_proj") or name == "model.layers.0.self_attn.v_proj"
        assert (error < wide * before["layer_errors"][name]) == eight, name
    assert "model.layers.1.mlp.up_proj" not in errors
    assert len(errors) == len(before["layer_errors"]) - 1
    assert settings(folder).keys() >= {"dynamic", "bits", "quant_method"}
    assert "meta" not in settings(folder)
    ids = probe_ids(folder)
    theirs = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH).model
    ours = load_model(folder, theirs.dtype)
    for name in errors:
        pair = [model.get_submodule(name).dequantize_weight().float() for model in (theirs, ours)]
        torch.testing.assert_close(*pair, rtol=1e-2, atol=1e-3)  # one of them in bfloat16
    with torch.inference_mode():
        found, wanted = (model(ids).logits.float() for model in (theirs, ours))
    assert (found - wanted).abs().mean() < 0.05 * wanted.std()
    decoder = gateskip.load(folder, "float32", rounded=False)
    assert decoder.fallback is None
    rounded = gateskip.load(folder, "float32")
    assert rounded.skipping.engine.rounded
    exact, near = (last_logits(each, ids) for each in (decoder, rounded))
    assert 0 < (near - exact).norm() < 0.05 * exact.norm()
    slow = last_logits(gateskip.load(folder, "float32", backend="gathered"), ids)
    assert (slow - exact).norm() < KERNELS_DIFFER * exact.norm()


def last_logits(decoder: Any, ids: Tensor) -> Tensor:
    """Logits [1, 1, V] after ids [1, S], the last of which is a step by itself."""
    skipping, last = decoder.skipping, ids.shape[1] - 1
    cache = skipping.new_cache(1, last + 1)
    skipping.forward(ids[:, :last], cache, [0])
    logits: Tensor = skipping.head(skipping.decode(ids[:, last:].tolist(), cache, [0], [last]))
    return logits


def test_mixed_bits_are_the_same_twice(
    quantize: Callable[..., Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leave nothing where they were made."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    first, second = (load_file(quantize(**MIXED)[0] / "model.safetensors") for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list(here.iterdir())


def test_an_untied_lm_head_may_be_packed(tiny_qwen2: Path, quantize: Callable[..., Made]) -> None:
    folder, record = quantize(tiny_qwen2, use="gptq", group_size=32, sym=True, lm_head=8)
    assert 0 < record["layer_errors"]["lm_head"] < 0.02
    tensors = load_file(folder / "model.safetensors")
    assert tensors["lm_head.qweight"].shape[0] == 64 // 4  # four codes of 8 bits in an int32
    assert "lm_head.weight" not in tensors
    exact = last_logits(gateskip.load(folder, "float32", rounded=False), probe_ids(folder))
    slow = last_logits(gateskip.load(folder, "float32", backend="gathered"), probe_ids(folder))
    assert (slow - exact).norm() < KERNELS_DIFFER * exact.norm()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "gemma2"])
def test_layers_of_other_families_differ_in_bits(
    family: str, make_tiny: Callable[..., Path], quantize: Callable[..., Made]
) -> None:
    folder, record = quantize(make_tiny(family), **MIXED | {"mixed": {"down_proj": 8}})
    errors = record["layer_errors"]
    wide = [error for name, error in errors.items() if name.endswith("down_proj")]
    assert len(wide) == 4
    assert max(wide) < 0.2 * min(error for error in errors.values() if error not in wide)
    assert load_model(folder, "float32")(probe_ids(folder)).logits.isfinite().all()


def test_layers_that_gptqmodel_passes_over_are_named(
    make_tiny: Callable[..., Path], quantize: Callable[..., Made]
) -> None:
    with pytest.raises(UserError, match=r"does not pack .* such as model.layers.0.mlp") as raised:
        quantize(make_tiny("phi3"), **MIXED | {"mixed": {"o_proj": 8}})
    assert "leave mixed" in str(raised.value.fix)


def test_a_layer_that_is_not_there_is_refused(quantize: Callable[..., Made]) -> None:
    with pytest.raises(UserError, match="mixed: no linear layer is called 'downproj'"):
        quantize(use="gptq", group_size=32, mixed={"downproj": 8})


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_gptq_from_the_file_is_that_of_the_whole_model(
    family: str,
    make_tiny: Callable[..., Path],
    quantize: Callable[..., Made],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One layer at a time or through optimum, which holds the model: the same tensors."""
    from compose.stages.quantize import gptq

    monkeypatch.chdir(make_tiny(family))
    by_layer, record = quantize(Path(), use="gptq")  # read from elsewhere, too
    monkeypatch.setattr(gptq, "UNKNOWN", (family,))
    whole, again = quantize(make_tiny(family), use="gptq")
    assert settings(whole)["meta"]["quantizer"][0].startswith("optimum")
    first, second = (load_file(folder / "model.safetensors") for folder in (by_layer, whole))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert record == again


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "arcee"])
def test_gptq_of_what_gptqmodel_does_not_know(
    family: str, make_tiny: Callable[..., Path], quantize: Callable[..., Made]
) -> None:
    folder, record = quantize(make_tiny(family), use="gptq")
    assert 0 < mean(record) < 0.2
    assert load_model(folder, "float32")(probe_ids(folder)).logits.isfinite().all()


def test_mixed_bits_of_what_gptqmodel_does_not_know_are_refused(
    make_tiny: Callable[..., Path], quantize: Callable[..., Made]
) -> None:
    with pytest.raises(RuleBroken, match="does not know the layers of arcee"):
        quantize(make_tiny("arcee"), **MIXED)


def test_layers_may_be_placed_by_accelerate(quantize: Callable[..., Made]) -> None:
    stage = {"use": "bnb", "format": "nf4"}
    placed, whole = (quantize(**stage, **more)[0] for more in ({"device_map": "auto"}, {}))
    first, second = (load_file(folder / "model.safetensors") for folder in (placed, whole))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    plain = STAGES[stage["use"]].model_validate(stage)
    assert plain.model_copy(update={"device_map": "auto"}).identity({}) == plain.identity({})


def test_whole_rows_need_a_symmetric_grid() -> None:
    with pytest.raises(ValueError, match="needs a symmetric grid"):
        STAGES["gptq"].model_validate({"use": "gptq", "group_size": -1, "sym": False})


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_in_the_format_that_autogptq_reads(
    act_order: bool, quantize: Callable[..., Made]
) -> None:
    folder, _ = quantize(use="gptq", group_size=32, sym=True, act_order=act_order)
    stated = settings(folder)
    wanted = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    assert wanted.items() <= stated.items()
    assert (stated["desc_act"], stated["checkpoint_format"]) == (act_order, "gptq")
    tensors, model = load_file(folder / "model.safetensors"), load_model(folder, "float32")
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        ours = model.get_submodule(f"model.layers.1.{name}").dequantize_weight().T.float()
        theirs = autogptq_weight(tensors, f"model.layers.1.{name}")
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)


def test_a_grid_that_is_not_symmetric_says_that_it_has_the_newer_format(
    quantize: Callable[..., Made],
) -> None:
    folder, record = quantize(use="gptq", sym=False)
    assert settings(folder)["checkpoint_format"] == "gptq_v2"
    assert mean(record) < mean(quantize(use="gptq", sym=True)[1])


@pytest.mark.parametrize("sym", [True, False])
def test_foem_makes_a_plain_gptq_folder(
    sym: bool, tiny_llama: Path, quantize: Callable[..., Made]
) -> None:
    """Its beta reaches gptqmodel: other codes; and transformers loads what it made by itself."""
    from transformers import AutoModelForCausalLM

    settings_of = {"use": "gptq", "group_size": 32, "sym": sym}
    some, more = (quantize(**settings_of, foem=beta) for beta in (0.05, 0.5))
    stated = settings(some[0])
    assert stated["checkpoint_format"] == ("gptq" if sym else "gptq_v2")
    assert not {"dynamic", "lm_head", "foem", "meta"} & stated.keys()
    first, second = (load_file(folder / "model.safetensors") for folder, _ in (some, more))
    name = "model.layers.1.mlp.down_proj.qweight"
    assert first.keys() == second.keys() and not torch.equal(first[name], second[name])
    assert mean(some[1]) < 1.1 * mean(quantize(**settings_of)[1])
    theirs = AutoModelForCausalLM.from_pretrained(some[0], dtype=torch.float32)
    ours, layer = load_model(some[0], "float32"), name.removesuffix(".qweight")
    pair = [each.get_submodule(layer).dequantize_weight() for each in (theirs, ours)]
    assert torch.equal(*pair)
    dense = load_model(tiny_llama, "float32").get_submodule(layer).weight.T
    assert (pair[0] - dense).norm() < 0.2 * dense.norm()


def test_a_gptqmodel_without_foem_is_refused_by_name(
    quantize: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gptqmodel.quantization

    monkeypatch.delattr(gptqmodel.quantization, "FOEMConfig")
    with pytest.raises(UserError, match=r"foem: gptqmodel [\d.]+ has no FOEM") as refused:
        quantize(use="gptq", foem=0.2)
    assert "leave foem out" in str(refused.value.fix)


@pytest.mark.parametrize("use", ["gptq", "bnb"])
def test_no_text_and_no_path_stays_in_the_config(use: str, quantize: Callable[..., Made]) -> None:
    folder, _ = quantize(use=use, **({"format": "nf4"} if use == "bnb" else {}))
    written = (folder / "config.json").read_text()
    stated = json.loads(written)["quantization_config"]
    assert not stated.get("dataset") and not stated.get("tokenizer")
    assert "input_ids" not in written and "tensor(" not in written and "License" not in written


@pytest.mark.slow
def test_more_bits_err_less(quantize: Callable[..., Made]) -> None:
    errors = [mean(quantize(use="gptq", bits=bits)[1]) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 < errors[0]


def test_calibration_in_batches_gives_the_same_weights(quantize: Callable[..., Made]) -> None:
    """Sums come in another order, so that the few weights halfway between two codes may turn."""
    one, many = (quantize(use="gptq", batch=batch)[0] for batch in (1, 4))
    first, second = (load_model(folder, "float32") for folder in (one, many))
    for a, b in zip(first.model.layers, second.model.layers, strict=True):
        pair = [layer.mlp.up_proj.dequantize_weight() for layer in (a, b)]
        assert ((pair[0] - pair[1]).abs() > 0.05).float().mean() < 0.05


def test_skipped_layers_stay_as_they_are(quantize: Callable[..., Made], tiny_llama: Path) -> None:
    dense = load_model(tiny_llama, "float32")
    for use, skip in (
        ({"use": "gptq"}, ("down_proj", "self_attn.v_proj")),
        ({"use": "bnb", "format": "nf4"}, ("down_proj", "self_attn.v_proj")),
    ):
        folder, record = quantize(**use, skip=skip)
        layers = load_model(folder, "float32").model.layers
        for before, after in zip(dense.model.layers, layers, strict=True):
            assert torch.equal(before.mlp.down_proj.weight, after.mlp.down_proj.weight)
            assert torch.equal(before.self_attn.v_proj.weight, after.self_attn.v_proj.weight)
            assert type(after.mlp.up_proj) is not torch.nn.Linear
        assert len(record["layer_errors"]) == 5 * 4
        decoder = gateskip.load(folder)
        ids = decoder.tokenizer("Grant of Copyright License").input_ids
        assert len(decoder.generate([ids], 8).tokens[0]) == 8


def test_a_layer_that_is_not_there_is_named(quantize: Callable[..., Made]) -> None:
    for use in ({"use": "gptq"}, {"use": "bnb", "format": "int8"}):
        with pytest.raises(UserError, match=r"'down_prj'.*did you mean 'down_proj'"):
            quantize(**use, skip=("down_prj",))


def test_four_bit_settings_reach_bitsandbytes(quantize: Callable[..., Made]) -> None:
    nf4 = quantize(use="bnb", format="nf4")
    fp4 = quantize(use="bnb", format="fp4", double_quant=True, compute_dtype="bfloat16")
    assert mean(nf4[1]) < mean(fp4[1])
    stated = settings(fp4[0])
    assert stated["bnb_4bit_quant_type"] == "fp4" and stated["bnb_4bit_use_double_quant"]
    assert stated["bnb_4bit_compute_dtype"] == "bfloat16"
    state = load_model(fp4[0], "float32").model.layers[0].mlp.up_proj.weight.quant_state
    assert state.nested and state.quant_type == "fp4"
    assert settings(nf4[0])["bnb_4bit_compute_dtype"] == "float32"


def test_int8_threshold_reaches_bitsandbytes(quantize: Callable[..., Made]) -> None:
    folder, record = quantize(use="bnb", format="int8", threshold=2.5)
    assert settings(folder)["llm_int8_threshold"] == 2.5
    assert 0 < mean(record) < 0.02


def test_an_untied_head_is_packed_when_asked(
    quantize: Callable[..., Made], tiny_qwen2: Path
) -> None:
    for head in (False, True):
        folder, record = quantize(
            tiny_qwen2, use="bnb", format="nf4", lm_head=head, skip=("q_proj",)
        )
        assert ("lm_head" in record["layer_errors"]) is head
        assert "model.layers.0.self_attn.q_proj" not in record["layer_errors"]
        model = load_model(folder, "float32")
        assert (type(model.lm_head) is torch.nn.Linear) is not head
        decoder = gateskip.load(folder, rounded=False)
        ids = torch.tensor([decoder.tokenizer("Grant of Copyright License").input_ids])
        cache = decoder.skipping.new_cache(1, ids.shape[1])
        with torch.inference_mode():
            ours = decoder.skipping.head(decoder.skipping.forward(ids, cache, [0]))
            theirs = model.train()(ids).logits  # evaluating, it multiplies in bfloat16
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_errors_are_those_of_each_layer_on_what_it_is_given(
    quantize: Callable[..., Made], tiny_llama: Path, make_job: Callable[..., StageJob]
) -> None:
    """The first layer's, from the weights alone, by hand."""
    from bitsandbytes.functional import dequantize_4bit

    folder, record = quantize(use="bnb", format="nf4")
    dense, packed = load_model(tiny_llama, "float32"), load_model(folder, "float32")
    layer, packed_layer = dense.model.layers[0], packed.model.layers[0].self_attn.q_proj
    with torch.inference_mode():
        x = layer.input_layernorm(dense.model.embed_tokens(probe_ids(tiny_llama)))
        weight = dequantize_4bit(packed_layer.weight.data, packed_layer.weight.quant_state).float()
        y = x @ layer.self_attn.q_proj.weight.T
        error = float((x @ weight.T - y).norm() / y.norm())
    assert record["layer_errors"]["model.layers.0.self_attn.q_proj"] == pytest.approx(
        error, rel=0.02
    )
    assert list(record["layer_errors"])[-1] == "model.layers.3.mlp.down_proj"
    same = make_job(tiny_llama, tiny_llama)
    assert layer_errors(same, probe_ids(tiny_llama)) == {}, "nothing is packed"


# --- autoround -----------------------------------------------------------------------------------

AUTOROUND = {"use": "autoround", "iters": 6, "batch": 4}


@pytest.fixture
def auto_round() -> Any:
    return pytest.importorskip("auto_round", reason="pip install 'gateskip-compose[autoround]'")


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"bits": 8, "sym": True}], ids=str)
def test_autoround_saves_what_the_library_learned(
    more: dict[str, Any],
    auto_round: Any,
    quantize: Callable[..., Made],
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The folder's weights are the library's own, bit by bit, and it saw our token ids alone."""
    import compose.stages.quantize.autoround as stage

    given: list[Any] = []
    left: dict[str, Tensor] = {}
    original, entry = stage.grid_of, auto_round.AutoRound

    def seen(layer: Any, bits: int) -> Any:
        grid = original(layer, bits)
        left[str(len(left))] = layer.weight.detach().clone()
        assert torch.equal(grid.weight(), left[str(len(left) - 1)])
        return grid

    def told(*args: Any, **settings: Any) -> Any:
        given.append(settings)
        return entry(*args, **settings)

    monkeypatch.setattr(stage, "grid_of", seen)
    monkeypatch.setattr(auto_round, "AutoRound", told)
    folder, record = quantize(**AUTOROUND, **more)
    (settings_given,) = given
    assert len(settings_given["dataset"]) == record["blocks"] == settings_given["nsamples"]
    assert all(row["input_ids"].shape == (1, 64) for row in settings_given["dataset"])
    stated = settings(folder)
    layout = "gptq" if more.get("sym") else "gptq_v2"
    assert (stated["quant_method"], stated["checkpoint_format"]) == ("gptq", layout)
    model = load_model(folder, "float32")
    dense = load_model(tiny_llama).model.layers.named_modules()
    names = [name for name, part in dense if isinstance(part, torch.nn.Linear)]
    assert len(names) == len(left) == 28
    for name, weight in zip(names, left.values(), strict=True):
        found = model.model.layers.get_submodule(name).dequantize_weight().T
        assert torch.equal(found.half().float(), weight.half().float()), name
    assert 0 < mean(record) < {4: 0.15, 8: 0.015}[more.get("bits", 4)]
    decoder = gateskip.load(folder, "float32", rounded=False)
    slow = gateskip.load(folder, "float32", backend="gathered")
    ids = probe_ids(folder)
    exact, other = (last_logits(each, ids) for each in (decoder, slow))
    assert (exact - other).norm() < 0.15 * other.norm()  # one multiplies in bfloat16


@pytest.mark.parametrize(("bits", "sym"), [(2, True), (3, False)])
def test_gptq_of_few_bits_runs_on_our_kernels(
    bits: int, sym: bool, quantize: Callable[..., Made]
) -> None:
    folder, _ = quantize(use="gptq", group_size=32, bits=bits, sym=sym)
    model = load_model(folder, "float32")
    wanted = {
        name: module.dequantize_weight().T.float()
        for name, module in model.named_modules()
        if hasattr(module, "qweight")
    }
    assert accelerate_linears(model)["PackedLinear"] == len(wanted) == 4 * 7
    for name, weight in wanted.items():
        layer = model.get_submodule(name)
        assert layer.bits == bits
        torch.testing.assert_close(layer.unpacked(), weight, atol=1e-3, rtol=1e-3)
