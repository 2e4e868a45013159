"""The commands: each reads arguments, calls one function and shows the result."""
