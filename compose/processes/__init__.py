"""Worker processes: their messages, the machines that run them, and how they end."""
