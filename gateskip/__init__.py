"""Learned token-wise layer skipping for pretrained decoders (GateSkip, arXiv 2510.13876).

>>> decoder = gateskip.load("exports/shipped")                          # doctest: +SKIP
>>> ids = decoder.tokenizer("The capital of France is").input_ids       # doctest: +SKIP
>>> decoder.generate([ids], 16, mode="skip", budget=0.8).tokens         # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateskip.checkpoint import load
    from gateskip.decode import Decoder, Generation
    from gateskip.hook import custom_generate
    from gateskip.sampling import Sampler

__all__ = ["Decoder", "Generation", "Sampler", "custom_generate", "load"]


def __getattr__(name: str) -> Any:
    """Import torch only when something here is used: planning reads gateskip.recipe alone."""
    if name == "load":
        from gateskip.checkpoint import load

        return load
    if name in ("Decoder", "Generation"):
        from gateskip import decode

        return getattr(decode, name)
    if name == "Sampler":
        from gateskip.sampling import Sampler

        return Sampler
    if name == "custom_generate":
        from gateskip.hook import custom_generate

        return custom_generate
    raise AttributeError(f"module 'gateskip' has no attribute {name!r}")
