"""The transformer: configuration, positions, cache, layers, LoRA."""
