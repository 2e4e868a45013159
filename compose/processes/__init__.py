"""Worker processes: what is sent to them, where they run, how they end."""
