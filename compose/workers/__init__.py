"""The processes in which steps and cells run."""
