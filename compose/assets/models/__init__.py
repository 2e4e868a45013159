"""Models by name: hub, wheels, GGUF files, folders."""
