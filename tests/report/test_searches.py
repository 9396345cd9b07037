from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dmcp.errors import CheckpointError
from dmcp.report import Chains, find_searches
from dmcp.report.searches import structures_of


def test_the_search_of_a_run(description: dict[str, Any], write: Any, tmp_path: Path) -> None:
    path = write("search.json", description)
    assert find_searches(tmp_path) == {"": path}


def test_the_searches_of_a_comparison(
    description: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    """Other methods' findings beside them are none, and gates without a chain are none either."""
    folder = "methods/dmcp-0"
    paths = {
        f"{folder}/search-{budget}": write(f"{folder}/search-{budget}.json", description)
        for budget in ("25%", "2.8G")
    }
    gates = {name: q[::-1] for name, q in description["retain"].items()}
    write("methods/bernoulli-0/search-25%.json", description | {"retain": gates})
    write("methods/amc-0/search-25%.json", {"accuracy": 0.9})
    # A search is finished once all its budgets are found.
    write("methods/dmcp-1/search-25%.json", description)
    for method in ("dmcp-0", "bernoulli-0", "amc-0"):
        write(f"methods/{method}/found.json", {})
    (tmp_path / "methods/amc-0/search-50%.json").write_text("{")
    assert find_searches(tmp_path) == paths


def test_a_folder_without_a_search(tmp_path: Path, write: Any) -> None:
    write("config.json", {})
    assert find_searches(tmp_path) == {}
    assert find_searches(tmp_path / "none") == {}


def test_a_broken_search_is_not_passed_over(write: Any, tmp_path: Path) -> None:
    path = write("search.json", {"costs": {}})
    assert find_searches(tmp_path) == {"": path}


def test_the_structures_of_a_search(
    description: dict[str, Any], chains: Chains, write: Any
) -> None:
    """Those of the results, of a search whose networks still train, of chains alone."""
    path = write("search.json", description)
    assert structures_of(path, chains) == {"expected": chains.expected_widths()}
    write("widths.json", {"widths": {"conv1": 3}})
    assert structures_of(path, chains) == {"dmcp": {"conv1": 3}}
    write("results.json", {"widths": {"dense": {}, "dmcp": {"conv1": 3}, "uniform": {"conv1": 5}}})
    assert structures_of(path, chains) == {"dmcp": {"conv1": 3}, "uniform": {"conv1": 5}}
    path = write("methods/dmcp-1/search-25%.json", description)
    write("methods/dmcp-1/found.json", {"25%": {"widths": {"conv1": 7}}})
    assert structures_of(path, chains) == {"dmcp-1": {"conv1": 7}}


@pytest.mark.parametrize("content", [{"widths": 3}, {}])
def test_results_of_something_else(
    description: dict[str, Any], chains: Chains, write: Any, content: Any
) -> None:
    path = write("search.json", description)
    write("results.json", content)
    with pytest.raises(CheckpointError, match="holds no structures of"):
        structures_of(path, chains)
