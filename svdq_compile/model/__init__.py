"""Checkpoints in and out of models: load, save, and the context manager that lends weights to a model."""
