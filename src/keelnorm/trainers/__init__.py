"""Plug-ins for trainers of other packages. Each module needs its package, and is imported by name."""
