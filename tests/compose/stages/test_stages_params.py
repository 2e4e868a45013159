"""Stage parameters: defaults, refusals, the order rules, and what a stage makes of a shape."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from compose.errors import PlanError, RuleBroken
from compose.stages.registry import (
    RULES,
    STAGES,
    AnyStage,
    AutoRound,
    Bnb,
    DraftNetwork,
    DropLayers,
    Gate,
    Gptq,
    Heal,
    Int2,
    Int3,
    Int4,
    Int6,
    Int8,
    ModelShape,
    PackHead,
    Plain,
    PruneBranches,
    PruneHeads,
    PruneHidden,
    PruneWidth,
    Skip,
    Speculate,
    Stage,
)
from compose.stages.rules import FORBIDDEN

SHAPE = ModelShape("llama", 576, 1536, 30, 9, 3, 64, 49152, True)
EXAMPLES: tuple[Stage, ...] = (
    Gate(),
    DropLayers(count=3),
    PruneWidth(ratio=0.2),
    PruneHeads(count=3),
    PruneHidden(ratio=0.1, round_to=8),
    PruneBranches(),
    Heal(),
    Int8(),
    Int6(),
    Int4(),
    Int3(),
    Int2(),
    Bnb(format="nf4"),
    Gptq(),
    AutoRound(),
    PackHead(),
    DraftNetwork(),
    Plain(),
    Skip(),
    Speculate(),
)


def rule_of(*chain: Stage, shape: ModelShape | None = SHAPE) -> str | None:
    """The first rule that a chain breaks."""
    for index, stage in enumerate(chain):
        try:
            stage.check(shape, chain[:index])
        except RuleBroken as error:
            assert error.rule in RULES
            return error.rule
        shape = None if shape is None else stage.reshape(shape)
    return None


def test_registry_holds_every_stage_under_its_own_name() -> None:
    assert [stage.use for stage in EXAMPLES] == list(STAGES)
    for stage in EXAMPLES:
        assert STAGES[stage.use] is type(stage)


def test_union_reads_every_stage_back_from_json() -> None:
    adapter: TypeAdapter[Stage] = TypeAdapter(AnyStage)
    for stage in EXAMPLES:
        assert adapter.validate_json(stage.model_dump_json()) == stage
        assert STAGES[stage.use].model_validate(stage.model_dump(mode="json")) == stage


def test_every_field_has_a_docstring() -> None:
    for kind in STAGES.values():
        for name, info in kind.model_fields.items():
            assert info.description, f"{kind.__name__}.{name}"


def test_stages_are_frozen_values() -> None:
    assert Gate() == Gate(kind="scalar") and hash(Gate()) == hash(Gate())
    with pytest.raises(ValidationError):
        Gate().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Gate, {"kind": "matrix"}),
        (Gate, {"budget": 0}),
        (Gate, {"budgets": ()}),
        (Gate, {"budgets": (0.5, 0.5)}),
        (Gate, {"budgets": (1.5,)}),
        (Gate, {"lr": float("nan")}),
        (DropLayers, {}),
        (DropLayers, {"count": 1, "layers": (1,)}),
        (DropLayers, {"layers": ()}),
        (DropLayers, {"layers": (1, 1)}),
        (DropLayers, {"layers": (-1,)}),
        (PruneWidth, {}),
        (PruneWidth, {"ratio": 1.0}),
        (PruneWidth, {"ratio": 0.2, "importance": "wanda"}),
        (PruneHeads, {}),
        (PruneHeads, {"count": 0}),
        (PruneHeads, {"count": 3, "take": "heads"}),
        (PruneBranches, {"budget": 1.0}),
        (PruneBranches, {"share": 1.0}),
        (Heal, {"steps": 0}),
        (Bnb, {}),
        (Bnb, {"format": "nf3"}),
        (Bnb, {"format": "int8", "double_quant": True}),
        (Bnb, {"format": "int8", "compute_dtype": "bfloat16"}),
        (Bnb, {"format": "fp4", "threshold": 3.0}),
        (Gptq, {"dynamic": {}}),
        (Gptq, {"lm_head": True}),
        (Heal, {"backbone": "frozen"}),
        (Gptq, {"bits": 5}),
        (Gptq, {"group_size": 48}),
        (Gptq, {"group_size": -1}),
        (Gptq, {"foem": 0.0}),
        (Gptq, {"device_map": "auto"}),
        (AutoRound, {"iters": 0}),
        (AutoRound, {"bits": 8}),
        (AutoRound, {"group_size": -1}),
        (Skip, {"budget": 1.1}),
        (Speculate, {"draft_length": 17}),
        (Speculate, {"draft_length": "fast"}),
        (Speculate, {"draft_lenght": 4}),
    ],
)
def test_impossible_parameters_are_refused(kind: type[Stage], values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind(**values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"place": "before"}, "needs scales: true"),
        ({"masks": "hard"}, "set scales: true"),
        ({"scales": True}, "set init: open"),
        ({"least": 0.5, "most": 0.4}, "above most"),
        ({"recipe": "published"}, "'ours' or 'paper'"),
    ],
)
def test_gate_settings_that_do_not_fit_together_say_why(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Gate(**values)


def test_a_recipe_fills_what_is_not_said() -> None:
    paper = Gate(recipe="paper", steps=7, lr=1e-4)
    assert (paper.kind, paper.scales, paper.kv, paper.sparsity) == ("vector", True, "copy", "l2")
    assert (paper.steps, paper.lr, paper.backbone_lr) == (7, 1e-4, 3e-6)


@pytest.mark.parametrize(
    ("chain", "rule"),
    [
        ((Skip(),), "decode-needs-gates"),
        ((Bnb(format="nf4"), Speculate(draft_budget=0.5)), "decode-needs-gates"),
        ((Bnb(format="nf4"), Speculate(draft_budget=1, draft_weights="nf4")), "draft-of-packed"),
        ((Bnb(format="nf4"), Speculate(draft_budget=1, draft_weights="int4")), "draft-of-packed"),
        ((Gate(backbone="full"), Speculate(target="original")), "original-is-gone"),
        ((Speculate(draft_budget=1, verify_budget=0.8),), "decode-needs-gates"),
        ((Gate(), Skip(), Bnb(format="int8")), "decode-last"),
        ((Gate(), Skip(), Speculate()), "two-decoders"),
        ((Gate(), Gate(steps=1)), "two-gates"),
        ((Bnb(format="nf4"), Gptq()), "two-quantizers"),
        ((Gptq(), DropLayers(count=1)), "prune-after-quantize"),
        ((Gptq(), Heal()), "heal-after-quantize"),
        ((Gptq(), Gate()), "gate-after-quantize"),
        ((Gate(), PruneWidth(ratio=0.2)), "prune-after-gate"),
        ((Gate(), Heal()), "heal-after-gate"),
        ((Gate(), PruneHeads(count=3)), "prune-after-gate"),
        ((Gate(kind="router"), DropLayers(count=1)), "prune-after-gate"),
        ((Gptq(), PruneHeads(count=3)), "prune-after-quantize"),
        ((PruneBranches(),), "branches-need-gates"),
        ((PruneBranches(), Gate()), "branches-need-gates"),
        ((Gate(kind="router"), PruneBranches()), "prune-after-gate"),
        ((Gate(), PruneBranches(budget=0.3)), "budget-calibrated"),
        ((Gate(), Skip(prompt_budget=0.8)), "budget-calibrated"),
        ((Gate(prompt_budgets=(0.9,)), Skip(prompt_budget=0.8)), "budget-calibrated"),
        ((Gate(prompt_budgets=(0.9,)), Speculate(prompt_budget=0.8)), "budget-calibrated"),
        ((Speculate(prompt_budget=0.8),), "decode-needs-gates"),
        ((Gate(branches="mlp"), PruneBranches(single="keep")), "layers-fit"),
        ((PruneHeads(count=4),), "heads-fit"),
        ((PruneHeads(count=9),), "heads-fit"),
        ((PruneHeads(count=6), PruneHeads(count=3)), "heads-fit"),
        ((Gptq(group_size=128),), "group-divides"),
        ((Bnb(format="nf4", lm_head=True),), "head-is-tied"),
        ((Gptq(lm_head=8),), "head-is-tied"),
        ((PruneWidth(ratio=0.99),), "width-fits"),
        ((DropLayers(count=30),), "layers-fit"),
        ((DropLayers(layers=(30,)),), "layers-fit"),
        ((DropLayers(count=15), DropLayers(count=15)), "layers-fit"),
    ],
)
def test_rule_that_a_chain_breaks(chain: tuple[Stage, ...], rule: str) -> None:
    assert rule_of(*chain) == rule


def test_a_head_is_packed_once() -> None:
    untied = replace(SHAPE, tie_embeddings=False)
    for quantizer in (Gptq(lm_head=4), Bnb(format="int8", lm_head=True)):
        assert rule_of(quantizer, shape=untied) is None
        assert rule_of(quantizer, PackHead(), shape=untied) == "head-packed-twice"


@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
@pytest.mark.parametrize("asked", [{"mixed": {"down_proj": 8}}, {"lm_head": 8}, {"foem": 0.2}])
def test_architectures_that_gptqmodel_does_not_know(asked: dict[str, Any], family: str) -> None:
    shape = replace(SHAPE, model_type=family, tie_embeddings=False)
    assert rule_of(Gptq(**asked), shape=shape) == "layout-known"
    assert rule_of(Gptq(), shape=shape) is None


@pytest.mark.parametrize(
    "chain",
    [
        (PruneWidth(ratio=0.2), Heal(), Gate(), Gptq(), Speculate()),
        (DropLayers(count=3), PruneWidth(ratio=0.2), Bnb(format="nf4")),
        (Gptq(), Gate(backbone="frozen"), Skip()),
        (Gate(prompt_budgets=(0.7,)), Speculate(prompt_budget=0.7)),
        (Gptq(group_size=-1, sym=True),),
        (Heal(),),
        (DropLayers(layers=(0, 29)),),
        (PruneHeads(count=3), PruneHeads(count=3), Gptq()),
        (PruneHeads(count=6, take="queries"), Heal()),
        (Gate(), DropLayers(count=3), Gptq(), Skip()),
        (Gate(), PruneBranches(), DropLayers(count=1), Bnb(format="nf4"), Speculate()),
        (Gate(branches="mlp"), PruneBranches()),
        (Bnb(format="nf4"), Speculate()),
    ],
)
def test_chain_that_breaks_no_rule(chain: tuple[Stage, ...]) -> None:
    assert rule_of(*chain) is None


def drafted_by(weights: str) -> Speculate:
    return Speculate(draft_budget=1, draft_weights=weights)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("quantizer", "copies"),
    [
        (None, {"int4", "nf4", "int3", "int2"}),
        (Bnb(format="int8"), {"int4", "nf4", "int3", "int2"}),
        (Gptq(bits=8), {"int4", "nf4", "int3", "int2"}),
        (Gptq(mixed={"down_proj": 8}), {"int4", "nf4", "int3", "int2"}),
        (Gptq(skip=("down_proj",)), {"int4", "nf4", "int3", "int2"}),
        (Bnb(format="nf4"), {"int3", "int2"}),
        (Gptq(), {"int3", "int2"}),
        (Gptq(bits=3), {"int2"}),
        (Gptq(bits=2), set()),
        (Int8(), {"int4", "nf4", "int3", "int2"}),
        (Int4(), {"int3", "int2"}),
        (Int4(values=None), {"int3", "int2"}),
        (Int4(mixed={"down_proj": 8}), {"int4", "nf4", "int3", "int2"}),
        (Int3(), {"int2"}),
    ],
)
def test_a_copy_that_drafts_has_fewer_bits(quantizer: Stage | None, copies: set[str]) -> None:
    chain = () if quantizer is None else (quantizer,)
    for weights in ("int4", "nf4", "int3", "int2"):
        rule = None if weights in copies else "draft-of-packed"
        assert rule_of(*chain, drafted_by(weights)) == rule, weights
    for weights in ("own", "int4-head", "auto"):
        assert rule_of(*chain, drafted_by(weights)) is None


def test_what_can_draft_instead_is_named() -> None:
    with pytest.raises(RuleBroken, match="4-bit copy of 4-bit weights") as refused:
        drafted_by("int4").check(SHAPE, (Gptq(),))
    assert "int3, int2, int4-head, own or auto" in str(refused.value.fix)


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"^x$": {"bits": 8}, "-:^y$": {}}}, 8),
        ({"quant_method": "gptq", "bits": 3}, 3),
        ({"quant_method": "gateskip", "bits": 4, "layers": {"x.v_proj": {"bits": 8}}}, 4),
        ({"quant_method": "gateskip", "bits": 4, "layers": {"x.k_proj": {"bits": 8}}}, 8),
        ({"quant_method": "fp8"}, None),
        (None, None),
    ],
)
def test_a_packed_source_states_its_bits(quantization: dict[str, Any] | None, bits: Any) -> None:
    """And what drafts for it has fewer; where it states none, what drafts is seen once it loads."""
    config = {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "vocab_size": 100, "quantization_config": quantization},
    }
    shape = ModelShape.from_config(config)
    assert shape.packed_bits == bits
    broken = "draft-of-packed" if bits is not None and bits <= 4 else None
    assert rule_of(drafted_by("int4"), shape=shape) == broken


def test_every_order_rule_has_its_sentence() -> None:
    assert set(FORBIDDEN.values()) <= set(RULES)


def test_rules_on_sizes_wait_for_a_shape() -> None:
    assert rule_of(Gptq(group_size=128), shape=None) is None
    assert rule_of(DropLayers(count=99), shape=None) is None
    assert rule_of(Gptq(), Gptq(), shape=None) == "two-quantizers"


def test_source_model_that_is_quantized_counts_as_quantized() -> None:
    packed = replace(SHAPE, quantized="gptq")
    assert rule_of(Bnb(format="nf4"), shape=packed) == "two-quantizers"
    assert rule_of(DropLayers(count=1), shape=packed) == "prune-after-quantize"
    assert rule_of(Gate(backbone="frozen"), Skip(), shape=packed) is None


def test_group_rule_names_layer_width_and_nearest_size() -> None:
    with pytest.raises(RuleBroken) as caught:
        Gptq(group_size=128).check(SHAPE, ())
    assert "128 does not divide the 576 inputs of q_proj" in str(caught.value)
    assert "set group_size: 64" in str(caught.value)


def test_group_rule_passes_over_what_is_skipped() -> None:
    odd = replace(SHAPE, intermediate_size=1001)
    assert rule_of(Gptq(), shape=odd) == "group-divides"
    assert rule_of(Gptq(skip=("mlp.down_proj",)), shape=odd) is None


def test_packed_weights_come_in_tiles() -> None:
    """bitsandbytes' CPU kernel takes no block that goes from one row into the next."""
    odd = replace(SHAPE, intermediate_size=1376)  # 64 divides it 21.5 times
    for stage, shape in (
        (Bnb(format="nf4"), odd),
        (Gptq(), replace(SHAPE, num_kv_heads=1, head_dim=16)),
    ):
        with pytest.raises(RuleBroken) as refused:
            stage.check(shape, ())
        assert refused.value.rule == "whole-tiles"
    Bnb(format="nf4", skip=("down_proj",)).check(odd, ())
    Bnb(format="int8").check(odd, ())
    Gptq(group_size=32).check(odd, ())


def test_untied_head_is_packed() -> None:
    assert (
        rule_of(Bnb(format="nf4", lm_head=True), shape=replace(SHAPE, tie_embeddings=False)) is None
    )


def test_group_rule_sees_the_pruned_width() -> None:
    fitting, cut = PruneWidth(ratio=0.2), PruneWidth(ratio=0.22, round_to=32)
    assert fitting.kept_width(1536) == 19 * 64
    assert rule_of(fitting, Gptq(group_size=64)) is None
    assert cut.kept_width(1536) == 18 * 64 + 32
    assert rule_of(cut, Gptq(group_size=64)) == "group-divides"
    assert rule_of(cut, Gptq()) is None, "groups of 32"


def test_group_rule_falls_back_to_a_whole_row() -> None:
    with pytest.raises(RuleBroken, match="set group_size: -1 and sym: true"):
        Gptq(group_size=32).check(replace(SHAPE, intermediate_size=1001), ())


@given(
    ratio=st.floats(0.01, 0.99),
    round_to=st.sampled_from([1, 8, 32, 64]),
    width=st.integers(64, 20000),
)
def test_kept_width_is_a_narrower_multiple(ratio: float, round_to: int, width: int) -> None:
    stage = PruneWidth(ratio=ratio, round_to=round_to)
    kept = stage.kept_width(width)
    assert kept % round_to == 0
    assert 0 <= kept < width
    assert width * (1 - ratio) - kept < round_to + 1


@given(st.lists(st.sampled_from(EXAMPLES), max_size=5))
def test_chain_that_passes_has_one_of_each_kind_that_allows_one(chain: list[Stage]) -> None:
    if rule_of(*chain) is not None:
        return
    roles = [stage.role for stage in chain]
    for role in ("gate", "quantize", "head", "draft", "decode"):
        assert roles.count(role) <= 1
    order = {"prune": 0, "heal": 0, "gate": 1, "quantize": 2, "head": 3, "draft": 4, "decode": 5}
    roles = [stage.role for stage in chain if not stage.tolerates("prune-after-gate")]
    for before, after in itertools.pairwise(roles):
        assert order[before] <= order[after]


def test_reshape_follows_the_chain() -> None:
    shape = SHAPE
    for stage in (DropLayers(count=3), PruneWidth(ratio=0.2), Heal(), Gate(), Gptq(), Skip()):
        shape = stage.reshape(shape)
    assert (shape.num_layers, shape.intermediate_size, shape.quantized) == (27, 1216, "gptq")


def test_shape_from_a_config_with_defaults_left_out() -> None:
    config = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
    assert ModelShape.from_config(config) == ModelShape("qwen2", 64, 128, 2, 4, 4, 16, 100, False)


def test_shape_from_a_nested_config_with_wide_heads_and_packed_weights() -> None:
    text = {
        "model_type": "gemma2_text",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 100,
        "tie_word_embeddings": True,
    }
    shape = ModelShape.from_config(
        {"text_config": text, "quantization_config": {"quant_method": "gptq"}}
    )
    assert shape.linear_in_features()["o_proj"] == 128
    assert shape.tie_embeddings and shape.quantized == "gptq" and shape.num_kv_heads == 2


def test_config_of_another_kind_of_model_is_refused() -> None:
    with pytest.raises(PlanError, match=r"type 'gpt2'.*hidden_size"):
        ModelShape.from_config({"model_type": "gpt2", "n_embd": 768})


def test_recipe_puts_a_hash_in_place_of_a_path() -> None:
    one, other = Gate(init="/a/gates.safetensors"), Gate(init="/b/gates.safetensors")
    assert one.identity({"init": "ff"}) == other.identity({"init": "ff"})
    assert one.identity({"init": "ff"}) != one.identity({"init": "00"})
    assert Gate().files() == {} and Gate().identity({})["params"]["init"] == "warm"


def test_decode_stage_has_nothing_to_run(tmp_path: Any, make_job: Any) -> None:
    with pytest.raises(TypeError, match="skip makes no model folder"):
        Skip().run(make_job(tmp_path, tmp_path))
