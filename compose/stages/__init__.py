"""What a chain is made of: one file a stage, and the registry that lists them."""
