from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dmcp.errors import ConfigError, DataError
from dmcp.train import recalibrate_batch_norm


def test_averages_the_statistics_of_all_batches(batch_of):
    norm = nn.BatchNorm2d(3).double()
    batches = [batch_of(step)[0].double() * (step + 1) + step for step in range(4)]
    recalibrate_batch_norm(norm, [(images, None) for images in batches])
    means = torch.stack([images.mean((0, 2, 3)) for images in batches])
    variances = torch.stack([images.var((0, 2, 3)) for images in batches])
    torch.testing.assert_close(norm.running_mean, means.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, variances.mean(0), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(norm.running_mean, means[-1])
    assert norm.num_batches_tracked.item() == 4


def test_does_not_depend_on_the_statistics_before(small_net, batch_of):
    model, other = small_net(), small_net()
    other[1].running_mean.fill_(100.0)
    other[4].running_var.fill_(100.0)
    for net in (model, other):
        recalibrate_batch_norm(net, [batch_of(0), batch_of(1)])
    for ours, theirs in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_deeper_layers_see_inputs_normalised_by_the_batch(small_net, batch_of):
    model = small_net().double().train()
    images = batch_of(0)[0].double()
    recalibrate_batch_norm(model, [(images, None)])
    seen = model[:4](images)
    torch.testing.assert_close(model[4].running_mean, seen.mean((0, 2, 3)))


def test_only_batch_norm_trains_and_everything_is_restored(small_net, batch_of):
    model = small_net(dropout=0.9).train()
    model[4].eval()
    model[4].momentum = 0.3
    model[7].momentum = None
    parameters = [parameter.clone() for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    recalibrate_batch_norm(model, [batch_of(0), batch_of(1)])
    assert torch.equal(torch.get_rng_state(), rng)  # dropout drew nothing
    assert [module.training for module in model.modules()] == modes
    assert [model[i].momentum for i in (1, 4, 7)] == [0.1, 0.3, None]
    assert all(
        torch.equal(new, old) for new, old in zip(model.parameters(), parameters, strict=True)
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_everything_is_restored_after_an_error(small_net, batch_of):
    model = small_net().train()
    with pytest.raises(RuntimeError):
        recalibrate_batch_norm(model, [batch_of(0), (torch.randn(2, 5, 8, 8), None)])
    assert all(module.training for module in model.modules())
    assert [model[i].momentum for i in (1, 4, 7)] == [0.1, 0.1, 0.1]


def test_an_empty_set_changes_nothing(small_net, batch_of):
    model = small_net()
    model(batch_of(0)[0])
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(DataError, match="no images"):
        recalibrate_batch_norm(model, [])
    assert all(torch.equal(new, old) for new, old in zip(model.buffers(), before, strict=True))


@pytest.mark.parametrize(
    "model", [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(3, track_running_stats=False)]
)
def test_nothing_happens_without_running_statistics(model: nn.Module, batch_of):
    batches = iter([batch_of(0)])
    recalibrate_batch_norm(model, batches)
    assert len(list(batches)) == 1


def test_refuses_norms_that_gather_nothing_and_restores_them() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, images: Tensor) -> Tensor:
            return self.used(images)

    model = Unused()
    nn.init.constant_(model.used.running_mean, 7.0)
    nn.init.constant_(model.unused.running_mean, 7.0)
    with pytest.raises(ConfigError, match="unused gathered no statistics"):
        recalibrate_batch_norm(model, [(torch.randn(4, 3, 2, 2), torch.zeros(4))])
    for norm in (model.used, model.unused):
        assert bool((norm.running_mean == 7).all())
        assert norm.momentum == 0.1
