"""The GPU kernels: checked against float64, then timed."""
