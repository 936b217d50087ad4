"""Measures of a model: bits per byte, minimal pairs, multiple choice, exact match, preferences, TinyWorld's
skills."""
