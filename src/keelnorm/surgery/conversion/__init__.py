"""Replacing a model's batch norms: torch's by this package's, and back."""
