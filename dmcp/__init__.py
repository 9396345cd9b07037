"""Differentiable Markov Channel Pruning: search how many channels each layer of a CNN keeps."""

from importlib.metadata import version

from dmcp import models as models
from dmcp.backends import backends
from dmcp.cost import Cost, cost
from dmcp.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergenceError,
    DmcpError,
    ExportError,
    SamplingError,
    SearchWarning,
    StructureError,
    TraceError,
)
from dmcp.graph import ChannelGraph, ChannelUnit, Member, extract, hand_over, trace
from dmcp.integrations import LoopSearch
from dmcp.search import Budget, MarkovNet, Samples, Search, SearchOptions
from dmcp.structure import Structure, structures

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
    "ExportError",
    "LoopSearch",
    "MarkovNet",
    "Member",
    "Samples",
    "SamplingError",
    "Search",
    "SearchOptions",
    "SearchWarning",
    "Structure",
    "StructureError",
    "TraceError",
    "backends",
    "cost",
    "extract",
    "hand_over",
    "structures",
    "trace",
]

__version__ = version("dmcp")
