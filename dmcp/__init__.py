"""Differentiable Markov Channel Pruning: search how many channels each layer of a CNN keeps."""

from dmcp.cost import cost
from dmcp.graph import ChannelGraph, ChannelUnit, Member, extract, trace

__version__ = "0.1.0"
