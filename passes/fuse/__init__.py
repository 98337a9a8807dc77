"""Passes that change how the language model meets the image."""
