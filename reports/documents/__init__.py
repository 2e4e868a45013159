"""Tables and figures of README and docs, made from committed results files between markers."""
