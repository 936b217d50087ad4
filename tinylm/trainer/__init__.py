"""Objectives, optimizers, the training loop, and a recipe for each stage."""
