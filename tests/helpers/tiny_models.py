"""Tiny models of every supported family: random weights, and a tokenizer trained on the spot."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TINY_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    # Wide enough for branches to outweigh the embedding: else tied models repeat their input.
    "initializer_range": 0.15,
}

TINY_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16, "tie_word_embeddings": True},
    "mistral": {"head_dim": 16, "sliding_window": 32},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {"sliding_window": 32, "tie_word_embeddings": True},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1], "tie_word_embeddings": True},
    "olmo2": {},
    "gpt_neox": {"num_key_value_heads": None, "rotary_pct": 0.25},
}


def _tiny_tokenizer(vocab_size: int) -> Any:
    """A byte-level BPE tokenizer trained on this project's licence text, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([(ROOT / "LICENSE").read_text("utf-8")], trainer)
    assert tokenizer.get_vocab_size() == vocab_size, "the licence is too short for this vocabulary"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=TINY_SIZES["max_position_embeddings"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny(folder: Path, family: str, seed: int = 0, **overrides: Any) -> Path:
    """Save a random float32 model of `family`, with its tokenizer. Those that are not keys of
    TINY_FAMILIES have no settings but TINY_SIZES."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**TINY_SIZES, **TINY_FAMILIES.get(family, {}), **overrides}
    tokenizer = _tiny_tokenizer(sizes["vocab_size"])
    config = AutoConfig.for_model(
        family,
        **sizes,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if family.startswith("gemma"):
        # Gemma scales its embedding by sqrt(hidden), and a tied model would repeat its last token:
        # take the scale back here, and give it to the last norm, whose weight w counts as 1 + w.
        scale = sizes["hidden_size"] ** 0.5
        with torch.no_grad():
            model.model.embed_tokens.weight.div_(scale)
            model.model.norm.weight.fill_(scale - 1)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stored_as(source: Path, dtype: str, folder: Path) -> Path:
    """A model's folder in another type."""
    import torch

    from gateskip.quantization.folders import load_model

    load_model(source, "float32").to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def first_layers(source: Path, target: Path, count: int) -> Path:
    """A model of the first layers of another one, with its tokenizer: it drafts for it."""
    from gateskip.quantization.folders import load_model

    shutil.copytree(source, target)
    model = load_model(source, "float32")
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    model.save_pretrained(target)
    return target


def save_gated(
    source: Path,
    target: Path,
    budgets: tuple[float, ...],
    *,
    shortcuts: bool = False,
    decode: dict[str, Any] | None = None,
) -> Path:
    """A tiny model's folder with warm-started gates, calibrated at some budgets."""
    import torch

    from gateskip.calibration.fit_shortcuts import fit_shortcuts
    from gateskip.calibration.thresholds import calibrate
    from gateskip.calibration.warm_start import warm_start
    from gateskip.checkpoint import GateFile, grid_of, save_gates
    from gateskip.quantization.folders import load_model

    model = load_model(source, "float32")
    blocks = torch.randint(3, 512, (6, 48), generator=torch.Generator().manual_seed(2))
    gates, sensitivity = warm_start(model, blocks)
    if shortcuts:
        gates.shortcuts = fit_shortcuts(model, blocks, 8)
        gates.shortcuts.settle()
    grid, kept = grid_of(calibrate(model, gates.requires_grad_(False), blocks, budgets))
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (target / name).write_bytes((source / name).read_bytes())
    file = GateFile(gates, "project", grid, kept, sensitivity, decode=decode or {})
    save_gates(target, file)
    return target
