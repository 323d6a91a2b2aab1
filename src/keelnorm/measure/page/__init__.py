"""Draws a document of results: a page that needs no network, and a table for the terminal.

A document is plain data, as `keelnorm.lab.reading.document` makes it and `--json` prints it. This package knows
its shape and nothing of how its numbers came about.
"""
