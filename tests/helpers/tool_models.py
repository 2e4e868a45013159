"""Tiny models whose chat template takes tools, in the form of Hermes and Qwen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}"
    "{% endfor %}\nFor each call write\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
    "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    '{% for call in message.tool_calls or [] %}<tool_call>\n{"name": "{{ call.function.name }}",'
    ' "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n'
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_with_tools(source: Path, target: Path, instead_of: int | None = None) -> Path:
    """A tiny model with the tokens <tool_call> and </tool_call>.

    It writes <tool_call> wherever `source` would write the token `instead_of`, if its logit is
    positive: its embedding, which is tied, has the same direction, and is longer.
    """
    import torch
    from transformers import AutoTokenizer

    from gateskip.quantization.folders import load_model

    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.chat_template = TEMPLATE
    model = load_model(source, "float32")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model.resize_token_embeddings(
            520, mean_resizing=False
        )  # more than the tokenizer has, as in real models
        weight = model.get_input_embeddings().weight
        weight[512:] = 0
        if instead_of is not None:
            weight[tokenizer.convert_tokens_to_ids("<tool_call>")] = 1.2 * weight[instead_of]
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target
