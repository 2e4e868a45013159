"""Other engines that decode the same model, timed beside ours: one file each.

Each takes token ids and returns greedy continuations, through the interface that its own users
have.
"""
