"""Files, folders, addresses -> records."""
