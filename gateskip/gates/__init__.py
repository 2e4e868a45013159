"""Gate modules, and what skipped branches add instead."""
