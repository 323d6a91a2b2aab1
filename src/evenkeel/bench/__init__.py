"""The benchmark behind `evenkeel bench`."""
