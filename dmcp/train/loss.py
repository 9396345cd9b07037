"""Losses of the search and of training, and the accuracy reported beside them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dmcp.errors import ConfigError


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy averaged over the batch, and over positions where there are any.

    Args:
        logits: [N, K] or [N, K, …], floating point.
        labels: [N] or [N, …], int64, in [0, K).
        smoothing: the share of each target spread evenly over all K classes, in [0, 1).

    Raises:
        ConfigError: ``smoothing`` is out of range, or the network returned something else.
    """
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"the network must return a tensor of logits, got {type(logits).__name__}"
        )
    if not 0 <= smoothing < 1:
        raise ConfigError(f"smoothing must be in [0, 1), got {smoothing}")
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def distillation(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) T^2, averaged like `cross_entropy`.

    The teacher gets no gradient.

    Args:
        student_logits: [N, K] or [N, K, …], floating point.
        teacher_logits: of the same shape.
        temperature: T, positive.

    Raises:
        ConfigError: ``temperature`` is not positive.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature must be positive, got {temperature}")
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return divergence / (student.numel() // student.shape[1]) * temperature**2


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the batch whose largest logit is the label's; 0-d float32 in [0, 1].

    Args:
        logits: [N, K] or [N, K, …].
        labels: [N] or [N, …], int64.
    """
    return (logits.argmax(dim=1) == labels).float().mean()
