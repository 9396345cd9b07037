from __future__ import annotations

import pytest
import torch
from torch import nn

import dmcp
from dmcp.errors import ConfigError
from dmcp.methods.group_norm import GroupNorm, group_norms


@pytest.fixture
def two_convs():
    """Two channels between two 1x1 convolutions, with a norm and a depthwise one behind."""
    model = nn.Sequential(
        nn.Conv2d(2, 2, 1),
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 2, 1, groups=2, bias=False),
        nn.Conv2d(2, 3, 1),
    )
    graph = dmcp.trace(model, torch.zeros(1, 2, 1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [-3.0, 0.0]])[..., None, None])
        model[1].weight.copy_(torch.tensor([2.0, -1.0]))
        model[2].weight.copy_(torch.tensor([1.0, 5.0])[:, None, None, None])
        model[3].weight.copy_(torch.tensor([[1.0, 0], [1, 2], [-1, 0]])[..., None, None])
        for layer in (model[0], model[1], model[3]):
            layer.bias.fill_(100)  # biases do not count
    return graph


def test_is_the_mean_over_the_group_relative_to_the_unit(two_convs):
    # producer 5 and 9, γ 4 and 1, depthwise 1 and 25, reader 3 and 4
    squares = torch.tensor([5 + 4 + 1 + 3, 9 + 1 + 25 + 4]) / 4
    norms = group_norms(two_convs, two_convs.model)
    assert norms.keys() == {"0"}
    torch.testing.assert_close(norms["0"], squares / squares.mean())
    first = torch.tensor([3 + 2 + 1 + 3, 3 + 1 + 5 + 2]) / 4
    torch.testing.assert_close(group_norms(two_convs, two_convs.model, p=1)["0"], first / 2.5)


def test_counts_every_layer_of_a_stream(residual):
    norms = group_norms(residual, residual.model)
    model = residual.model
    squares = sum(layer.weight.pow(2).flatten(1).sum(1) for layer in (model.stem, model.second))
    squares += sum(layer.weight.pow(2).sum((0, 2, 3)) for layer in (model.first, model.last))
    squares += model.norm.weight.pow(2) + model.norm2.weight.pow(2)
    torch.testing.assert_close(norms["stem"], (squares / squares.mean()).detach())
    assert all(scores.mean().item() == pytest.approx(1) for scores in norms.values())


def test_a_unit_of_zeros_is_worth_nothing(two_convs):
    for parameter in two_convs.model.parameters():
        nn.init.zeros_(parameter)
    assert group_norms(two_convs, two_convs.model)["0"].tolist() == [0, 0]


def test_ranks_the_pretrained_network(residual_lab, check_found):
    lab = residual_lab
    found = GroupNorm().find(lab)
    check_found(lab, found)
    norms = group_norms(lab.graph, lab.pretrained())
    for pruned in found.values():
        for name, channels in pruned.kept.items():
            best = norms[name].topk(len(channels)).indices.sort().values
            assert torch.equal(channels, best)
    assert lab.spent_on("half").backward == 4 * 32


def test_refuses_a_power_out_of_range():
    for p in (0, -1.0, float("inf")):
        with pytest.raises(ConfigError, match=f"p must be .* got {p}"):
            GroupNorm(p=p)
