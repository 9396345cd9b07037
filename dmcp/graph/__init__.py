"""Tracing a model to channel units, and extracting smaller networks from it."""

from dmcp.graph.channel_graph import ChannelGraph, LayerCall, ModuleAxes, Node, Proof
from dmcp.graph.extract import extract
from dmcp.graph.hand_over import hand_over
from dmcp.graph.trace import trace
from dmcp.graph.units import ChannelUnit, Member, check_widths

__all__ = [
    "ChannelGraph",
    "ChannelUnit",
    "LayerCall",
    "Member",
    "ModuleAxes",
    "Node",
    "Proof",
    "check_widths",
    "extract",
    "hand_over",
    "trace",
]
