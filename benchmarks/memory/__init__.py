"""What `kn.save_memory` saves, and what it costs: bytes, times of steps, peaks, the largest batch, checkpointing."""
