"""The widths a unit may take."""

from __future__ import annotations

from dmcp.errors import ConfigError


def width_choices(
    channels: int, groups: int = 10, divisor: int = 8, min_width: int = 1
) -> tuple[int, ...]:
    """Ascending widths of a unit: its base first, its full width last.

    With ``divisor=1`` this is the paper's grid: every group holds s = floor(channels / groups)
    channels and the remainder belongs to the base, b = channels - s (groups - 1). Its "10 groups"
    of ResNet are ``groups=10`` and its "15 groups" of the 1.5-wide MobileNetV2 ``groups=15``.

    Otherwise the widths are the multiples of ``divisor`` nearest to channels * k / groups,
    k = 1 … groups, and the full width.

    Args:
        channels: full width.
        groups: number of channel groups, base included; fewer where the divisor leaves no room.
        divisor: every width is a multiple of it, or the full width.
        min_width: no width is smaller, save a smaller full width.

    Raises:
        ConfigError: an argument below 1.
    """
    for name, value in (
        ("channels", channels),
        ("groups", groups),
        ("divisor", divisor),
        ("min_width", min_width),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an int of at least 1, got {value!r}")
    widths = (
        _paper_grid(channels, groups) if divisor == 1 else _round_grid(channels, groups, divisor)
    )
    return tuple(sorted({width for width in widths if width >= min_width} | {channels}))


def _paper_grid(channels: int, groups: int) -> list[int]:
    step = channels // groups
    if step == 0:
        return [channels]
    base = channels - step * (groups - 1)
    return list(range(base, channels + 1, step))


def _round_grid(channels: int, groups: int, divisor: int) -> list[int]:
    nearest = (
        (2 * channels * k + groups * divisor) // (2 * groups * divisor) for k in range(1, groups)
    )
    return [multiple * divisor for multiple in nearest if 0 < multiple * divisor < channels]
