"""Passes that give the language model fewer visual tokens."""
