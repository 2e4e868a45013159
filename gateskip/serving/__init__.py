"""Decodes many requests at once in one model: rows join and leave between steps."""
