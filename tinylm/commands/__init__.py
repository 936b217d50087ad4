"""The commands that are no training stage; `tinylm.cli` has the table of all."""
