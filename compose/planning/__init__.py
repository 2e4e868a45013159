"""A pipeline -> steps and cells with their keys. Pure: no torch, no weights."""
