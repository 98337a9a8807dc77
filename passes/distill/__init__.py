"""Passes that train the small model to answer like the original."""
