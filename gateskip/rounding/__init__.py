"""Rounds a model's layers: error compensation, layer by layer, and bits by measured cost."""
