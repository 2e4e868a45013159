"""Following a plan: steps, cells, speed rounds, results, exports."""
