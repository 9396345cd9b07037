"""The commands of the documents are accepted; nothing is run here (see tests/docs)."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import click
import pytest

import dmcp
from dmcp import methods, recipes
from dmcp.cli.commands import commands
from dmcp.recipes import PUBLISHED
from dmcp.search import Budget

DOCS = Path(__file__).parents[1] / "docs"
IMAGENET = (DOCS / "imagenet.md").read_text()
PAGES = {
    str(page.relative_to(DOCS)): page.read_text()
    for page in sorted(DOCS.rglob("*.md"))
    if "_build" not in page.parts
}


def dmcp_commands(text: str) -> list[list[str]]:
    """The arguments of every dmcp command."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in lines.splitlines()]
    return [line[line.index("dmcp") + 1 :] for line in words if "dmcp" in line]


def accepted(arguments: list[str]) -> click.Context:
    """The command and its options as click understands them."""
    command: click.Command = commands
    while isinstance(command, click.Group):
        name, *arguments = arguments
        command = command.commands[name]
    return command.make_context(name, arguments, parent=click.Context(commands))


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if dmcp_commands(text)])
def test_commands_of_a_page_are_accepted(page: str) -> None:
    for arguments in dmcp_commands(PAGES[page]):
        if arguments != ["--version"]:
            accepted(arguments)


EVERY = dmcp_commands(IMAGENET)


@pytest.mark.parametrize("arguments", EVERY, ids=" ".join)
def test_commands_of_the_papers_table(arguments: list[str]) -> None:
    name = arguments[0]
    context = accepted(arguments)
    assert context.params["recipe"] in recipes.names()
    if structure := context.params.get("widths"):
        assert structure in dmcp.structures
    if name == "compare":
        assert set(context.params["names"].split(",")) <= set(methods.names())
        for budget in context.params["budgets"].split(","):
            Budget(macs=budget)


def test_every_run_has_a_folder_of_its_own() -> None:
    folders = [arguments[arguments.index("--output") + 1] for arguments in EVERY]
    assert len(set(folders)) == len(folders) > 30


def test_there_is_a_command_for_every_published_row() -> None:
    suffixes = {"M": 10**6, "G": 10**9}
    promised = set()
    for name, *arguments in EVERY:
        options = dict(pairwise(arguments))
        network = options["--recipe"].partition("-")[0]
        if name == "train" and "--width" in options:
            promised.add((network, "uniform", float(options["--width"])))
        if name == "search":
            found, budgets = ["dmcp"], [options["--recipe"].partition("-")[2]]
            starred = options.get("--retrain") == "distil"
        if name == "compare":
            found, budgets = options["--methods"].split(","), options["--budgets"].split(",")
            starred = options["--track"] == "C"
        if name != "train":
            macs = [round(float(budget[:-1]) * suffixes[budget[-1]]) for budget in budgets]
            promised |= {(network, m, b, starred) for m in found for b in macs}
    published = {
        (r.network, r.method, r.width) if r.width else (r.network, r.method, r.macs, r.distilled)
        for r in PUBLISHED
    }
    assert published <= promised
    assert promised - published == {("resnet18", "uniform", 0.75)}
