"""Following the batch norms of a model while it trains."""
