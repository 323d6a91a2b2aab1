"""What runs over memory: the reference in plain torch, native CPU kernels, and GPU kernels; the registry chooses."""
