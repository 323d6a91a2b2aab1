"""Experiments on batch normalization, with real data, seeds, intervals and stored results."""
