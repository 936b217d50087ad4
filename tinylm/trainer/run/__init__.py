"""A run around the training loop: its plan, its files, its output, and how it resumes."""
