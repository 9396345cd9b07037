"""Figures and tables of what was found; needs matplotlib, which is imported when one is drawn."""

from dmcp.report.chains import ChainCost, Chains
from dmcp.report.distributions import draw_channels, draw_costs
from dmcp.report.figure import save
from dmcp.report.front import DENSE, draw_front
from dmcp.report.published import Beside, beside_published
from dmcp.report.searches import draw_search, find_searches
from dmcp.report.widths import draw_widths

__all__ = [
    "DENSE",
    "Beside",
    "ChainCost",
    "Chains",
    "beside_published",
    "draw_channels",
    "draw_costs",
    "draw_front",
    "draw_search",
    "draw_widths",
    "find_searches",
    "save",
]
