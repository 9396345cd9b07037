"""The differentiable search for widths."""

from dmcp.search.budget import Budget, Targets
from dmcp.search.budget_loss import BudgetLoss
from dmcp.search.markov_net import MarkovNet
from dmcp.search.options import SearchOptions
from dmcp.search.sampling import Samples, draw_widths, expected_widths, sample_within
from dmcp.search.search import Search
from dmcp.search.watch import SearchWatch

__all__ = [
    "Budget",
    "BudgetLoss",
    "MarkovNet",
    "Samples",
    "Search",
    "SearchOptions",
    "SearchWatch",
    "Targets",
    "draw_widths",
    "expected_widths",
    "sample_within",
]
