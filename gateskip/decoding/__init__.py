"""Decoding: plain, skipping, and self-speculative."""
