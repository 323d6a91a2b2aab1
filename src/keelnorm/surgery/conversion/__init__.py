"""Replacing a model's batch norms: torch.nn's by keelnorm's, and back."""
