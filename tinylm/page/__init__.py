"""The page: a model that runs and is watched in a browser."""
