"""Other engines that decode the same model, timed beside ours: one file each.

Each gets token ids and gives token ids, greedily, through the interface that its own users have.
"""
