"""Objectives, optimizers, the training loop, and one recipe per stage."""
