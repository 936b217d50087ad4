"""Records -> token ids on disk."""
