"""Tokenizers converted between a GGUF file and a Hugging Face folder.

Both have vocabulary, merges and special tokens. tokenizer.json also has the pre-tokenizer, which
cuts text before merges are applied. A GGUF file has only a name for it, so a pre-tokenizer without
a name here is refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from compose.artifacts.gguf.file import GgufFile
from compose.errors import ArtifactError, shortened
from compose.store import read_json

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BYTES = GPT2 | {"use_regex": False}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}


PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, GPT2],
    "llama-bpe": [_split(LLAMA3), BYTES],
    "qwen2": [_split(QWEN2), BYTES],
}
"""llama.cpp's name of a pre-tokenizer -> its parts, as tokenizer.json states them."""

OTHER_NAMES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
}
"""Other names that llama.cpp treats as one of these."""

SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
"""How Gemma's tokenizer splits text: not at all, because no space is left by then."""

BYTE = re.compile(r"<0x[0-9A-F]{2}>")

BYTE_LEVEL, PIECES = "gpt2", "llama"
MODELS = (BYTE_LEVEL, PIECES)
"""tokenizer.ggml.model: byte-level BPE, and SentencePiece."""


# --- From a file ---------------------------------------------------------------------------------


def require_tokenizer(file: GgufFile) -> None:
    """Refuse a file whose tokenizer cannot be read.

    Raises:
        ArtifactError: it has no tokenizer, or one of an unknown kind.
    """
    model = file.metadata.get("tokenizer.ggml.model")
    if model is None or not file.metadata.get("tokenizer.ggml.tokens"):
        file.refuse("it has no tokenizer", "name a file with one, as llama.cpp's converter writes")
    if model not in MODELS:
        file.refuse(f"its tokenizer is {shortened(repr(model))} (supported: {', '.join(MODELS)})")
    if model == BYTE_LEVEL:
        _pre_tokenizer_of(file)


def _pre_tokenizer_of(file: GgufFile) -> list[dict[str, Any]]:
    name = str(file.metadata.get("tokenizer.ggml.pre", "default"))
    parts = PRE_TOKENIZERS.get(OTHER_NAMES.get(name, name))
    if parts is None:
        readable = ", ".join((*PRE_TOKENIZERS, *OTHER_NAMES))
        file.refuse(f"its pre-tokenizer is {shortened(repr(name))} (supported: {readable})")
    return parts


def save_tokenizer(file: GgufFile, folder: Path, longest: int) -> None:
    """Write the tokenizer and chat template of a file into a model folder.

    transformers builds vocabulary, merges and special tokens; this module adds the pre-tokenizer.
    `longest` is the model's context length.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
    if file.metadata["tokenizer.ggml.model"] == BYTE_LEVEL:
        tokenizer.backend_tokenizer.pre_tokenizer = _built(_pre_tokenizer_of(file))
    tokenizer.model_max_length = longest
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for stale in ("is_local", "local_files_only", "backend"):
        settings.pop(stale, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version knows
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _built(parts: list[dict[str, Any]]) -> Any:
    """A pre-tokenizer of the tokenizers library from the parts that its JSON has."""
    from tokenizers import Regex, pre_tokenizers

    built: list[Any] = []
    for part in parts:
        if part["type"] == "Digits":
            built.append(pre_tokenizers.Digits(individual_digits=part["individual_digits"]))
        elif part["type"] == "Split":
            built.append(pre_tokenizers.Split(Regex(part["pattern"]["Regex"]), "isolated"))
        else:
            settings = {key: part[key] for key in ("add_prefix_space", "use_regex")}
            built.append(pre_tokenizers.ByteLevel(**settings))
    return built[0] if len(built) == 1 else pre_tokenizers.Sequence(built)


# --- Into a file ---------------------------------------------------------------------------------


def add_tokenizer(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    """Give a GGUFWriter the tokenizer and chat template of a model folder.

    Raises:
        ArtifactError: it is neither a byte-level BPE with a known pre-tokenizer, nor pieces as
            Gemma has them.
    """
    from gguf import SpecialVocab, TokenType

    stored = read_json(folder / "tokenizer.json") or {}
    pieces = has_pieces(stored)
    if pieces:
        writer.add_tokenizer_model(PIECES)
        writer.add_add_space_prefix(False)
    else:
        writer.add_tokenizer_model(BYTE_LEVEL)
        writer.add_tokenizer_pre(pre_tokenizer_name(stored))
    size = config["vocab_size"]
    texts = [f"[PAD{number}]" for number in range(size)]
    kinds = [TokenType.UNUSED] * size
    for text, number in stored["model"]["vocab"].items():
        texts[number], kinds[number] = text, TokenType.NORMAL
    for token in stored.get("added_tokens", []):
        special = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        texts[token["id"]], kinds[token["id"]] = token["content"], special
    if pieces:
        for number, text in enumerate(texts):
            if BYTE.fullmatch(text):
                kinds[number] = TokenType.BYTE
        writer.add_token_scores(_scores(stored["model"], texts))
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    SpecialVocab(folder, load_merges=not pieces, n_vocab=size).add_to_gguf(writer, quiet=True)


def has_pieces(stored: dict[str, Any]) -> bool:
    """Whether a tokenizer.json has SentencePiece's pieces, merged by rank, with ▁ for a space and
    no text prefix, as Gemma's."""
    model = stored.get("model") or {}
    normal = stored.get("normalizer") or {}
    cut = stored.get("pre_tokenizer") or SPACES
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    whole = model.get("type") == "BPE" and bool(model.get("byte_fallback"))
    return whole and normal == spaces and _plain(cut) == SPACES


def _scores(model: dict[str, Any], texts: list[str]) -> list[float]:
    """A score for each token: minus the rank of the first merge that makes it. llama.cpp merges
    higher scores first."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        first.setdefault(pair.replace(" ", "") if isinstance(pair, str) else "".join(pair), rank)
    return [-float(first.get(text, len(model["merges"]))) for text in texts]


def pre_tokenizer_name(stored: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json.

    Raises:
        ArtifactError: it is neither a byte-level BPE with a known pre-tokenizer, nor pieces as
            Gemma has them.
    """
    model, cut = stored.get("model") or {}, stored.get("pre_tokenizer") or {}
    parts = [_plain(part) for part in cut.get("pretokenizers") or [cut]]
    if model.get("type") == "BPE" and stored.get("normalizer") is None:
        for name, expected in PRE_TOKENIZERS.items():
            if parts == expected:
                return name
    raise ArtifactError(
        "the tokenizer cannot be written as GGUF: its pre-tokenizer is none of "
        + ", ".join(PRE_TOKENIZERS),
        fix="convert the exported folder with llama.cpp's own convert_hf_to_gguf.py",
    )


def _plain(part: dict[str, Any]) -> dict[str, Any]:
    """A pre-tokenizer's settings without those that have no effect."""
    silent = {"trim_offsets": part.get("trim_offsets"), "invert": False}
    return {key: value for key, value in part.items() if (key, value) not in silent.items()}
