"""The quality of a cell: perplexity, tasks, written answers, losslessness."""
