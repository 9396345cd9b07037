"""Differentiable Markov Channel Pruning: search how many channels each layer of a CNN keeps."""

from importlib.metadata import version

from dmcp.backends import backends
from dmcp.cost import Cost, cost
from dmcp.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergenceError,
    DmcpError,
    SamplingError,
    TraceError,
)
from dmcp.graph import ChannelGraph, ChannelUnit, Member, extract, trace
from dmcp.models.structures import structures
from dmcp.search import Budget, MarkovNet, Samples, Search, SearchOptions

__all__ = [
    "Budget",
    "BudgetError",
    "ChannelGraph",
    "ChannelUnit",
    "CheckpointError",
    "ConfigError",
    "Cost",
    "DataError",
    "DivergenceError",
    "DmcpError",
    "MarkovNet",
    "Member",
    "Samples",
    "SamplingError",
    "Search",
    "SearchOptions",
    "TraceError",
    "backends",
    "cost",
    "extract",
    "structures",
    "trace",
]

__version__ = version("dmcp")
