import pytest

from dmcp.latency import Timing, side_by_side


def test_calls_take_turns_after_a_warm_up():
    order = []
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    found = side_by_side(calls, rounds=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert all(timing.low <= timing.median <= timing.high for timing in found)


@pytest.mark.parametrize(
    ("count", "low", "high"),
    [(1, 1, 1), (5, 1, 5), (6, 1, 6), (9, 2, 8), (15, 4, 12), (100, 40, 61), (2000, 956, 1045)],
)
def test_the_interval_of_the_median_is_of_order_statistics(count, low, high):
    timing = Timing.of(range(count, 0, -1))
    assert (timing.median, timing.low, timing.high) == ((count + 1) / 2, low, high)
