"""Figures, tables and pages of what was found; needs matplotlib, which is imported when one is
drawn."""

from dmcp.report.chains import ChainCost, Chains
from dmcp.report.curves import draw_curves, draw_expected_costs
from dmcp.report.distributions import draw_channels, draw_costs
from dmcp.report.figure import DARK, LIGHT, Look, save, to_svg
from dmcp.report.front import DENSE, draw_front
from dmcp.report.page import write_page
from dmcp.report.published import Beside, beside_published
from dmcp.report.retained import draw_expected_widths, draw_retained
from dmcp.report.run import Retained, Run
from dmcp.report.searches import find_searches
from dmcp.report.widths import draw_widths

__all__ = [
    "DARK",
    "DENSE",
    "LIGHT",
    "Beside",
    "ChainCost",
    "Chains",
    "Look",
    "Retained",
    "Run",
    "beside_published",
    "draw_channels",
    "draw_costs",
    "draw_curves",
    "draw_expected_costs",
    "draw_expected_widths",
    "draw_front",
    "draw_retained",
    "draw_widths",
    "find_searches",
    "save",
    "to_svg",
    "write_page",
]
