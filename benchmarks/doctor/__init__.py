"""What ``kn.diagnose`` finds of faults that were put into published networks: ``python -m benchmarks.doctor``."""
