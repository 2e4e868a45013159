"""How well a cell answers: perplexity, tasks, written answers, losslessness."""
