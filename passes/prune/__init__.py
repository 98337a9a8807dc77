"""Passes that make the model narrower."""
