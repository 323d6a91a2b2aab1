"""Published architectures, converted and folded: are they right, what is fused, how fast are they."""
