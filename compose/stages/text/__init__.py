"""The text that a stage reads or has the model write."""
