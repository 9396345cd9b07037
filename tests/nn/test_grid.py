import pytest

from dmcp.errors import ConfigError
from dmcp.nn import width_choices

# The groups of the published code: channels, kept base, channels per group.
MOBILENET_V2 = [
    (24, 10, 1),
    (40, 12, 2),
    (48, 6, 3),
    (96, 12, 6),
    (144, 18, 9),
    (240, 16, 16),
    (288, 22, 19),
    (480, 32, 32),
    (576, 44, 38),
    (864, 66, 57),
    (1440, 96, 96),
    (1920, 128, 128),
]
RESNET = [
    (64, 10, 6),
    (128, 20, 12),
    (256, 31, 25),
    (512, 53, 51),
    (1024, 106, 102),
    (2048, 212, 204),
]


@pytest.mark.parametrize(
    ("groups", "channels", "base", "step"),
    [(15, *row) for row in MOBILENET_V2] + [(10, *row) for row in RESNET],
)
def test_divisor_1_gives_the_papers_grid(groups, channels, base, step):
    expected = tuple(base + step * k for k in range(groups))
    assert expected[-1] == channels
    assert width_choices(channels, groups, divisor=1) == expected


def test_too_few_channels_for_the_papers_groups_stay_whole():
    assert width_choices(9, 10, divisor=1) == (9,)
    assert width_choices(10, 10, divisor=1) == tuple(range(1, 11))


@pytest.mark.parametrize("channels", [*range(1, 70), 100, 144, 960, 1280, 2048])
@pytest.mark.parametrize(("groups", "divisor"), [(10, 8), (15, 8), (4, 16), (7, 3)])
def test_widths_are_multiples_or_the_full_width(channels, groups, divisor):
    choices = width_choices(channels, groups, divisor)
    assert list(choices) == sorted(set(choices))
    assert choices[-1] == channels
    assert len(choices) <= groups
    assert all(width % divisor == 0 and width > 0 for width in choices[:-1])
    if channels >= groups * divisor:
        assert len(choices) == groups
        for k, width in enumerate(choices, start=1):
            assert abs(width - channels * k / groups) <= divisor / 2


def test_the_default_grid_of_some_layers():
    assert width_choices(64) == (8, 16, 24, 32, 40, 48, 56, 64)
    assert width_choices(256) == (24, 48, 80, 104, 128, 152, 176, 208, 232, 256)
    assert width_choices(20) == (8, 16, 20)
    assert width_choices(8) == (8,)
    assert width_choices(3) == (3,)


def test_no_width_is_below_the_minimum():
    assert width_choices(64, min_width=24) == (24, 32, 40, 48, 56, 64)
    assert width_choices(64, min_width=100) == (64,)


@pytest.mark.parametrize("name", ["channels", "groups", "divisor", "min_width"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be an int of at least 1, got"):
        width_choices(**{"channels": 64, name: value})
