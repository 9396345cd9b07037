"""A picture of a traced network: its modules, coloured by channel unit."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from dmcp.errors import ConfigError, MissingDependencyError
from dmcp.graph import ChannelGraph

_UNSEARCHABLE = "#d0d0d0"
_GOLDEN_RATIO = 0.618034  # hues of neighbours stay far apart, however many units there are


def check_picture(path: Path) -> None:
    """Refuse a file that `write_picture` cannot write.

    Raises:
        ConfigError: its name ends in something else than .dot and .svg.
        MissingDependencyError: .svg, and Graphviz is not there.
    """
    if path.suffix not in (".dot", ".svg"):
        raise ConfigError(f"a picture must be a file .dot or .svg, got {str(path)!r}")
    if path.suffix == ".svg" and shutil.which("dot") is None:
        raise MissingDependencyError(
            "an .svg needs the program 'dot' of Graphviz: install it, or write a file .dot"
        )


def write_picture(graph: ChannelGraph, path: Path) -> None:
    """Draw a network, as DOT text or, laid out by Graphviz, as SVG.

    Raises:
        ConfigError, MissingDependencyError: see `check_picture`.
    """
    check_picture(path)
    text = to_dot(graph)
    if path.suffix == ".svg":
        done = subprocess.run(["dot", "-Tsvg"], input=text, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"Graphviz cannot draw {path}: {done.stderr.strip()}")
        text = done.stdout
    path.write_text(text)


def to_dot(graph: ChannelGraph) -> str:
    """The modules in execution order and what they read, in the language of Graphviz.

    One box per call of a module, in the colour of the unit it produces or scales, grey where that
    is not searchable; a dot where several values meet. Other functional calls are left out:
    what reads them is shown to read what they read.
    """
    lines = ["digraph {", 'node [shape=box style="rounded,filled" fillcolor=white]']
    styles = _styles(graph)
    sources: list[tuple[int, ...]] = []
    for number, node in enumerate(graph.nodes):
        read = tuple(dict.fromkeys(source for i in node.inputs for source in sources[i]))
        if node.module is None and len(read) < 2:
            sources.append(read)
            continue
        sources.append((number,))
        lines.append(f"n{number} [{'shape=point' if node.module is None else styles[node.module]}]")
        lines += [f"n{source} -> n{number}" for source in read]
    return "\n".join([*lines, "}", ""])


def _styles(graph: ChannelGraph) -> dict[str, str]:
    """Qualified name -> how the module looks."""
    names = [node.module for node in graph.nodes if node.module is not None]
    kinds = {name: type(graph.model.get_submodule(name)).__name__ for name in names}
    styles = {name: f"label={_quoted(name, kind)}" for name, kind in kinds.items()}
    produced = set()
    for number, unit in enumerate(graph.units):
        hue = number * _GOLDEN_RATIO % 1
        colour = f"{hue:.3f} 0.35 1.0" if unit.searchable else _UNSEARCHABLE
        for member in unit.members:
            if member.role == "out" and member.module in kinds and member.module not in produced:
                produced.add(member.module)
                label = _quoted(member.module, f"{kinds[member.module]} {unit.channels}")
                tip = _quoted(f"{unit.name} {unit.reason}".strip())
                styles[member.module] = f'label={label} fillcolor="{colour}" tooltip={tip}'
    return styles


def _quoted(*lines: str) -> str:
    escaped = (line.replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return '"' + "\\n".join(escaped) + '"'
