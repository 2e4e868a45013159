"""Running a model with branches skipped: the KV cache and the backends."""
