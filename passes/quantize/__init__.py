"""Quantization: weights onto grids of a few bits, saved packed."""
