"""What the model files share: the check of their options and their initialisation."""

from __future__ import annotations

from torch import nn

from dmcp.errors import ConfigError


def check_options(num_classes: int, width: float, min_width: float, in_channels: int) -> None:
    """Refuse options that no network can be built from.

    Raises:
        ConfigError: `num_classes` or `in_channels` is below 1, or `width` is below `min_width`.
    """
    if num_classes < 1:
        raise ConfigError(f"num_classes is {num_classes}: at least 1 is needed")
    if in_channels < 1:
        raise ConfigError(f"in_channels is {in_channels}: at least 1 is needed")
    if not min_width <= width < float("inf"):
        raise ConfigError(f"width is {width}: a finite number of at least {min_width} is needed")


def initialise(model: nn.Module) -> None:
    """Draw every convolution of `model` from N(0, 2 / (k² C_out)), as the paper's networks do.

    Linear layers and batch norms start as PyTorch starts them (scale 1, shift 0: no residual
    branch starts at zero). The paper's MobileNetV2 draws its classifier like a convolution, which
    suits its 1000 outputs only: with ten, the first logits have a standard deviation above 10.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
