"""Passes that rewrite how the model is put together: folds, and where picture and text meet."""
