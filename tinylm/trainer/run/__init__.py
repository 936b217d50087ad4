"""A whole run around the loop: its plan, its files, what it shows, and how it resumes."""
