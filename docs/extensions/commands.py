"""The directive `dmcp-commands`: every command with its options, as `dmcp … --help` prints them."""

from __future__ import annotations

from collections.abc import Iterator

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from dmcp.cli.commands import commands

SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}


class Commands(SphinxDirective):
    """A section for each command, and for each command of a group."""

    def run(self) -> list[nodes.Node]:
        root = click.Context(commands, info_name="dmcp", **SETTINGS)
        return [self._section(context) for context in _leaves(root)]

    def _section(self, context: click.Context) -> nodes.section:
        title = context.command_path
        section = nodes.section(ids=[title.replace(" ", "-")], names=[title])
        section += nodes.title(title, "", nodes.literal(title, title))
        for paragraph in (context.command.help or "").split("\n\n"):
            section += nodes.paragraph("", paragraph.replace("\n", " "))
        usage = " ".join(context.command.collect_usage_pieces(context))
        section += nodes.literal_block("", f"{title} {usage}", language="text")
        section += _options(context)
        self.state.document.note_explicit_target(section)
        return section


def _leaves(context: click.Context) -> Iterator[click.Context]:
    if not isinstance(context.command, click.Group):
        yield context
        return
    for name, command in sorted(context.command.commands.items()):
        yield from _leaves(click.Context(command, parent=context, info_name=name))


def _options(context: click.Context) -> nodes.definition_list:
    listed = nodes.definition_list(classes=["options"])
    for parameter in context.command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None:
            continue
        names, text = record
        term = nodes.term("", "", nodes.literal(names, names))
        listed += nodes.definition_list_item(
            "", term, nodes.definition("", nodes.paragraph("", text))
        )
    return listed


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("dmcp-commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
