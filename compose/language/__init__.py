"""The pipeline language: a YAML file -> frozen values, every mistake with its line."""
