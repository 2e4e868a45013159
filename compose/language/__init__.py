"""The pipeline language: a YAML file -> frozen values, mistakes with their line."""
