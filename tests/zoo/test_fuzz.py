"""Random networks (`fuzz`) in numbers that continuous integration can afford.

Of 3 to 8 operators each, because a trace of more takes longer; a longer search is a command:
``python tests/zoo/fuzz.py --graphs 500``.
"""

from __future__ import annotations

import fuzz
import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

NUMBERS = st.integers(0, fuzz.LARGEST)
STEPS = st.tuples(st.integers(0, len(fuzz.OPERATORS) - 1), NUMBERS, NUMBERS, NUMBERS, NUMBERS)
OUTPUTS = st.tuples(st.integers(0, fuzz.KINDS_OF_OUTPUT - 1), NUMBERS, NUMBERS)
PROGRAMS = st.tuples(
    st.lists(STEPS, min_size=3, max_size=8), st.lists(OUTPUTS, min_size=1, max_size=2)
)

AFFORDABLE = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("seed", range(5))
def test_random_networks_are_never_wrong(seed):
    @hypothesis.seed(seed)  # else all parts would be the same
    @AFFORDABLE
    @given(PROGRAMS)
    def examine(program):
        finding = fuzz.examine(program)
        assert not finding.wrong, finding

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        examine()
    finally:
        torch.set_num_threads(threads)
