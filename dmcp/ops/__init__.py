"""Ops with custom kernels, one file each: eager reference, schema, backends, autograd."""

from dmcp.ops.expected_cost import (
    CostTable,
    ExpectedCost,
    expected_cost,
    expected_cost_reference,
)
from dmcp.ops.norm_act import norm_act
from dmcp.ops.norm_act_eager import Activation, ResidualPlace, norm_act_reference
from dmcp.ops.retain import retain, retain_reference

__all__ = [
    "Activation",
    "CostTable",
    "ExpectedCost",
    "ResidualPlace",
    "expected_cost",
    "expected_cost_reference",
    "norm_act",
    "norm_act_reference",
    "retain",
    "retain_reference",
]
