"""Pruning methods, one file each: from a network, images and budgets to structures."""

from dmcp.methods.amc import AMC
from dmcp.methods.autoslim import AutoSlim
from dmcp.methods.bernoulli import Bernoulli
from dmcp.methods.bn_gamma import BNGamma
from dmcp.methods.dmcp import DMCP
from dmcp.methods.fpgm import FPGM
from dmcp.methods.group_norm import GroupNorm
from dmcp.methods.l1 import L1
from dmcp.methods.lab import Lab, Spent
from dmcp.methods.metapruning import MetaPruning
from dmcp.methods.method import Method, Pruned
from dmcp.methods.random_search import RandomSearch
from dmcp.methods.registry import COMPARISONS, PRESETS, comparison, get, names
from dmcp.methods.sfp import SFP
from dmcp.methods.uniform import Uniform, uniform_widths

__all__ = [
    "AMC",
    "COMPARISONS",
    "DMCP",
    "FPGM",
    "L1",
    "PRESETS",
    "SFP",
    "AutoSlim",
    "BNGamma",
    "Bernoulli",
    "GroupNorm",
    "Lab",
    "MetaPruning",
    "Method",
    "Pruned",
    "RandomSearch",
    "Spent",
    "Uniform",
    "comparison",
    "get",
    "names",
    "uniform_widths",
]
