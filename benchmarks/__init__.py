"""keelnorm's own benchmarks: networks, published architectures, memory, folding, variants, GPU kernels.

They are not installed. Run them from the root of the repository, as `python -m benchmarks.networks`.
"""
