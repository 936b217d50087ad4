"""Models, adapters and training states on disk."""
