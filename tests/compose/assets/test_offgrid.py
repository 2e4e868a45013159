"""The same function under other weights: folded norms, random scales, and gates that follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compose.assets.models import offgrid
from compose.errors import AssetError
from gateskip.checkpoint import read_gates, write_gates
from gateskip.gates.kinds import make_gates
from gateskip.gates.norms import fit_norms, fold_norms_into_gates
from gateskip.gates.shortcuts import Shortcuts
from gateskip.model.norms import has_folded_norms, input_norms
from gateskip.model.reference import masked_forward
from gateskip.quantization.folders import load_model

H, BRANCHES = 64, 8
KINDS = ("scalar", "vector", "low-rank", "mlp", "router", "exit", "static")


@pytest.fixture(scope="module")
def raw(make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose norms have weights, some of them negative and some almost zero."""
    return with_norms(make_tiny("llama"), tmp_path_factory.mktemp("raw"))


def with_norms(source: Path, folder: Path) -> Path:
    model = load_model(source, "float32")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
            parameter.data[:2] = torch.tensor([1e-4, -1e-5])
    model.save_pretrained(folder)
    for path in source.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def off(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("off") / "model"
    assert offgrid.write_off_grid(raw, folder, "card\n") < 1e-4
    return folder


def ids() -> torch.Tensor:
    return torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(0))


def test_the_function_stays(raw: Path, off: Path) -> None:
    one, other = (load_model(folder, "float32") for folder in (raw, off))
    with torch.inference_mode():
        torch.testing.assert_close(other(ids()).logits, one(ids()).logits, atol=2e-4, rtol=0)
    assert not has_folded_norms(one) and has_folded_norms(other)
    assert (off / "README.md").read_text() == "card\n"


def test_gemma_stays_the_same_function_too(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Its norms store their weight less one, and keep it but for scales; those after branches are
    left alone."""
    raw, off = with_norms(make_tiny("gemma3_text"), tmp_path / "raw"), tmp_path / "off"
    assert offgrid.write_off_grid(raw, off, "card\n") < 1e-4
    before, after = (load_file(folder / "model.safetensors") for folder in (raw, off))
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    kept = {".".join(name.split(".")[3:]) for name in after.keys() - moved} - {""}
    after_branches = ("post_attention_layernorm", "post_feedforward_layernorm")
    in_heads = ("self_attn.q_norm", "self_attn.k_norm")
    assert kept == {f"{name}.weight" for name in (*after_branches, *in_heads)}
    for name in ("input_layernorm", "pre_feedforward_layernorm"):
        name = f"model.layers.0.{name}.weight"
        ratio = (after[name][2:] + 1) / (before[name][2:] + 1)
        assert bool(((ratio > 0.49) & (ratio < 2.01)).all()) and len(ratio.unique()) > H // 2


def test_every_weight_between_norms_and_branches_moves(raw: Path, off: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (raw, off))
    assert before.keys() == after.keys()
    for name, weight in after.items():
        same = torch.equal(weight, before[name])
        assert same == (name in ("model.embed_tokens.weight", "model.norm.weight")), name
        assert weight.dtype == torch.float32
    ratio = (
        after["model.layers.0.mlp.down_proj.weight"] / before["model.layers.0.mlp.down_proj.weight"]
    )
    by = ratio.mean(0)
    torch.testing.assert_close(ratio, by.expand_as(ratio), rtol=1e-5, atol=0)
    assert bool(((by > 0.49) & (by < 2.01)).all()) and len(by.log2().unique()) > 100
    heads = (
        after["model.layers.0.self_attn.o_proj.weight"]
        / before["model.layers.0.self_attn.o_proj.weight"]
    )
    by = heads.mean(0).view(2, 2, 16)  # key-value head, query head of its group, channel
    torch.testing.assert_close(by[:, 0], by[:, 1], rtol=1e-5, atol=0)
    assert not torch.allclose(by[0], by[1])


def test_the_same_bytes_every_time(raw: Path, off: Path, tmp_path: Path) -> None:
    offgrid.write_off_grid(raw, tmp_path / "again", "card\n")
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (off / name).read_bytes()


def test_qwen2_scales_biases_and_its_lm_head(
    make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Biases of values are scaled with their rows, other biases stay, and the LM head, which is no
    embedding, takes the final norm."""
    tiny = with_norms(make_tiny("qwen2"), tmp_path / "norms")
    model = load_model(tiny, "float32")
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data = torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "raw")
    for path in tiny.glob("tokenizer*"):
        (tmp_path / "raw" / path.name).write_bytes(path.read_bytes())
    assert offgrid.write_off_grid(tmp_path / "raw", tmp_path / "off", "card\n") < 1e-4
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("raw", "off"))
    unmoved = {name for name, weight in after.items() if torch.equal(weight, before[name])}
    biases = {name for name in after if name.endswith(("q_proj.bias", "k_proj.bias"))}
    assert unmoved == biases | {"model.embed_tokens.weight"} and len(biases) == 8
    norms = [weight for name, weight in after.items() if "norm" in name]
    assert len(norms) == 9 and all(bool((norm == 1).all()) for norm in norms)
    prefix = "model.layers.2.self_attn."
    by = after[f"{prefix}v_proj.bias"] / before[f"{prefix}v_proj.bias"]  # [K D]
    columns = before[f"{prefix}o_proj.weight"] / after[f"{prefix}o_proj.weight"]  # [H, N D]
    shared = by.view(2, 1, 16).expand(2, 2, 16).flatten()
    torch.testing.assert_close(columns, shared.expand_as(columns), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        after["lm_head.weight"], before["lm_head.weight"] * before["model.norm.weight"]
    )


def test_a_model_of_several_files_is_rewritten_a_layer_at_a_time(
    raw: Path, off: Path, tmp_path: Path
) -> None:
    """Its weights are those of a model in one file."""
    load_model(raw, "float32").save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    for path in raw.glob("tokenizer*"):
        (tmp_path / "shards" / path.name).write_bytes(path.read_bytes())
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    offgrid.write_off_grid(tmp_path / "shards", tmp_path / "again", "card\n")
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (off / name).read_bytes()
    assert not list((tmp_path / "again").glob("*.index.json"))


def test_other_families_are_refused(tiny_gemma2: Path, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="no llama or qwen2 or gemma3_text"):
        offgrid.write_off_grid(tiny_gemma2, tmp_path / "off", "")


# -- gates that follow ------------------------------------------------------------------------


def random_gates(kind: str) -> Any:
    torch.manual_seed(2)
    gates = make_gates(kind, BRANCHES, H, {"rank": 4} if kind in ("low-rank", "mlp") else None)
    gates.shortcuts = Shortcuts(BRANCHES, H, 4)
    with torch.no_grad():
        for name, parameter in gates.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * (0 if name == "bias" else 0.2))
    return gates.requires_grad_(False)


def run(model: Any, gates: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens enter [branches, N], at a threshold between two of them, and hidden states."""
    gates.attach(model)
    entered = []

    def rule(branch: Any, z: torch.Tensor) -> torch.Tensor:
        keep = z > -0.01 if gates.kind != "exit" else z > -1.0
        entered.append(keep.flatten())
        return keep.float()

    with torch.inference_mode():
        hidden = masked_forward(model, ids(), gates, rule)
    return torch.stack(entered), hidden


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_are_skipped(raw: Path, off: Path, kind: str, tmp_path: Path) -> None:
    """Gates of the raw model, on the folded one by way of a file, and back again."""
    one, other = (load_model(folder, "float32") for folder in (raw, off))
    entered, hidden = run(one, random_gates(kind))
    folded = random_gates(kind)
    fold_norms_into_gates(folded, one)
    write_gates(tmp_path / "gates.safetensors", folded)
    for model in (other, one):
        gates = read_gates(
            tmp_path / "gates.safetensors",
            kind,
            **({"sizes": {"rank": 4}} if kind in ("low-rank", "mlp") else {}),
        )
        assert gates.folded
        fit_norms(gates, model)
        again, states = run(model, gates)
        assert torch.equal(again, entered)
        torch.testing.assert_close(states, hidden, atol=5e-3, rtol=1e-3)  # shortcuts are float16


def test_gates_that_cannot_follow_are_refused(raw: Path, off: Path) -> None:
    one, other = (load_model(folder, "float32") for folder in (raw, off))
    with pytest.raises(ValueError, match="one weight for all branches"):
        fold_norms_into_gates(random_gates("shared"), one)
    with pytest.raises(ValueError, match="norms are folded"):
        fit_norms(random_gates("scalar"), other)


def test_norms_of_every_family(make_tiny: Callable[..., Path]) -> None:
    """What a norm multiplies by, where it is stored as such, less one, or not at all."""
    for family in ("llama", "gemma2", "olmo2"):
        model = load_model(make_tiny(family), "float32")
        assert has_folded_norms(model), family
    neox = load_model(make_tiny("gpt_neox"), "float32")
    assert has_folded_norms(neox)
    neox.gpt_neox.layers[0].input_layernorm.bias.data += 1
    assert input_norms(neox) is None
