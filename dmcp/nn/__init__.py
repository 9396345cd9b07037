"""Drop-in modules whose channels follow Markov chains."""

from dmcp.nn.axis import Axis, ComposedAxis
from dmcp.nn.batchnorm import MarkovBatchNorm2d
from dmcp.nn.chain import MarkovChain, masked
from dmcp.nn.conv import MarkovConv2d
from dmcp.nn.grid import width_choices
from dmcp.nn.linear import MarkovLinear

__all__ = [
    "Axis",
    "ComposedAxis",
    "MarkovBatchNorm2d",
    "MarkovChain",
    "MarkovConv2d",
    "MarkovLinear",
    "masked",
    "width_choices",
]
