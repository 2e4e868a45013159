"""The speed of a cell: workloads, turns, memory, the machine's limits."""
