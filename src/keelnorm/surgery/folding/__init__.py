"""Folding batch norms into the layers beside them."""
