"""Values -> steps and cells. Pure, without torch."""
