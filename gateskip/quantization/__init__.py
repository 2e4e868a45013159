"""Packed weights, and how they are rounded."""
