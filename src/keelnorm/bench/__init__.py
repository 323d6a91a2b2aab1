"""The benchmark behind `keelnorm bench`."""
