"""Calibration on text, without training: thresholds, budgets, first gates, shortcuts."""
