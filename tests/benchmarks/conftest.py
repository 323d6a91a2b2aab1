"""Fixtures of the memory benchmark's tests."""

from __future__ import annotations

from tiny_network import tiny, wrong_recipes

__all__ = ["tiny", "wrong_recipes"]
