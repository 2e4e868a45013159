"""Gate modules, and the shortcuts that replace skipped branches."""
