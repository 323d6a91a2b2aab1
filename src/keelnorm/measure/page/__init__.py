"""Draw a document of results: an HTML page that needs no network, and tables for the terminal.

A document is plain data. Its sections are those of `keelnorm.measure.page_parts`; the laboratory adds verdicts to them.
This package knows its structure, not how its numbers were measured.
"""
