"""How fast a cell is: workloads, turns, memory, the machine's limits."""
