"""GGUF files: what is in them, that they load back, and what cannot be told in one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import SIX_LAYERS, UNSAID

from compose.artifacts.gguf import tokenizer as gguf_tokenizer
from compose.artifacts.gguf import write as llamacpp
from compose.artifacts.gguf.metadata import WRITTEN
from compose.artifacts.gguf.names import paired
from compose.artifacts.gguf.tokenizer import pre_tokenizer_name
from compose.artifacts.gguf.write import KINDS, refuse, write_gguf
from compose.artifacts.packed_folder import PackedFolder
from compose.errors import ArtifactError, StepError

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA3 = {
    "type": "Split",
    "pattern": {"Regex": gguf_tokenizer.LLAMA3},
    "behavior": "Isolated",
    "invert": False,
}


def read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file's metadata and tensors, by name."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_every_type_loads_back(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "out" / "model.gguf"
    found = write_gguf(tiny_llama, file, kind)
    bound = {"f32": 1e-6, "f16": 1e-4, "bf16": 1e-2, "q8_0": 1e-2}.get(kind, 1.0)
    assert -1e-6 <= found["kl"] < bound
    assert [path.name for path in file.parent.iterdir()] == ["model.gguf"]
    _, tensors = read(file)
    types = {name: tensors[name].tensor_type.name.lower() for name in tensors}
    assert types["blk.0.ffn_up.weight"] == types["blk.3.attn_q.weight"] == kind
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "f32"
    assert types["token_embd.weight"] == ("q8_0" if kind.startswith("q4") else kind)
    assert "output.weight" not in tensors, "the head is the embedding"


def test_the_file_says_what_the_folder_says(tiny_llama: Path, tmp_path: Path) -> None:
    write_gguf(tiny_llama, tmp_path / "a.gguf", "f32")
    fields, tensors = read(tmp_path / "a.gguf")
    wanted = {
        "general.architecture": "llama",
        "llama.block_count": 4,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.context_length": 512,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
    }
    assert {name: fields[name] for name in wanted} == wanted
    stored = json.loads((tiny_llama / "tokenizer.json").read_text())
    texts = fields["tokenizer.ggml.tokens"]
    assert all(texts[number] == text for text, number in stored["model"]["vocab"].items())
    assert len(fields["tokenizer.ggml.merges"]) == len(stored["model"]["merges"])
    assert texts[fields["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert fields["tokenizer.ggml.token_type"][texts.index("<|im_end|>")] == 3, "a control token"
    assert "<|im_start|>" in fields["tokenizer.chat_template"]
    assert len(tensors) == 2 + 4 * 9


def test_a_pair_that_rotates_together_lies_together() -> None:
    """Of a head of 4: channels 0 and 2, 1 and 3."""
    config = {"num_attention_heads": 2, "num_key_value_heads": 1}
    rows = torch.arange(8).view(8, 1).numpy()
    queries = paired("layers.0.self_attn.q_proj.weight", rows, config)
    assert queries[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    keys = paired("layers.0.self_attn.k_proj.weight", rows[:4], config)
    assert keys[:, 0].tolist() == [0, 2, 1, 3]
    assert paired("layers.0.self_attn.v_proj.weight", rows, config) is rows


def test_rows_that_are_no_whole_blocks_stay_in_half_precision(
    make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_tiny("llama", intermediate_size=100, tie_word_embeddings=False)
    write_gguf(folder, tmp_path / "a.gguf", "q8_0")
    _, tensors = read(tmp_path / "a.gguf")
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"
    assert "output.weight" in tensors


def test_a_file_that_does_not_load_to_the_same_model_is_not_left(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What forgetting to reorder the heads would do."""
    monkeypatch.setattr(llamacpp, "paired", lambda name, data, config: data)
    with pytest.raises(StepError, match="does not load to the model"):
        write_gguf(tiny_llama, tmp_path / "out" / "a.gguf", "q8_0")
    assert list((tmp_path / "out").iterdir()) == []


def test_integer_zero_points_become_minima(
    grid_folder: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    """The GPTQ format: a minimum is a product, which float16 rounds by 0.8 % of a scale at most."""
    import gguf

    folder = grid_folder(tiny_llama, "int4", offset="integer")
    done = write_gguf(folder, tmp_path / "a.gguf", None)
    assert done["kind"] == "q4_1" and done["kl"] < 1e-3
    layer = PackedFolder(folder).layer("model.layers.1.mlp.down_proj")
    (tensor,) = [
        tensor
        for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors
        if tensor.name == "blk.1.ffn_down.weight"
    ]
    assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1
    read = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    apart = (read - layer.weight()).abs().unflatten(1, (-1, layer.group)).amax(-1)
    assert bool((apart <= 0.0074 * layer.scale.float()).all())
    assert layer.zeros is not None and len(layer.zeros.unique()) > 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "its weights are quantized by 'awq'"),
        ({"model_type": "mistral"}, "'mistral', and only these are supported: llama, qwen2"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "positions are scaled"),
        ({"hidden_act": "gelu"}, "not SiLU"),
    ],
)
def test_what_cannot_be_told_is_refused(
    change: dict[str, Any], says: str, tiny_llama: Path
) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    refuse(tiny_llama, config)
    with pytest.raises(ArtifactError, match=says):
        refuse(tiny_llama, config | change)


def test_gates_and_unknown_types_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gated"
    shutil.copytree(tiny_llama, folder)
    (folder / "gates.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="it has gates"):
        write_gguf(folder, tmp_path / "a.gguf", "f16")
    with pytest.raises(ArtifactError, match=r"'q8'.*did you mean 'q8_0'"):
        write_gguf(tiny_llama, tmp_path / "a.gguf", "q8")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ([BYTES], "gpt-2"),
        ([DIGITS, BYTES], "smollm"),
        ([LLAMA3, BYTES | {"use_regex": False}], "llama-bpe"),
    ],
)
def test_pre_tokenizers_that_have_a_name(parts: list[dict[str, Any]], name: str) -> None:
    cut = parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}
    stored = {"model": {"type": "BPE"}, "normalizer": None, "pre_tokenizer": cut}
    assert pre_tokenizer_name(stored) == name
    for other in (
        stored | {"model": {"type": "Unigram"}},
        stored | {"normalizer": {"type": "NFC"}},
        stored | {"pre_tokenizer": BYTES | {"add_prefix_space": True}},
        stored | {"pre_tokenizer": None},
    ):
        with pytest.raises(ArtifactError, match="its pre-tokenizer is none of"):
            pre_tokenizer_name(other)


# --- Families ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
@pytest.mark.parametrize("family", WRITTEN)
def test_a_family_loads_back(
    family: str, kind: str, make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """In transformers, where it reads all of a family's metadata, and in our own reader."""
    from transformers import AutoModelForCausalLM, GgufConfig

    from compose.artifacts.gguf.read import write_folder
    from gateskip.quantization.folders import load_model

    more = SIX_LAYERS if family == "gemma3_text" else {}
    source, file = make_tiny(family, **more), tmp_path / "a.gguf"
    assert write_gguf(source, file, kind)["max_abs_diff"] < 1e-3
    write_folder(file, tmp_path / "model")
    if family in ("llama", "qwen2"):
        ids = torch.arange(40).view(1, -1)
        theirs = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        ).eval()
        with torch.inference_mode():
            ours = load_model(tmp_path / "model", "float32")(ids).logits
            torch.testing.assert_close(theirs(ids).logits, ours, atol=1e-4, rtol=1e-4)
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "model")
    )
    assert {k: after.get(k) for k in before if k not in UNSAID} == {
        k: v for k, v in before.items() if k not in UNSAID
    }


def test_what_a_file_cannot_say_is_refused(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp knows which of Gemma's layers see a window: one in six sees all."""
    with pytest.raises(ArtifactError, match="its layer_types is"):
        write_gguf(make_tiny("gemma3_text"), tmp_path / "a.gguf", "f32")
    assert not (tmp_path / "a.gguf").exists()


def test_a_network_that_drafts_stays_behind(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = Path(shutil.copytree(tiny_llama, tmp_path / "drafts"))
    save_file({"down.weight": torch.ones(2, 2)}, folder / "draft_network.safetensors")
    write_gguf(folder, tmp_path / "a.gguf", "f32")
    write_gguf(tiny_llama, tmp_path / "b.gguf", "f32")
    assert read(tmp_path / "a.gguf")[1].keys() == read(tmp_path / "b.gguf")[1].keys()


def test_pieces_as_gemma_has_them_come_back(tiny_llama: Path, tmp_path: Path) -> None:
    """Scores stand for the ranks of merges, and bytes for what no piece has."""
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerFast

    from compose.artifacts.gguf.file import open_gguf

    made = pieces_of(Path(__file__).read_text())
    own = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="<eos>", bos_token="<bos>"
    )
    own.save_pretrained(tmp_path / "own")
    file, size = tmp_path / "a.gguf", made.get_vocab_size()
    writer = GGUFWriter(file, "gemma3")
    gguf_tokenizer.add_tokenizer(writer, tmp_path / "own", {"vocab_size": size})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "back").mkdir()
    gguf_tokenizer.save_tokenizer(open_gguf(file), tmp_path / "back", 512)
    back = PreTrainedTokenizerFast.from_pretrained(tmp_path / "back")
    fields, _ = read(file)
    assert (
        fields["tokenizer.ggml.model"] == "llama" and not fields["tokenizer.ggml.add_space_prefix"]
    )
    kinds = dict(
        zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True)
    )
    assert (kinds["<unk>"], kinds["<0x0A>"], kinds["e"]) == (3, 6, 1)
    for text in ("def test_pieces(x):  return  x", "naïve — 東京 \n\n two", " a"):
        ids = own(text, add_special_tokens=False).input_ids
        assert back(text, add_special_tokens=False).input_ids == ids, text


def pieces_of(text: str) -> Any:
    """A tokenizer of pieces that merge by rank, learned from a text, with bytes to fall back on."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def dressed(model: Any) -> Any:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        return tokenizer

    learned = dressed(models.BPE())
    learned.train_from_iterator([text], trainers.BpeTrainer(vocab_size=400))
    merges = json.loads(learned.to_str())["model"]["merges"]
    own = sorted(learned.get_vocab(), key=learned.token_to_id)
    named = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *own]
    vocabulary = {token: number for number, token in enumerate(named)}
    model = models.BPE(
        vocabulary,
        [tuple(pair) for pair in merges],
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    return dressed(model)


# --- Integer grids -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "settings", "kinds"),
    [
        ("int4", {}, {"Q4_1", "Q8_0"}),
        ("int4", {"embedding": 6, "group_size": 64}, {"Q4_1", "Q8_0"}),
        ("int4", {"embedding": 4, "mixed": {"down_proj": 8}}, {"Q4_0", "Q4_1", "Q8_0"}),
        ("int4", {"embedding": None, "skip": ["o_proj"]}, {"F32", "Q4_1", "Q8_0"}),
        ("int4", {"embedding": None, "values": None}, {"F32", "Q4_1"}),
        ("int3", {}, {"Q4_1", "Q8_0"}),
        ("int2", {}, {"Q4_1", "Q8_0"}),
        ("int8", {}, {"Q8_0"}),
    ],
)
def test_integer_grids_are_written_as_they_are(
    use: str,
    settings: dict[str, Any],
    kinds: set[str],
    tiny_llama: Path,
    grid_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The weights are the folder's, bit by bit, read by the gguf package and by our reader."""
    import gguf

    from compose.artifacts.gguf.read import write_folder
    from gateskip.quantization.folders import load_model

    folder, file = grid_folder(tiny_llama, use, **settings), tmp_path / "a.gguf"
    found = write_gguf(folder, file, None)
    assert abs(found["kl"]) < 1e-6 and found["kind"] == ("q8_0" if use == "int8" else "q4_1")
    _, tensors = read(file)
    stored = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert {kind for name, kind in stored.items() if not name.endswith("norm.weight")} == kinds
    model = load_model(folder, "float32")
    up = tensors["blk.1.ffn_up.weight"]
    ours = model.model.layers[1].mlp.up_proj.grid().weight()
    theirs = gguf.dequantize(up.data, up.tensor_type)
    assert torch.equal(ours, torch.from_numpy(theirs.reshape(ours.shape)))
    ids = torch.arange(60).view(1, -1)
    for keep in (False, True):
        write_folder(file, tmp_path / str(keep), keep_blocks=keep)
        again = load_model(tmp_path / str(keep), "float32")
        with torch.inference_mode():
            assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_file_that_we_wrote_and_keep_is_the_folder_again(
    tiny_llama: Path, grid_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Codes byte for byte; scales and minima in float16 what they were in bytes and steps."""
    from safetensors.torch import load_file

    from compose.artifacts.gguf.read import write_folder
    from gateskip.quantization.grid_linear import read

    folder = grid_folder(tiny_llama, "int4")
    write_gguf(folder, tmp_path / "a.gguf", None)
    write_folder(tmp_path / "a.gguf", tmp_path / "again", keep_blocks=True)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    steps = {name for name in before if name.endswith(".exponent")}
    assert steps and after.keys() == before.keys() - steps
    for name in (name for name in steps if "layers" in name and "v_proj" not in name):
        parts = [name.replace("exponent", part) for part in ("codes", "scale", "minimum")]
        was, now = (
            read(*(file[part] for part in parts), file.get(name), 4) for file in (before, after)
        )
        assert torch.equal(was.scale, now.scale) and torch.equal(was.weight(), now.weight())
    assert after["model.layers.0.mlp.up_proj.minimum"].dtype == torch.float16
    plain = [name for name in after if not name.endswith((".scale", ".minimum"))]
    assert all(torch.equal(before[name], after[name]) for name in plain)


def test_grids_that_have_no_blocks_are_refused(
    tiny_llama: Path, grid_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from compose.artifacts.gguf.grids import as_blocks

    folder = grid_folder(tiny_llama, "int4")
    with pytest.raises(ArtifactError, match=r"written unchanged"):
        write_gguf(folder, tmp_path / "a.gguf", "q4_1")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = 16
    with pytest.raises(ArtifactError, match=r"groups of 16 are not whole blocks of 32"):
        refuse(folder, config)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.exponent"] -= 30
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"layers\.2\.mlp\.up_proj: float16, which GGUF needs"):
        write_gguf(copy, tmp_path / "a.gguf", None)
    codes, scale = torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1)
    with pytest.raises(ArtifactError, match="no GGUF block has 8 bits and a minimum"):
        as_blocks("x", codes, scale, scale, None, 8)
    assert not (tmp_path / "a.gguf").exists()
