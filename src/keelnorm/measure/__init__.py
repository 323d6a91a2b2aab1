"""Facts about the machine, timing, statistics and pages, for the laboratory and the benchmarks."""
