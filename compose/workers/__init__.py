"""The processes of steps and cells, started as `python -m compose.workers.main`."""
