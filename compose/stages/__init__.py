"""The stages of chains: one file per stage, and the registry that lists them."""
