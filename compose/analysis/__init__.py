"""Intervals, differences between runs, verdicts, and choosing a cell."""
