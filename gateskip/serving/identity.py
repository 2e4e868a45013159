"""A hash of everything that decides the bits of a prompt's keys and values, except the prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from gateskip.decoding.decoder import Decoder
from gateskip.kernels import build, ops
from gateskip.kernels.autotune import bfloat16_is_faster
from gateskip.runtime.kv_cache import KVCache

FROM = ("_name_or_path", "name_or_path")  # fields that say where a model came from
POSITIONS = 64  # of the rope table that are hashed: it may be scaled by the length of rows
SOURCES = Path(__file__).parents[1]


def identity_of(decoder: Decoder, rows: KVCache) -> bytes:
    """SHA-256 of a model's content, its gates and budgets, the format of its cache, and the
    arithmetic of prompts. Reads all weights, a gigabyte or two a second."""
    skipping, digest = decoder.skipping, hashlib.sha256()
    config: dict[str, Any] = skipping.model.config.to_dict()
    described = {
        "config": {name: value for name, value in config.items() if name not in FROM},
        "gates": [skipping.kv_rule, repr(decoder.budgets)],
        "cache": [[str(part.dtype), *part.shape] for part in rows.span(0, 0, 1)],
        "arithmetic": [*map(repr, (decoder.arithmetic, decoder.scoring_arithmetic))],
        "machine": _machine(),
    }
    digest.update(json.dumps(described, sort_keys=True, default=repr).encode())
    for table in chain.from_iterable(rows.rope.values()):
        _add(digest, "rope", table[:POSITIONS])
    for module in (skipping.model, skipping.gates):
        if module is not None:
            digest.update(json.dumps(list(_modules(module))).encode())
            for name, tensor in chain(module.named_parameters(), module.named_buffers()):
                _add(digest, name, tensor)
    return digest.digest()


def _machine() -> list[Any]:
    """Code, kernels, libraries and processor. Products of some libraries depend on the number of
    threads."""
    return [
        _sources(),
        Path(build.build()).name,  # by sources, compiler and processor
        ops.prefill_units().name,
        bfloat16_is_faster(),
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        transformers.__version__,
    ]


@cache
def _sources() -> str:
    """SHA-256 of this package's Python code."""
    digest = hashlib.sha256()
    for file in sorted(SOURCES.rglob("*.py")):
        digest.update(f"{file.relative_to(SOURCES)} ".encode() + file.read_bytes())
    return digest.hexdigest()


def _modules(module: nn.Module) -> Iterator[list[Any]]:
    """The type of each part of a module, which decides its kernel, and its numbers and words."""
    for name, part in module.named_modules():
        plain = {
            field: value
            for field, value in sorted(vars(part).items())
            if field not in FROM and isinstance(value, (bool, int, float, str))
        }
        yield [name, type(part).__qualname__, plain]


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    """Add a tensor to a hash."""
    digest.update(json.dumps([name, str(tensor.dtype), *tensor.shape]).encode())
    digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
