"""Measuring a cell: quality, speed and memory."""
