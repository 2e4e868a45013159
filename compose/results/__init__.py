"""The typed result of a run."""
