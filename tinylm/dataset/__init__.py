"""From source files to packed rows and batches."""
