"""Formats of saved models: one file each."""
