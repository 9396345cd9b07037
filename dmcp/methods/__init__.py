"""Pruning methods, one file each: from a network and a budget to widths."""

from dmcp.methods.uniform import uniform_widths

__all__ = ["uniform_widths"]
