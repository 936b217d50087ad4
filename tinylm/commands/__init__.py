"""The commands that are not training stages; `tinylm.cli` has the table of all commands."""
