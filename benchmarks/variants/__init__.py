"""The cost of each variant of batch normalization."""
