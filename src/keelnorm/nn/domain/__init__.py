"""Domain-specific batch normalization: the layer, and the domains of a whole model."""
