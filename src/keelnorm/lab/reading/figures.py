"""Figures and tables of claims; `keelnorm.measure.document` defines them."""

from keelnorm.measure.document import Axis, Figure, Series, Table

__all__ = ["Axis", "Figure", "Series", "Table"]
