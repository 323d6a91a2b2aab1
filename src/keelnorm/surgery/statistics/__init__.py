"""Recomputing running statistics from data, adapting them, and merging them."""
