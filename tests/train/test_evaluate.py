from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmcp.errors import DataError
from dmcp.train import evaluate


def test_counts_over_batches_of_unequal_size():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(23, 9, generator=generator)
    labels = torch.randint(0, 9, (23,), generator=generator)
    order = logits.argsort(dim=1, descending=True).tolist()
    ranks = [row.index(label) for row, label in zip(order, labels.tolist(), strict=True)]
    # a model that passes its images through: they are the logits
    batches = zip(logits.split(10), labels.split(10), strict=True)
    result = evaluate(nn.Identity(), batches)
    assert result.images == 23
    assert result.top1 == pytest.approx(sum(rank == 0 for rank in ranks) / 23)
    assert result.top5 == pytest.approx(sum(rank < 5 for rank in ranks) / 23)
    assert result.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item())


@pytest.mark.parametrize(("classes", "has_top5"), [(2, False), (5, False), (6, True)])
def test_top5_needs_more_than_five_classes(classes: int, has_top5: bool):
    result = evaluate(nn.Identity(), [(torch.eye(classes), torch.arange(classes))])
    assert result.top1 == 1.0
    assert result.top5 == (1.0 if has_top5 else None)


def test_runs_in_eval_mode_and_restores_every_mode(small_net, batch_of):
    model = small_net(dropout=0.5).train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = evaluate(model, [batch_of(0), batch_of(1)])
    assert first == evaluate(model, [batch_of(0), batch_of(1)])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_restores_the_modes_after_an_error(small_net):
    model = small_net().train()
    with pytest.raises(RuntimeError):
        evaluate(model, [(torch.randn(2, 5, 8, 8), torch.zeros(2, dtype=torch.int64))])
    assert all(module.training for module in model.modules())


def test_refuses_an_empty_set(small_net):
    with pytest.raises(DataError, match="no images"):
        evaluate(small_net(), [])
