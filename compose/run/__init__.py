"""Following a plan: steps, cells, speed rounds, and what they cost."""
