"""A Markdown table of what `dmcp` makes of every network of the zoo.

python tests/zoo/report.py [--published] [--output docs/zoo.md]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from checks import TOLERANCE, error, narrowest, prepared, searchable_share, structures
from handmade import REFUSED, ZOO, Network
from published import PUBLISHED

import dmcp

HEADER = (
    "| network | units | searchable | share of MACs | refuted | structures | worst error |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def row(name: str, make: Callable[[], Network]) -> str:
    """One network's line."""
    try:
        network = prepared(make())
    except ImportError as missing:
        return f"| {name} | – | – | – | – | not built: {missing} | – |"
    try:
        graph = dmcp.trace(network.model, network.inputs)
    except dmcp.TraceError:
        return f"| {name} | – | – | – | – | – | refused |"
    searchable = [unit for unit in graph.units if unit.searchable]
    share = searchable_share(graph, network.inputs)
    tried = [*structures(graph), narrowest(graph)]
    worst = max(error(graph, structure, network.inputs) for structure in tried)
    verdict = f"{worst:.0e}" if worst < TOLERANCE else f"**{worst:.0e}**"
    return (
        f"| {name} | {len(graph.units)} | {len(searchable)} | {share:.0%} "
        f"| {len(graph.proof.refuted)} | {len(tried)} | {verdict} |"
    )


def lines(published: bool) -> Iterator[str]:
    """The page, line by line, as its networks are done."""
    yield "# The zoo"
    yield ""
    yield (
        "Every network is traced; two random prefixes, one random subset and the narrowest choice "
        "of its units' channels are extracted and compared with the whole network whose dropped "
        "channels are zeroed, in float64 with random numbers in every parameter and buffer. "
        "*Share of MACs*: in layers whose cost a search can change. *Refuted*: units that the "
        "proof made unsearchable, mostly for channel counts in the code. *Worst error*: largest "
        "difference of an output relative to that output's largest number."
    )
    networks = {"Hand-made": ZOO | REFUSED}
    if published:
        networks["Published"] = PUBLISHED
    for title, group in networks.items():
        yield from ("", f"## {title}", "", *HEADER)
        for name, make in group.items():
            yield row(name, make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--published", action="store_true", help="torchvision and timm as well")
    parser.add_argument("--output", type=Path, help="where to write; standard output without it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    page = []
    for line in lines(options.published):
        page.append(line)
        if options.output is None or line.startswith("| "):
            print(line, file=sys.stdout if options.output is None else sys.stderr, flush=True)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
