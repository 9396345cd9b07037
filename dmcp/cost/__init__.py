"""Cost of a structure as a polynomial of its widths; exact expectation and variance."""

from dmcp.cost.count import cost
from dmcp.cost.measure import measured_macs
from dmcp.cost.polynomial import Cost

__all__ = ["Cost", "cost", "measured_macs"]
