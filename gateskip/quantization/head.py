"""An LM head in 8 bits: signed bytes, a scale for every 32 weights.

It has half the bytes of a bfloat16 head, and the head of a small model is a fifth of all bytes that
decoding reads. The file keeps the full weights, which the embedding shares in a tied model; a note
beside them says that the head is rounded while loading.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_FILE = "lm_head.json"
INT8 = "int8"
GROUP = 32
ROWS = 8192  # rows that are rounded at a time


def to_bytes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [V, H] in -127 to 127 and scales [V, H / GROUP] of a head's weight [V, H].

    Scales are bfloat16 numbers, as kernels read them; both are returned in float32.
    """
    groups = weight.detach().float().unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(2) / 127).bfloat16().float()
    codes = (groups / scale.clamp_min(1e-12).unsqueeze(2)).round().clamp(-127, 127)
    return codes.flatten(1), scale


def rounded(weight: Tensor) -> Tensor:
    """The weight [V, H] rounded to 8 bits, in its own type."""
    parts = []
    for rows in weight.split(ROWS):
        codes, scale = to_bytes(rows)
        whole = codes.unflatten(1, (-1, GROUP)) * scale.unsqueeze(2)
        parts.append(whole.flatten(1).to(weight.dtype))
    return torch.cat(parts)


class RoundedHead(nn.Module):
    """An LM head that multiplies with its weights rounded to 8 bits. It keeps the full ones, which
    may be the embedding's, and rounds them again for each product; the native engine rounds once.
    """

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> logits [..., V]."""
        return F.linear(x, rounded(self.weight), self.bias)


def head_format(folder: Path) -> str | None:
    """The format of a folder's LM head: `int8`, or None for the weights' own."""
    file = folder / HEAD_FILE
    return json.loads(file.read_text())["format"] if file.exists() else None


def round_head(model: Any) -> None:
    """Put the model's LM head in 8 bits, in place.

    Raises ValueError for a head whose rows are not whole groups.
    """
    head = model.get_output_embeddings()
    if head.weight.shape[1] % GROUP:
        raise ValueError(f"an LM head of {head.weight.shape[1]} inputs has no whole groups of 32")
    model.set_output_embeddings(RoundedHead(head))
