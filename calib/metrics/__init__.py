"""Metrics as pure functions: answers, divergences of distributions, statistics of pairs."""
