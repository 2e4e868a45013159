"""Other engines that decode the same model and are timed beside it, one file each.

Each takes token ids and returns greedy continuations, through the interface that its users have.
"""
