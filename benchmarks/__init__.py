"""Measurements and pictures for the docs. The speed of a machine: `tinylm bench`."""
