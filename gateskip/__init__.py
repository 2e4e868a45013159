"""Learned token-wise layer skipping for pretrained decoders (GateSkip, arXiv 2510.13876).

>>> decoder = gateskip.load("exports/shipped")                          # doctest: +SKIP
>>> ids = decoder.tokenizer("The capital of France is").input_ids       # doctest: +SKIP
>>> skip = gateskip.SkipConfig(budget=0.8)                              # doctest: +SKIP
>>> decoder.generate([ids], 16, mode="skip", skip=skip).tokens          # doctest: +SKIP
"""

from __future__ import annotations

import logging
from importlib import import_module  # noqa: TID251
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateskip.checkpoint import load
    from gateskip.decoding.config import DraftConfig, SkipConfig
    from gateskip.decoding.decoder import Decoder
    from gateskip.decoding.hf_generate import custom_generate
    from gateskip.decoding.sampling import Sampler
    from gateskip.decoding.stats import Generation

__all__ = [
    "Decoder",
    "DraftConfig",
    "Generation",
    "Sampler",
    "SkipConfig",
    "custom_generate",
    "load",
]


_HOMES = {
    "Decoder": "gateskip.decoding.decoder",
    "DraftConfig": "gateskip.decoding.config",
    "Generation": "gateskip.decoding.stats",
    "Sampler": "gateskip.decoding.sampling",
    "SkipConfig": "gateskip.decoding.config",
    "custom_generate": "gateskip.decoding.hf_generate",
    "load": "gateskip.checkpoint",
}


def _drop_messages(logger: str, start: str) -> None:
    """Drop the messages of a logger that begin so."""
    logging.getLogger(logger).addFilter(lambda record: not record.getMessage().startswith(start))


# transformers imports torchao where it is installed, of which we use nothing: its extensions for
# GPUs do not load on every machine, and it registers enums in a way that torch calls deprecated.
_drop_messages("torchao", "Failed to load ")
_drop_messages("torch.utils._pytree", "<enum ")


def __getattr__(name: str) -> Any:
    """Import torch only when something here is used: planning reads training.recipe alone."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gateskip' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
