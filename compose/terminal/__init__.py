"""Text, tables and live lines for the terminal, and what `gateskip doctor` checks."""
