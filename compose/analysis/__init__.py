"""What results mean: intervals, differences, verdicts, choosing a cell."""
