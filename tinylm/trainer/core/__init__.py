"""One step of training: objective, gradient, optimizer, and the loop around them."""
