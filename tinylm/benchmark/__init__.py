"""How fast this machine trains and runs a tiny language model: the parts of `tinylm bench`."""
