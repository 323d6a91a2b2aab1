"""What the laboratory and the benchmarks share: facts about the machine, timing, statistics, and pages."""
