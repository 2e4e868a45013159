"""The pipeline language, its planner and its runner: chains of compression steps, measured."""
