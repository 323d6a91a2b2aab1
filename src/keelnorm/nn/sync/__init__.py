"""Synchronized batch normalization: the layer and its autograd function."""
