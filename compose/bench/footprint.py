"""What a model folder takes: bytes on disk, bytes in memory, multiply-adds."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from gateskip.model.compute import Work


def disk_bytes(folder: Path) -> int:
    """Bytes of a folder's weight files, gates included."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def module_bytes(*modules: nn.Module | None) -> int:
    """Bytes of parameters and buffers, each storage counted once."""
    sizes: dict[int, int] = {}
    for module in modules:
        if module is None:
            continue
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


@lru_cache
def dense_work(folder: Path) -> Work:
    """Multiply-adds of the model in a folder, whose weights are not read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return Work.of(AutoModelForCausalLM.from_config(config))
