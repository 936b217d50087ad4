"""Files that appear whole or not at all, that one process owns at a time, and that may come from strangers."""
