"""A model folder as one GGUF file, the format of llama.cpp.

What llama.cpp's own converter does for architecture `llama`, through its `gguf` package: metadata
from config.json, a byte-level BPE tokenizer with the name of its pre-tokenizer, and tensors under
their GGUF names. The file is loaded back before it is put in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.artifacts.folder import is_gated, probe_ids, require_model
from compose.errors import ArtifactError, StepError, suggest
from compose.store import new_file, read_json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

KINDS: dict[str, str] = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_1": "MOSTLY_Q4_1",
    "q4_0": "MOSTLY_Q4_0",
}
"""How weights are stored: name -> what llama.cpp calls such a file."""

BLOCK = 32  # weights of a row that share a scale
OUTER = ("model.embed_tokens.weight", "lm_head.weight")
SAME = 1e-3  # largest difference of two logits, over their range, for equal weights in float32

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_gguf(folder: Path, file: Path, kind: str) -> dict[str, float]:
    """Write the model in `folder` to `file`, load it back, compare; gives `check_gguf` and `bytes`.

    Raises:
        ArtifactError: the folder cannot be written as GGUF, or there is no such kind.
        StepError: the file does not load to the model that was written.
    """
    if kind not in KINDS:
        raise ArtifactError(f"there is no GGUF type {kind!r}: {suggest(kind, KINDS)}")
    config = require_model(folder)
    refuse(folder, config)
    with new_file(file) as unfinished:
        _write(folder, config, unfinished, kind)
        differences = check_gguf(folder, unfinished, kind)
    return differences | {"bytes": float(file.stat().st_size)}


def refuse(folder: Path, config: dict[str, Any]) -> None:
    """Say why this folder cannot be written, if it cannot.

    Raises:
        ArtifactError: with every reason.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    reasons = {
        "it has gates, which llama.cpp cannot run": is_gated(folder),
        "its weights are quantized": "quantization_config" in config,
        f"its architecture is {config.get('model_type')!r}, and only 'llama' is supported": (
            config.get("model_type") != "llama"
        ),
        f"its positions are scaled ({rope.get('rope_type')})": (
            rope.get("rope_type", "default") != "default"
        ),
        "its activation is not SiLU": config.get("hidden_act", "silu") != "silu",
    }
    given = [reason for reason, holds in reasons.items() if holds]
    if given:
        raise ArtifactError(
            f"{folder} cannot be written as GGUF: {'; '.join(given)}",
            fix="name a Llama folder from before gates and quantizers; --type packs the file",
        )


def _write(folder: Path, config: dict[str, Any], file: Path, kind: str) -> None:
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = GGUFWriter(file, "llama", use_temp_file=True)  # tensors need not be in memory at once
    _add_metadata(writer, folder, config, kind)
    _add_tokenizer(writer, folder, config)
    for name, tensor in _tensors(folder, config):
        stored, data = rounded(name, tensor, kind)
        writer.add_tensor(_gguf_name(name, names), _permuted(name, data, config), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- Metadata ------------------------------------------------------------------------------------


def _add_metadata(writer: Any, folder: Path, config: dict[str, Any], kind: str) -> None:
    import gguf

    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer.add_name(folder.resolve().name)
    writer.add_file_type(getattr(gguf.LlamaFileType, KINDS[kind]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


# --- Tokenizer -----------------------------------------------------------------------------------


def _add_tokenizer(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    from gguf import SpecialVocab, TokenType

    stored = read_json(folder / "tokenizer.json") or {}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(stored))
    size = config["vocab_size"]
    texts = [f"[PAD{number}]" for number in range(size)]
    kinds = [TokenType.UNUSED] * size
    for text, number in stored["model"]["vocab"].items():
        texts[number], kinds[number] = text, TokenType.NORMAL
    for token in stored.get("added_tokens", []):
        special = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        texts[token["id"]], kinds[token["id"]] = token["content"], special
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def pre_tokenizer_name(stored: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json.

    Raises:
        ArtifactError: it is no byte-level BPE, or cuts in a way that has no name here.
    """
    model, cut = stored.get("model") or {}, stored.get("pre_tokenizer") or {}
    parts = [_plain(part) for part in cut.get("pretokenizers") or [cut]]
    known: dict[str, list[dict[str, Any]]] = {
        "gpt-2": [GPT2],
        "smollm": [{"type": "Digits", "individual_digits": True}, GPT2],
        "llama-bpe": [
            {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated"},
            GPT2 | {"use_regex": False},
        ],
    }
    if model.get("type") == "BPE" and stored.get("normalizer") is None:
        for name, wanted in known.items():
            if parts == wanted:
                return name
    raise ArtifactError(
        "the tokenizer cannot be written as GGUF: it cuts text in another way than "
        + ", ".join(known),
        fix="convert the exported folder with llama.cpp's own convert_hf_to_gguf.py",
    )


def _plain(part: dict[str, Any]) -> dict[str, Any]:
    """A pre-tokenizer's settings without those that change nothing."""
    silent = {"trim_offsets": part.get("trim_offsets"), "invert": False}
    return {key: value for key, value in part.items() if (key, value) not in silent.items()}


# --- Tensors -------------------------------------------------------------------------------------


def _tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every weight, one file at a time; a tied LM head is not a second one."""
    from safetensors import safe_open

    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tied = name == "lm_head.weight" and config.get("tie_word_embeddings")
                if not tied and not name.endswith("rotary_emb.inv_freq"):
                    yield name, file.get_tensor(name)


def rounded(name: str, tensor: Tensor, kind: str) -> tuple[Any, NDArray[Any]]:
    """A tensor as it is stored: its GGML type and data, rows first.

    Vectors stay in float32, rows that are no whole number of blocks in float16. With four bits,
    the embedding and the LM head get eight.
    """
    from gguf import GGMLQuantizationType as Ggml
    from gguf import quants

    if name in OUTER and kind.startswith("q4"):
        kind = "q8_0"
    if kind.startswith("q") and tensor.shape[-1] % BLOCK:
        kind = "f16"
    stored = Ggml.F32 if tensor.ndim == 1 else Ggml[kind.upper()]
    return stored, quants.quantize(tensor.float().numpy(), stored)


def _permuted(name: str, data: NDArray[Any], config: dict[str, Any]) -> NDArray[Any]:
    """Rows of q and k in the order of llama.cpp's rotary embedding: pairs side by side.

    transformers rotates channel i of a head [D] with channel i + D / 2, llama.cpp 2i with 2i + 1.
    """
    heads = config["num_attention_heads"]
    if ".k_proj." in name:
        heads = config.get("num_key_value_heads") or heads
    elif ".q_proj." not in name:
        return data
    pairs = data.reshape(heads, 2, len(data) // heads // 2, *data.shape[1:])
    return pairs.swapaxes(1, 2).reshape(data.shape)


def _gguf_name(name: str, names: Any) -> str:
    """model.layers.0.mlp.up_proj.weight -> blk.0.ffn_up.weight"""
    gguf_name: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if gguf_name is None:
        raise ArtifactError(f"the tensor {name!r} has no name in GGUF")
    return gguf_name


# --- Loading it back -----------------------------------------------------------------------------


def check_gguf(folder: Path, file: Path, kind: str) -> dict[str, float]:
    """Load the file by transformers; compare it with the folder's weights, rounded alike.

    Both are computed in float32, so whatever the type they must agree: what differs is not rounding
    but a weight, a name or a size. Returns `max_abs_diff` over `range` of these logits, and `kl` to
    the folder's own predictions, which is the price of the rounding.

    Raises:
        StepError: they differ.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    ids = probe_ids(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        dense = model(ids).logits  # [1, S, V]
        _round_in_place(model, kind)
        wanted = model(ids).logits
        del model
        loaded = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        ).eval()
        logits = loaded(ids).logits
    if logits.shape != wanted.shape:
        raise StepError(f"the file gives logits of shape {tuple(logits.shape)}")
    difference = float((logits - wanted).abs().max())
    span = float(wanted.max() - wanted.min())
    if not difference <= SAME * span:
        raise StepError(
            "the GGUF file does not load to the model that was written: its logits differ by"
            f" {difference:.3g} over a range of {span:.3g}"
        )
    target, predicted = dense.log_softmax(-1), logits.log_softmax(-1)
    kl = float((target.exp() * (target - predicted)).sum(-1).mean())
    return {"max_abs_diff": difference, "range": span, "kl": kl}


def _round_in_place(model: Any, kind: str) -> None:
    """Give every weight the value that its stored form has."""
    import torch
    from gguf import quants

    for name, parameter in model.named_parameters():
        stored, data = rounded(name, parameter.detach(), kind)
        value = torch.from_numpy(quants.dequantize(data, stored).copy())
        parameter.copy_(value.view(parameter.shape))
