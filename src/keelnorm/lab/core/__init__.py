"""How claims are run: cells, seeds, the store, and processes."""
