"""Running a plan: worker processes, steps, cells, speed rounds, results, exports."""
