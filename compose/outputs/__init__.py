"""The files of a run: records, results, exports."""
