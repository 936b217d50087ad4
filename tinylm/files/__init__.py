"""Files: written completely or not at all, locked by one process at a time, and checked when they come from others."""
