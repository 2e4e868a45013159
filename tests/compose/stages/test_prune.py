"""Pruning: what goes is what matters least, what stays computes as before, and folders reload."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drafts import SKIPPING
from tiny_models import stored_as

import gateskip
from compose.artifacts.folder import copy_companions, probe_logits
from compose.errors import RuleBroken, UserError
from compose.stages.base import Stage
from compose.stages.gate_transfer import thresholds_from_decoding
from compose.stages.prune.edit import GATED_MLP, block_loss, text_loss
from compose.stages.prune.hidden import READERS
from compose.stages.prune.importance import taylor_scores
from compose.stages.prune.refit import refitted
from compose.stages.registry import (
    STAGES,
    DataSpec,
    ModelShape,
    PruneHeads,
    PruneHidden,
    PruneWidth,
    StageJob,
)
from compose.stages.text.split_text import split_blocks
from gateskip.checkpoint import GateFile, load_gates, save_gates
from gateskip.model.families import backbone
from gateskip.model.gating import ANCHORS
from gateskip.quantization.folders import load_model

BLOCK = 32
EXACT = {"atol": 2e-4, "rtol": 0.0}
CAN_CUT_HEADS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3")
GREEDY = {"use": "drop-layers", "metric": "perplexity-greedy"}
Run = Callable[..., tuple[Path, dict[str, Any]]]
Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def spec(licence_text: Path) -> DataSpec:
    return DataSpec(source=str(licence_text), limit=6, length=BLOCK)


def job_of(source: Path, target: Path, spec: DataSpec) -> StageJob:
    return StageJob(
        source=source,
        target=target,
        seed=0,
        dtype="float32",
        train=spec.model_copy(update={"limit": 200}),
        calibration=spec,
        dense=source,
        progress=lambda done, total, phase, **_: None,
        work=target.with_name(f"{target.name}-work"),
        asset_cache=target.with_name("cache"),
    )


@pytest.fixture
def run(spec: DataSpec, tmp_path: Path) -> Run:
    """`run(source, use=..., ...)`: the folder that the worker would make, and the record."""

    def go(source: Path, **parameters: Any) -> tuple[Path, dict[str, Any]]:
        stage: Stage = STAGES[parameters["use"]].model_validate(parameters)
        target = tmp_path / f"made-{len(list(tmp_path.iterdir()))}"
        target.mkdir()
        record = stage.run(job_of(source, target, spec))
        copy_companions(source, target)
        assert json.loads(json.dumps(record)), "a record is plain JSON"
        return target, record

    return go


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """`edited(folder, change)`: a copy of a model folder after `change(model)`."""

    def make(folder: Path, change: Callable[[Any], None]) -> Path:
        target = tmp_path / f"edited-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, target)
        model = load_model(folder, "float32")
        with torch.no_grad():
            change(model)
        model.save_pretrained(target)
        return target

    return make


def blocks(folder: Path, spec: DataSpec) -> torch.Tensor:
    from transformers import AutoTokenizer

    return split_blocks(
        job_of(folder, folder, spec), "calibration", AutoTokenizer.from_pretrained(folder)
    )


def config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def shape(folder: Path) -> ModelShape:
    return ModelShape.from_config(config(folder))


def layers_of(folder: Path) -> Any:
    return backbone(load_model(folder, "float32")).layers


def generates_as_without_cache(folder: Path) -> None:
    """Plain transformers, 12 new tokens: a wrong cache index or KV head shows here."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(5, 25).unsqueeze(0)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, plain = (model.generate(ids, use_cache=use, **settings) for use in (True, False))
    assert cached.shape == (1, 32)
    assert torch.equal(cached, plain)


# -- the types that weights are stored in

STAGES_THAT_PRUNE: dict[str, dict[str, Any]] = {
    "layers": {"use": "drop-layers", "count": 2},
    "greedy": {**GREEDY, "count": 1, "refit": False},
    "heads": {"use": "prune-heads", "count": 2},
    "gradients": {"use": "prune-heads", "count": 2, "take": "queries", "importance": "taylor"},
    "width": {"use": "prune-width", "ratio": 0.3, "round_to": 8},
    "magnitude": {"use": "prune-width", "ratio": 0.3, "round_to": 8, "importance": "magnitude"},
    "hidden": {"use": "prune-hidden", "ratio": 0.25, "round_to": 4},
}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize("parameters", STAGES_THAT_PRUNE.values(), ids=STAGES_THAT_PRUNE)
def test_weights_stay_as_they_are_stored_and_the_result_is_that_of_float32(
    parameters: dict[str, Any], family: str, make_tiny: Tiny, spec: DataSpec, tmp_path: Path
) -> None:
    """To the bit. The source, which is mapped, is only read."""
    small = stored_as(make_tiny(family), "bfloat16", tmp_path / "small")
    wide = stored_as(small, "float32", tmp_path / "wide")
    stage = STAGES[parameters["use"]].model_validate(parameters)
    made, records = [], []
    for source in (small, wide):
        for file in make_tiny(family).glob("tokenizer*"):
            shutil.copy(file, source)
        before = weights_of(source)
        (target := tmp_path / f"{source.name}-made").mkdir()
        records.append(stage.run(replace(job_of(source, target, spec), dtype="bfloat16")))
        made.append(load_model(target, torch.bfloat16).state_dict())
        assert weights_of(source) == before
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())
    losses = [record.pop("loss") for record in records]
    assert records[0] == records[1] and losses[0]["before"] == losses[1]["before"]
    assert losses[0]["after"] == pytest.approx(losses[1]["after"], rel=2e-2)


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# -- layers


def test_greedy_search_drops_what_the_loss_misses_least_each_time(
    run: Run, make_tiny: Tiny
) -> None:
    """Its first choice is the best of all single drops, its second the best after the first."""
    source = make_tiny("llama")
    alone = [
        run(source, use="drop-layers", layers=[i], refit=False)[1]["loss"]["after"]
        for i in range(4)
    ]
    both, record = run(source, refit=False, **GREEDY, count=2)
    first, second = record["rounds"]
    assert first["layer"] == alone.index(min(alone))
    assert list(first["losses"].values()) == pytest.approx(alone, abs=1e-5)
    rest, _ = run(source, use="drop-layers", layers=[first["layer"]], refit=False)
    again = [
        run(rest, use="drop-layers", layers=[i], refit=False)[1]["loss"]["after"] for i in range(3)
    ]
    assert list(second["losses"].values()) == pytest.approx(again, abs=1e-5)
    assert second["loss"] == pytest.approx(min(again), abs=1e-5)
    assert record["loss"]["after"] == pytest.approx(second["loss"], abs=1e-5)
    assert len(layers_of(both)) == 2
    assert record["dropped"] == sorted([first["layer"], second["layer"]])


def test_greedy_search_and_block_influence_can_disagree(
    run: Run, make_tiny: Tiny, edited: Callable[..., Path]
) -> None:
    """A layer that turns the stream a lot, only to make predictions worse, goes by loss alone."""

    def harm(model: Any) -> None:
        """Only layer 3 writes what the head reads: without it, all tokens are as likely."""
        for layer in backbone(model).layers[:3]:
            layer.self_attn.o_proj.weight[32:] = 0
            layer.mlp.down_proj.weight[32:] = 0
        model.model.embed_tokens.weight[:, 32:] = 0
        model.model.norm.weight[:32] = 0
        backbone(model).layers[3].mlp.down_proj.weight.mul_(8)

    source = edited(make_tiny("llama", tie_word_embeddings=False), harm)
    _, by_loss = run(source, refit=False, **GREEDY, count=1)
    _, by_angle = run(source, refit=False, use="drop-layers", count=1)
    assert by_loss["dropped"] == [3] != by_angle["dropped"]
    assert by_loss["loss"]["after"] == pytest.approx(math.log(512))
    assert by_loss["loss"]["after"] < by_loss["loss"]["before"]
    assert by_loss["loss"]["before"] == by_angle["loss"]["before"]


@pytest.mark.parametrize("family", [*CAN_CUT_HEADS, "olmo2", "gpt_neox"])
def test_dropped_layers_leave_a_plain_folder_of_every_family(
    family: str, run: Run, make_tiny: Tiny, spec: DataSpec
) -> None:
    source = make_tiny(family)
    folder, record = run(source, use="drop-layers", layers=[1])
    stated, before = config(folder), config(source)
    for name in ("layer_types", "no_rope_layers"):
        if before.get(name):
            kept = [value for i, value in enumerate(before[name]) if i != 1]
            assert stated[name] == kept, name
    model = load_model(folder, "float32")
    assert text_loss(model, blocks(folder, spec)) == pytest.approx(record["loss"]["after"])
    generates_as_without_cache(folder)


# -- width


def silent_neurons(model: Any) -> None:
    """Every second neuron: heavy in weights, and never active."""
    for layer in backbone(model).layers:
        layer.mlp.gate_proj.weight[::2] = 0
        layer.mlp.up_proj.weight[::2] *= 10


def light_neurons(model: Any) -> None:
    """Every second neuron does nothing: it has no weights at all."""
    for layer in backbone(model).layers:
        layer.mlp.down_proj.weight[:, ::2] = 0
        for name in ("gate_proj", "up_proj"):
            if hasattr(layer.mlp, name):
                getattr(layer.mlp, name).weight[::2] = 0
        if hasattr(layer.mlp, "gate_up_proj"):
            layer.mlp.gate_up_proj.weight[::2] = 0


@pytest.mark.parametrize("importance", ["activation", "taylor", "magnitude"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_idle_neurons_go_first(
    family: str, importance: str, run: Run, make_tiny: Tiny, edited: Callable[..., Path]
) -> None:
    source = edited(make_tiny(family), light_neurons)
    folder, record = run(source, use="prune-width", ratio=0.5, round_to=8, importance=importance)
    assert shape(folder).intermediate_size == 64
    assert record["importance_lost"] == [0.0] * 4
    torch.testing.assert_close(probe_logits(folder), probe_logits(source), **EXACT)
    assert record["loss"]["after"] == pytest.approx(record["loss"]["before"], abs=1e-4)
    generates_as_without_cache(folder)


@pytest.mark.parametrize(
    ("importance", "harmless"), [("activation", True), ("taylor", True), ("magnitude", False)]
)
def test_neurons_that_are_heavy_but_silent_go_by_what_text_shows(
    importance: str, harmless: bool, run: Run, make_tiny: Tiny, edited: Callable[..., Path]
) -> None:
    source = edited(make_tiny("llama"), silent_neurons)
    _, record = run(source, use="prune-width", ratio=0.5, round_to=8, importance=importance)
    rise = record["loss"]["after"] - record["loss"]["before"]
    assert (abs(rise) < 1e-4) == harmless


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma3_text", "smollm3", "olmo2"])
def test_every_other_family_that_is_let_through_can_be_narrowed(
    family: str, run: Run, make_tiny: Tiny, edited: Callable[..., Path]
) -> None:
    source = edited(make_tiny(family), light_neurons)
    folder, _ = run(source, use="prune-width", ratio=0.5, round_to=8, importance="taylor")
    torch.testing.assert_close(probe_logits(folder), probe_logits(source), **EXACT)


@pytest.mark.parametrize("group", [1, 16])
def test_slopes_are_what_masks_change(group: int, make_tiny: Tiny, spec: DataSpec) -> None:
    """The score of one neuron, or head, against finite differences of the loss, token by token."""
    folder = make_tiny("llama")
    model, text = load_model(folder, "float64"), blocks(folder, spec)[:1, :8]
    layer = backbone(model).layers[1]
    reader = layer.mlp.down_proj if group == 1 else layer.self_attn.o_proj
    found = taylor_scores(model, [reader], text, job_of(folder, folder, spec), group)[0]

    def loss(token: int, scale: float) -> float:
        def mask(module: Any, inputs: tuple[torch.Tensor, ...]) -> Any:
            changed = inputs[0].clone()
            changed[0, token, 3 * group : 4 * group] *= scale
            return (changed,)

        hook = reader.register_forward_pre_hook(mask)
        with torch.inference_mode():
            value = float(block_loss(model, text))
        hook.remove()
        return value

    by_hand = [(loss(t, 1.05) - loss(t, 0.95)) / 0.1 for t in range(8)]
    expected = sum(gradient**2 for gradient in by_hand) / 8
    assert float(found[3]) == pytest.approx(expected, rel=1e-2)
    assert found.shape == (reader.in_features // group,)


# -- heads


def without_heads(folder: Path, dropped: list[list[int]], width: int) -> Any:
    """The source model with what these heads give set to zero: what pruning must equal."""
    model = load_model(folder, "float32")
    with torch.no_grad():
        for layer, heads in zip(backbone(model).layers, dropped, strict=True):
            for head in heads:
                layer.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0
    return model


def equals_zeroed_heads(source: Path, folder: Path, record: dict[str, Any]) -> None:
    ids = torch.arange(5, 45).unsqueeze(0)
    with torch.inference_mode():
        expected = without_heads(source, record["dropped"], shape(source).head_dim)(ids).logits
        found = load_model(folder, "float32")(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("family", "heads", "hidden", "take", "count", "left"),
    [
        ("llama", (9, 3), 36, "groups", 3, (6, 2)),
        ("llama", (9, 3), 36, "queries", 3, (6, 3)),
        ("qwen2", (14, 2), 84, "groups", 7, (7, 1)),
        ("qwen2", (14, 2), 84, "queries", 4, (10, 2)),
        ("llama", (32, 8), 672, "groups", 4, (28, 7)),
        ("qwen3", (32, 8), 64, "queries", 8, (24, 8)),
    ],
)
def test_gqa_shapes_prune_reload_and_generate(
    family: str,
    heads: tuple[int, int],
    hidden: int,
    take: str,
    count: int,
    left: tuple[int, int],
    head_dim: int,
    run: Run,
    make_tiny: Tiny,
    tmp_path: Path,
) -> None:
    sizes = {"hidden_size": hidden, "head_dim": head_dim, "num_hidden_layers": 2}
    source = make_tiny(family, **sizes, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    made, record = run(source, use="prune-heads", count=count, take=take, refit=False)
    folder = tmp_path / "elsewhere"
    made.rename(folder)
    stated = config(folder)
    assert (stated["num_attention_heads"], stated["num_key_value_heads"]) == left
    assert stated["head_dim"] == head_dim
    promised = PruneHeads(count=count, take=take).reshape(shape(source))
    assert shape(folder) == promised
    assert all(len(gone) == count for gone in record["dropped"])
    equals_zeroed_heads(source, folder, record)
    generates_as_without_cache(folder)


@pytest.mark.parametrize("take", ["groups", "queries"])
@pytest.mark.parametrize("family", CAN_CUT_HEADS)
def test_heads_of_every_family_that_is_let_through(
    family: str, take: str, run: Run, make_tiny: Tiny
) -> None:
    source = make_tiny(family)
    settings = {"take": take, "importance": "taylor", "refit": False}
    folder, record = run(source, use="prune-heads", count=2, **settings)
    assert (record["heads"], record["kv_heads"]) == ((2, 1) if take == "groups" else (2, 2))
    equals_zeroed_heads(source, folder, record)
    generates_as_without_cache(folder)
    decoder = gateskip.load(folder, backend="gathered")
    ids = decoder.tokenizer("Grant of Copyright License").input_ids
    with torch.inference_mode():
        hidden = decoder.skipping.forward(
            torch.tensor([ids]), decoder.skipping.new_cache(1, len(ids)), [0]
        )
        ours = decoder.skipping.head(hidden)
        theirs = load_model(folder)(torch.tensor([ids])).logits
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("importance", ["activation", "taylor", "magnitude"])
@pytest.mark.parametrize(
    ("take", "idle"), [("groups", {0: [0, 1], 1: [2, 3]}), ("queries", {0: [0, 3], 1: [1, 2]})]
)
def test_idle_heads_go_first_each_layer_its_own(
    take: str,
    idle: dict[int, list[int]],
    importance: str,
    run: Run,
    make_tiny: Tiny,
    edited: Callable[..., Path],
) -> None:
    def idle_heads(model: Any) -> None:
        for number, layer in enumerate(backbone(model).layers):
            for head in idle[number]:
                channels = slice(16 * head, 16 * head + 16)
                layer.self_attn.o_proj.weight[:, channels] *= 1e-4
                layer.self_attn.q_proj.weight[channels] *= 1e-4

    source = edited(make_tiny("llama", num_hidden_layers=2), idle_heads)
    folder, record = run(source, use="prune-heads", count=2, take=take, importance=importance)
    assert record["dropped"] == [idle[0], idle[1]]
    assert max(record["importance_lost"]) < 0.01
    assert record["loss"]["after"] == pytest.approx(record["loss"]["before"], abs=1e-3)
    torch.testing.assert_close(probe_logits(folder), probe_logits(source), atol=2e-2, rtol=0)


# -- hidden size


def idle_channels(model: Any) -> None:
    """Every second channel of the residual stream carries nothing, however heavy what reads it."""
    model.model.embed_tokens.weight[:, ::2] = 0
    for layer in backbone(model).layers:
        for name, part in layer.named_modules():
            if name.endswith(("o_proj", "down_proj")):
                part.weight[::2] = 0
            elif name.endswith(READERS):
                part.weight[:, ::2] *= 5


@pytest.mark.parametrize("family", GATED_MLP)
def test_idle_channels_go_first_and_norms_make_up_for_them(
    family: str, run: Run, make_tiny: Tiny, edited: Callable[..., Path]
) -> None:
    """Exact in every family, or a norm, a scale of Gemma's or a reader of the stream was missed."""
    source = edited(make_tiny(family, rms_norm_eps=1e-12), idle_channels)
    folder, record = run(source, use="prune-hidden", ratio=0.5, round_to=8)
    stated = shape(folder)
    assert stated == PruneHidden(ratio=0.5, round_to=8).reshape(shape(source))
    assert (stated.hidden_size, stated.head_dim) == (32, shape(source).head_dim)
    assert record["importance_lost"] == 0
    torch.testing.assert_close(probe_logits(folder), probe_logits(source), **EXACT)
    assert record["loss"]["after"] == pytest.approx(record["loss"]["before"], abs=1e-4)
    generates_as_without_cache(folder)


@pytest.mark.parametrize("importance", ["activation", "taylor", "magnitude"])
def test_channels_by_every_importance(importance: str, run: Run, make_tiny: Tiny) -> None:
    source = make_tiny("qwen3")
    settings = {"ratio": 0.25, "round_to": 8, "importance": importance}
    folder, record = run(source, use="prune-hidden", **settings)
    assert shape(folder).hidden_size == 48
    assert 0 < record["importance_lost"] < 0.5
    assert load_model(folder, "float32").get_output_embeddings().weight.shape == (512, 48)
    generates_as_without_cache(folder)


def test_a_hidden_size_that_the_config_refuses_is_named_with_one_that_fits() -> None:
    shape = ModelShape("llama", 576, 1536, 30, 9, 3, 64, 49152, True)
    with pytest.raises(RuleBroken, match="a multiple of 576") as caught:
        PruneHidden(ratio=0.1).check(shape, ())
    assert caught.value.rule == "hidden-fits"
    assert caught.value.fix == "set round_to: 8, which keeps 504"
    PruneHidden(ratio=0.1, round_to=8).check(shape, ())
    PruneHidden(ratio=0.1).check(replace(shape, model_type="qwen2"), ())


# -- what stays makes up for what goes


def test_inputs_that_others_tell_can_go_without_a_trace() -> None:
    generator = torch.Generator().manual_seed(1)
    seen = torch.randn(400, 6, generator=generator)
    told = torch.cat([seen, seen @ torch.randn(6, 4, generator=generator)], dim=1)  # [400, 10]
    weight = torch.randn(5, 10, generator=generator)
    kept = torch.arange(6)
    fitted = refitted(weight, kept, told.T @ told / 400, 400_000)
    whole = told @ weight.T
    off = float((told[:, kept] @ fitted.T - whole).norm() / whole.norm())
    cut = float((told[:, kept] @ weight[:, kept].T - whole).norm() / whole.norm())
    assert off < 0.1 * cut
    every = torch.arange(10)
    assert torch.equal(refitted(weight, every, told.T @ told, 400), weight)


@pytest.mark.parametrize(
    "cut",
    [
        {"use": "prune-width", "ratio": 0.5, "round_to": 8},
        {"use": "prune-heads", "count": 2},
        {"use": "prune-hidden", "ratio": 0.25, "round_to": 8},
        {"use": "drop-layers", "layers": [1]},
        {"use": "drop-layers", "layers": [1, 2]},
    ],
    ids=["prune-width", "prune-heads", "prune-hidden", "drop-layers", "two in a row"],
)
def test_refitting_keeps_a_model_nearer_to_what_it_was(
    cut: dict[str, Any], run: Run, make_tiny: Tiny, spec: DataSpec
) -> None:
    source = make_tiny("llama")
    text = blocks(source, spec)
    with torch.inference_mode():
        whole = load_model(source, "float32")(text).logits.log_softmax(-1)
        away = []
        for refit in (False, True):
            folder, _ = run(source, refit=refit, **cut)
            logits = load_model(folder, "float32")(text).logits.log_softmax(-1)
            away.append(float((whole.exp() * (whole - logits)).sum(-1).mean()))
    assert away[1] < 0.9 * away[0]


LLAMA8B = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256, False)


@pytest.mark.parametrize(
    ("stage", "sizes", "says", "fix"),
    [
        (PruneHeads(count=4), {}, "leaves 28 heads, but a llama config", "set count: 16"),
        (PruneHeads(count=6), {"model_type": "mistral"}, "6 of 32 heads by whole groups of 4", "4"),
        (PruneHeads(count=12, take="queries"), {"model_type": "qwen3"}, "from 8 groups", "8"),
        (PruneHeads(count=32), {"model_type": "mistral"}, "4 must stay", "set count: 28"),
        (PruneHeads(count=2), {"num_kv_heads": 1}, "whole groups of 32", "set take: queries"),
    ],
)
def test_heads_that_a_plain_config_cannot_say_are_refused_with_the_nearest_count(
    stage: PruneHeads, sizes: dict[str, Any], says: str, fix: str
) -> None:
    with pytest.raises(RuleBroken) as caught:
        stage.check(replace(LLAMA8B, **sizes), ())
    assert caught.value.rule in ("heads-fit",)
    assert says in str(caught.value)
    assert caught.value.fix is not None and fix in caught.value.fix


def test_long_rope_of_phi3_is_refused_because_transformers_refuses_it(make_tiny: Tiny) -> None:
    from huggingface_hub.errors import StrictDataclassClassValidationError
    from transformers import AutoConfig

    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "rope_theta": 1e4}
    stated = config(make_tiny("phi3")) | {"rope_parameters": {"rope_type": "longrope"} | factors}
    AutoConfig.for_model(**stated)
    with pytest.raises(RuleBroken, match="long-rope factors"):
        PruneHeads(count=2).check(ModelShape.from_config(stated), ())
    says = "short_factor field must have length 16"
    with pytest.raises(StrictDataclassClassValidationError, match=says):
        AutoConfig.for_model(**stated | {"num_attention_heads": 2, "head_dim": 16})


@pytest.mark.parametrize("take", ["groups", "queries"])
def test_every_count_that_is_offered_makes_a_config_that_transformers_takes(take: str) -> None:
    from transformers import AutoConfig

    stage = PruneHeads.model_validate({"count": 1, "take": take})
    for family in CAN_CUT_HEADS:
        dense = replace(LLAMA8B, model_type=family)
        assert stage.counts(dense), family
        for count in stage.counts(dense):
            left = stage.model_copy(update={"count": count}).reshape(dense)
            AutoConfig.for_model(
                family,
                hidden_size=left.hidden_size,
                num_attention_heads=left.num_heads,
                num_key_value_heads=left.num_kv_heads,
                head_dim=left.head_dim,
                num_hidden_layers=2,
            )
            assert left.num_heads % left.num_kv_heads == 0 < left.num_kv_heads


@pytest.mark.parametrize(
    ("stage", "family"),
    [
        (PruneWidth(ratio=0.5), "gpt_neox"),
        (PruneHeads(count=2), "gpt_neox"),
        (PruneHeads(count=2), "olmo2"),
    ],
)
def test_families_of_another_layout_are_refused_by_name(
    stage: Stage, family: str, make_tiny: Tiny
) -> None:
    with pytest.raises(RuleBroken, match=f"{stage.use} cannot cut a {family} model") as caught:
        stage.check(shape(make_tiny(family)), ())
    assert caught.value.rule == "layout-known"
    assert "llama" in str(caught.value.fix)


# -- gates


def gated(run: Run, source: Path, **more: Any) -> Path:
    """The source with untrained gates that are calibrated at two budgets."""
    settings = {"steps": 0, "backbone": "frozen", "shortcut": 4, "budgets": (0.8, 0.5)}
    sizes = {"length": BLOCK, "calibration_blocks": 4}
    return run(source, use="gate", **{**settings, **sizes, **more})[0]


def gates_of(folder: Path) -> GateFile:
    file = load_gates(folder)
    assert file is not None
    return file


def never_enter(folder: Path, branches: list[int]) -> None:
    """Gates that have learned to skip these branches at every budget, and only these."""
    file = gates_of(folder)
    row = [math.inf if i in branches else -math.inf for i in range(file.gates.branches)]
    file.grid = dict.fromkeys(file.grid, row)
    save_gates(folder, file)


@pytest.mark.parametrize("kind", ["scalar", "vector", "low-rank", "shared", "mlp", "static"])
def test_layer_drop_after_gates_keeps_the_gates_of_what_stays(
    kind: str, run: Run, make_tiny: Tiny
) -> None:
    before = gated(run, make_tiny("llama"), kind=kind)
    folder, _ = run(before, use="drop-layers", layers=[1])
    old, new = gates_of(before), gates_of(folder)
    assert new.training["branches"] == [0, 1, 4, 5, 6, 7]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert old.gates.shortcuts is not None and new.gates.shortcuts is not None
    for now, then in enumerate(new.training["branches"]):
        assert torch.equal(new.gates.logit(now, x), old.gates.logit(then, x))
        assert torch.equal(new.gates.shortcuts(now, x), old.gates.shortcuts(then, x))
    assert {len(row) for row in new.grid.values()} == {6}
    if kind != "static":  # whole branches: budgets are kept roughly
        assert new.kept[0.5] == pytest.approx(0.5, abs=0.06)


def test_gates_that_were_calibrated_by_decoding_move_beside_weights_in_float32(
    run: Run, make_tiny: Tiny
) -> None:
    folder = gated(run, make_tiny("llama"))
    assert not thresholds_from_decoding(folder)
    file = gates_of(folder)
    parameters = {**file.training["parameters"], "calibrate_on": "written"}
    save_gates(folder, replace(file, training={**file.training, "parameters": parameters}))
    assert thresholds_from_decoding(folder)
    assert not thresholds_from_decoding(make_tiny("llama"))


def speculated_and_skipped(folder: Path) -> Any:
    """A decoder that drafts losslessly, and has counted what it enters at a budget of one half."""
    decoder = gateskip.load(folder)
    ids = decoder.tokenizer("Subject to the terms and conditions").input_ids
    plain = decoder.generate([ids], 24).tokens
    drafted = decoder.generate([ids], 24, "speculate", draft_length=3, **SKIPPING).tokens
    assert drafted == plain
    decoder.skipping.usage.clear()
    decoder.generate([ids], 24, "skip", budget=0.5)
    return decoder


def test_thresholds_after_a_layer_drop_are_calibrated_anew_and_decode(
    run: Run, make_tiny: Tiny
) -> None:
    before = gated(run, make_tiny("llama"))
    folder, _ = run(before, use="drop-layers", count=1)
    rows = gates_of(folder).training["branches"]
    kept_old = [gates_of(before).grid[0.5][row] for row in rows]
    assert gates_of(folder).grid[0.5] != kept_old
    decoder = speculated_and_skipped(folder)
    assert 0.2 < sum(decoder.skipping.usage.shares()) / 6 < 0.9


def test_a_layer_drop_that_branch_pruning_made_impossible_is_refused(
    run: Run, make_tiny: Tiny
) -> None:
    with pytest.raises(RuleBroken, match="names layer 3, but the last one is 1"):
        run(make_tiny("llama", num_hidden_layers=2), use="drop-layers", layers=[3])


SKIPPED = [3, 4, 5]  # the MLP of layer 1, and layer 2


def weaken(model: Any) -> None:
    """The branches in SKIPPED add next to nothing."""
    layers = backbone(model).layers
    for module in (layers[1].mlp.down_proj, layers[2].self_attn.o_proj, layers[2].mlp.down_proj):
        module.weight.mul_(1e-3)


def cut_by_hand(source: Path) -> Any:
    """The source model without the branches in SKIPPED."""
    model = load_model(source, "float32")
    layers = backbone(model).layers
    with torch.no_grad():
        for part in (layers[1].mlp.down_proj, layers[2].self_attn.o_proj, layers[2].mlp.down_proj):
            part.weight.zero_()
    return model


@pytest.fixture
def learned(run: Run, make_tiny: Tiny, edited: Callable[..., Path]) -> Path:
    """A gated model whose gates skip the branches in SKIPPED at every budget, rightly."""
    folder = gated(run, edited(make_tiny("llama"), weaken))
    never_enter(folder, SKIPPED)
    return folder


def test_branches_that_gates_always_skip_are_gone_for_good(run: Run, learned: Path) -> None:
    folder, record = run(learned, use="prune-branches", budget=0.8)
    assert (record["dropped"], record["zeroed"], record["spared"]) == ([2], ["mlp 1"], {})
    assert config(folder)["num_hidden_layers"] == 3
    assert not layers_of(folder)[1].mlp.down_proj.weight.any()
    ids = torch.arange(5, 45).unsqueeze(0)
    with torch.inference_mode():
        expected = cut_by_hand(learned)(ids).logits
        torch.testing.assert_close(load_model(folder)(ids).logits, expected, **EXACT)
    assert record["loss"]["after"] == pytest.approx(record["loss"]["before"], abs=0.02)
    generates_as_without_cache(folder)
    sizes = [sum(p.numel() for p in load_model(f).parameters()) for f in (learned, folder)]
    assert record["parameters"]["removed"] == pytest.approx(1 - sizes[1] / sizes[0], abs=1e-4)
    mlp = sum(p.numel() for p in layers_of(folder)[1].mlp.parameters())
    never_read = record["parameters"]["never_read_where_skipping"]
    assert never_read == pytest.approx(mlp / sizes[0], abs=1e-4)


def test_a_single_branch_that_went_is_never_entered_while_the_others_keep_the_budget(
    run: Run, learned: Path
) -> None:
    folder, _ = run(learned, use="prune-branches")
    file = gates_of(folder)
    assert file.training["branches"] == [0, 1, 2, 3, 6, 7]
    assert all(row[3] == math.inf for row in file.grid.values())
    assert all(max(row[:3] + row[4:]) < math.inf for row in file.grid.values())
    assert file.kept[0.5] == pytest.approx(0.5, abs=0.06)
    assert torch.equal(file.gates.weight[4], gates_of(learned).gates.weight[6])
    decoder = speculated_and_skipped(folder)
    assert decoder.skipping.usage.kept[3] == ANCHORS
    assert min(decoder.skipping.usage.kept[:3]) > ANCHORS


def test_only_whole_layers_go_where_single_branches_are_kept(run: Run, learned: Path) -> None:
    folder, record = run(learned, use="prune-branches", single="keep")
    assert (record["dropped"], record["zeroed"]) == ([2], [])
    assert layers_of(folder)[1].mlp.down_proj.weight.all()
    assert max(max(row) for row in gates_of(folder).grid.values()) < math.inf


def test_a_skipped_branch_that_the_loss_misses_stays(run: Run, learned: Path) -> None:
    """Gates say nothing about the first token: what it needs shows in the loss."""
    never_enter(learned, [0, *SKIPPED])
    folder, record = run(learned, use="prune-branches", rise=0.02)
    assert record["dropped"] == [2]
    assert list(record["spared"]) == ["attention 0"]
    assert record["spared"]["attention 0"] > 0.02
    assert layers_of(folder)[0].self_attn.o_proj.weight.any()
    assert all(row[0] < math.inf for row in gates_of(folder).grid.values())


def test_nothing_to_remove_is_an_error_that_names_the_nearest(
    run: Run, make_tiny: Tiny, learned: Path
) -> None:
    plain = gated(run, make_tiny("llama"), least=0.2)
    with pytest.raises(UserError, match="more than 0 of the tokens enter each branch") as caught:
        run(plain, use="prune-branches", budget=0.8, share=0)
    share = float(str(caught.value.fix).split("share: ")[1].split(",")[0])
    run(plain, use="prune-branches", budget=0.8, share=share, rise=99)
    never_enter(learned, [3])
    with pytest.raises(UserError, match=r"each layer with both branches .* attention 0 and mlp 0"):
        run(learned, use="prune-branches", single="keep")
    never_enter(learned, [0])
    with pytest.raises(UserError, match="attention 0 raises it least, by") as missed:
        run(learned, use="prune-branches", rise=0.02)
    rise = float(str(missed.value.fix).split("rise: ")[1].split(",")[0])
    _, record = run(learned, use="prune-branches", rise=rise)
    assert record["zeroed"] == ["attention 0"]


def test_a_folder_without_gates_has_no_branches_to_name(run: Run, make_tiny: Tiny) -> None:
    with pytest.raises(UserError, match="has no gates"):
        run(make_tiny("llama"), use="prune-branches")


def adds_nothing(model: Any, module: Any) -> bool:
    """Whether a branch's module gives zeros, and does so for every token."""
    seen: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda _, __, found: seen.append(found))
    with torch.inference_mode():
        model(torch.arange(5, 25).unsqueeze(0))
    hook.remove()
    return not bool(seen[0].any())


@pytest.mark.parametrize("family", ["gemma2", "phi3", "gpt_neox"])
def test_branches_of_other_layouts_go_too(family: str, run: Run, make_tiny: Tiny) -> None:
    folder = gated(run, make_tiny(family))
    never_enter(folder, [3, 4, 5])
    made, record = run(folder, use="prune-branches", rise=99)
    assert (record["dropped"], record["zeroed"]) == ([2], ["mlp 1"])
    model = load_model(made)
    assert adds_nothing(model, backbone(model).layers[1].mlp)
    assert not adds_nothing(model, backbone(model).layers[0].mlp)
    generates_as_without_cache(made)


@pytest.mark.parametrize("quantizer", [{"use": "bnb", "format": "nf4"}, {"use": "gptq"}])
def test_quantizers_take_a_branch_of_zeros(
    quantizer: dict[str, Any], run: Run, learned: Path
) -> None:
    folder, _ = run(learned, use="prune-branches")
    packed, _ = run(folder, **quantizer)
    model = load_model(packed)
    assert adds_nothing(model, backbone(model).layers[1].mlp)
    assert bool(probe_logits(packed).isfinite().all())
    assert all(row[3] == math.inf for row in gates_of(packed).grid.values())
