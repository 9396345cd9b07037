"""Costs of a structure: polynomials of its widths, and measured tables; exact expectations."""

from dmcp.cost.cost import Cost
from dmcp.cost.measure import measured_macs
from dmcp.cost.metrics import METRICS, TABLE, Metric, cost
from dmcp.cost.polynomial import PolynomialCost
from dmcp.cost.table import LatencyTable, TableAxis, TableCost, TableTerm

__all__ = [
    "METRICS",
    "TABLE",
    "Cost",
    "LatencyTable",
    "Metric",
    "PolynomialCost",
    "TableAxis",
    "TableCost",
    "TableTerm",
    "cost",
    "measured_macs",
]
