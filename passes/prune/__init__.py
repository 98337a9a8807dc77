"""Passes that make the model narrower or sparser."""
