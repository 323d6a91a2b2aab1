"""Batch-normalized recurrent networks: layers over sequences, cells, and statistics for each time step."""
