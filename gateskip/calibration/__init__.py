"""Text -> numbers, without training: thresholds, budgets, first gates, shortcuts."""
