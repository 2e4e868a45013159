"""Learned token-wise layer skipping for pretrained decoders (GateSkip, arXiv 2510.13876).

>>> decoder = gateskip.load("exports/shipped")                          # doctest: +SKIP
>>> ids = decoder.tokenizer("The capital of France is").input_ids       # doctest: +SKIP
>>> decoder.generate([ids], 16, mode="skip", budget=0.8).tokens         # doctest: +SKIP
"""

from gateskip.checkpoint import load
from gateskip.decode import Decoder, Generation

__all__ = ["Decoder", "Generation", "load"]
