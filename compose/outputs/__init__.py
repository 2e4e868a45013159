"""What a run leaves: records, results, exports."""
