from __future__ import annotations

import torch

from dmcp.methods import Uniform
from dmcp.methods.l1 import L1


def test_keeps_the_filters_with_the_largest_norms_of_the_pretrained_network(
    residual_lab, check_found
):
    lab = residual_lab
    found = L1().find(lab)
    check_found(lab, found)
    weight = lab.pretrained().first.weight
    norms = weight.abs().flatten(1).sum(1)
    for pruned in found.values():
        width = pruned.widths["first"]
        kept = norms.topk(width).indices.sort().values
        assert torch.equal(pruned.kept["first"], kept)
        assert torch.equal(pruned.network.first.weight, weight[kept][:, pruned.kept["stem"]])


def test_has_the_widths_of_uniform_and_the_weights_that_are_inherited(residual_lab):
    lab = residual_lab
    even = Uniform().find(lab)
    for label, pruned in L1().find(lab).items():
        assert pruned.widths == even[label].widths
        lab.calibrate(pruned.network)
        inherited = lab.inherit(lab.pretrained(), pruned.widths).state_dict()
        for name, tensor in pruned.network.state_dict().items():
            assert torch.equal(tensor, inherited[name]), name
