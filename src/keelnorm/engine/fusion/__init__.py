"""Fusing by value: a batch norm's result waits for the operation that follows, and both run as one kernel.

docs/how_fusing_works.md says in one picture what happens to a value.
"""
