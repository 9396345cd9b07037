from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmcp.errors import ConfigError
from dmcp.train.loss import accuracy, cross_entropy, distillation


@pytest.fixture
def logits() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 7, dtype=torch.float64, generator=generator)


def test_cross_entropy_follows_its_definition(logits: Tensor):
    labels = torch.tensor([0, 6, 3, 3, 1])
    targets = torch.full((5, 7), 0.1 / 7, dtype=torch.float64)
    targets[range(5), labels] += 0.9
    expected = -(targets * torch.log_softmax(logits, dim=1)).sum(1).mean()
    torch.testing.assert_close(cross_entropy(logits, labels, 0.1), expected)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_follows_its_definition(logits: Tensor, temperature: float):
    student, teacher = logits, logits.flip(0)
    p, q = (torch.softmax(values / temperature, dim=1) for values in (teacher, student))
    expected = (p * (p / q).log()).sum(1).mean() * temperature**2
    torch.testing.assert_close(distillation(student, teacher, temperature), expected)


def test_distillation_is_least_where_the_student_is_the_teacher(logits: Tensor):
    student = logits.clone().requires_grad_()
    loss = distillation(student, logits)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(student.grad, torch.zeros_like(logits))


def test_distillation_gives_the_teacher_no_gradient(logits: Tensor):
    student = logits.clone().requires_grad_()
    teacher = logits.flip(0).requires_grad_()
    distillation(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_refuses_smoothing_out_of_range(logits: Tensor, smoothing: float):
    with pytest.raises(ConfigError, match="smoothing"):
        cross_entropy(logits, torch.zeros(5, dtype=torch.int64), smoothing)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_refuses_a_temperature_that_is_not_positive(logits: Tensor, temperature: float):
    with pytest.raises(ConfigError, match="temperature"):
        distillation(logits, logits, temperature)


def test_accuracy_counts_hits():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 4.0]])
    assert accuracy(logits, torch.tensor([1, 0, 0, 0])).item() == 0.75
