"""Figures and tables of claims; `keelnorm.measure.page_parts` defines them."""

from keelnorm.measure.page_parts import Axis, Figure, Series, Table

__all__ = ["Axis", "Figure", "Series", "Table"]
