"""The size of a model folder: bytes on disk, bytes in memory, multiply-adds."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from gateskip.model.compute import Work


def disk_bytes(folder: Path) -> int:
    """Bytes of a folder's weight files, gates included."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@lru_cache
def dense_work(folder: Path) -> Work:
    """Multiply-adds of the model in a folder, whose weights are not read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return Work.of(AutoModelForCausalLM.from_config(config))
