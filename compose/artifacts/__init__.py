"""Model folders, in and out: lineage, exports, GGUF."""
