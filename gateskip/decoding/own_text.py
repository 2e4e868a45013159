"""Text that a model wrote, and the inputs of its layers on this text. Copies are fitted to it.

Writing it takes about a hundred decoding steps of eight rows, and gives the same in every process.
So the text is stored beside the compiled kernels, by a fingerprint of the model's weights.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gateskip.kernels.autotune import new_file, stored_beside
from gateskip.quantization.dequantize import linear_layers
from gateskip.quantization.draft_copy import Inputs, read_text
from gateskip.runtime.backend import Thresholds

SAMPLED = 32  # numbers of each tensor by which a model is known again
VERSION = 1  # of how the text is written


@dataclass(frozen=True)
class OwnText:
    """Token ids [N, S] that a model wrote, and the inputs of its layers on them."""

    blocks: Tensor
    inputs: Inputs


def own_text(model: Any, gates: Any | None, write: Callable[[], Tensor]) -> OwnText:
    """The stored text of a model with its gates; written by `write`, read and stored where there is
    none."""
    parts = [fingerprint(part, None) for part in (model, gates) if part is not None]
    file = stored_beside(f"own-text-{VERSION}-{'-'.join(parts)}.safetensors")
    stored = _load(file, model)
    if stored is None:
        blocks = write()
        stored = OwnText(blocks, read_text(model, blocks))
        _store(file, stored, model)
    return stored


def _load(file: Path, model: Any) -> OwnText | None:
    """The text in a file; None where there is none that fits the model."""
    layers = linear_layers(model)
    try:
        tensors = load_file(file)
        blocks, head = tensors["blocks"], tensors["head"]
        squares = {layer: tensors[str(number)] for number, layer in enumerate(layers)}
    except (OSError, SafetensorError, KeyError):
        return None
    fits = all(len(values) in (0, layer.in_features) for layer, values in squares.items())
    return OwnText(blocks, Inputs(squares, head)) if fits else None


def _store(file: Path, text: OwnText, model: Any) -> None:
    """Write a file, whole or not at all; nothing where the folder cannot be written."""
    squares = [text.inputs.layers[layer] for layer in linear_layers(model)]
    tensors = {str(number): values.contiguous() for number, values in enumerate(squares)}
    tensors |= {"blocks": text.blocks.contiguous(), "head": text.inputs.head.contiguous()}
    with contextlib.suppress(OSError, SafetensorError), new_file(file) as path:
        save_file(tensors, path)


def fingerprint(model: Any, thresholds: Thresholds) -> str:
    """A text that identifies a model's weights and its drafts' thresholds."""
    digest = hashlib.sha256(repr(thresholds and list(thresholds)).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].contiguous()
        digest.update(some.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
