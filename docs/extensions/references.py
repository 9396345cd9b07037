"""Names in single backticks, and where the package's public objects are documented.

Every object has one place: what `dmcp` exports is on its page, whatever else a package exports on
the package's page. A docstring may call it by any name under which Python finds it.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from functools import cache
from types import ModuleType
from typing import Any

from docutils import nodes
from docutils.parsers.rst.states import Inliner
from docutils.utils import unescape
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.environment import BuildEnvironment
from sphinx.ext.autodoc.mock import MockFinder
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import dmcp

logger = logging.getLogger(__name__)


def named(
    name: str,
    raw: str,
    text: str,
    line: int,
    inliner: Inliner,
    options: Any = None,
    content: Any = None,
) -> tuple[list[nodes.Node], list[nodes.system_message]]:
    """`MarkovNet` links to the object of this name; where there is none, it is code."""
    text = unescape(text)
    env = inliner.document.settings.env
    context = {key: env.ref_context.get(key) for key in ("py:module", "py:class")}
    node = addnodes.pending_xref(
        "",
        nodes.literal(text, text, classes=["xref", "py"]),
        refdomain="",
        reftype="named",
        reftarget=text.removesuffix("()"),
        refdoc=env.docname,
        **context,
    )
    node.source, node.line = inliner.document.current_source, line
    return [node], []


def resolve(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, contents: nodes.Element
) -> nodes.Node | None:
    """Find what `named` names, and the objects that signatures call by their private modules."""
    kind, target = node["reftype"], node["reftarget"]
    if kind != "named" and node.get("refdomain") != "py":
        return None
    objects = env.domains.python_domain.objects
    found = next((name for name in _candidates(node, target) if name in objects), None)
    found = found or _by_identity(env, node, target) or _by_ending(objects, target)
    if found is not None:
        entry = objects[found]
        uri = app.builder.get_relative_uri(node["refdoc"], entry.docname)
        return nodes.reference(
            "", "", contents, internal=True, refuri=f"{uri}#{entry.node_id}", reftitle=found
        )
    internal = any(_import(name) is not None for name in _candidates(node, target)) or any(
        target in vars(module) for _, module in _modules()
    )
    if kind != "named":
        return contents if internal else None
    if target.startswith("dmcp.") and not internal:
        logger.warning("there is no %s", target, location=node, type="ref")
    return contents


def _candidates(node: addnodes.pending_xref, target: str) -> list[str]:
    module, holder = node.get("py:module"), node.get("py:class")
    prefixes = [f"{module}.{holder}." if holder else None, f"{module}." if module else None]
    return [target, *(f"{prefix}{target}" for prefix in [*prefixes, "dmcp."] if prefix)]


def _by_identity(env: BuildEnvironment, node: addnodes.pending_xref, target: str) -> str | None:
    """The documented name of the object that Python finds under another one."""
    for name in _candidates(node, target):
        thing = _import(name) if name.startswith("dmcp") else None
        if thing is None or not hasattr(thing, "__module__"):
            continue
        place = _places(env).get(id(thing))
        if place is not None:
            return place
    return None


def _places(env: BuildEnvironment) -> dict[int, str]:
    """The identity of every documented class and function -> its documented name."""
    objects = env.domains.python_domain.objects
    return _identities(tuple(name for name, entry in objects.items() if not entry.aliased))


@cache
def _identities(names: tuple[str, ...]) -> dict[int, str]:
    return {id(thing): name for name in names if (thing := _import(name)) is not None}


def _by_ending(objects: Any, target: str) -> str | None:
    """`Lab.extract` or `MarkovNet` alone, if there is only one such object."""
    if not target[:1].isupper():
        return None
    endings = {
        name for name, entry in objects.items() if name.endswith(f".{target}") and not entry.aliased
    }
    return endings.pop() if len(endings) == 1 else None


def _modules() -> list[tuple[str, ModuleType]]:
    """The modules of the package that are loaded."""
    loaded = list(sys.modules.items())
    return [(n, m) for n, m in loaded if n.split(".")[0] == "dmcp" and m is not None]


@cache
def _import(name: str) -> Any:
    """The object of a dotted name; None where there is none."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for attribute in parts[count:]:
            # A field of a dataclass without a default is an annotation only.
            if attribute in getattr(thing, "__annotations__", {}) and not hasattr(thing, attribute):
                return ...
            thing = getattr(thing, attribute, None)
            if thing is None:
                return None
        return thing
    return None


_NAME = re.compile(r"dmcp(\.[a-zA-Z]\w*)+(\(\))?|[A-Z][a-z]+[A-Z]\w*(\.\w+)?")


def link_code(app: Sphinx, doctree: nodes.document) -> None:
    """Names in the code of Markdown pages are links, as those of docstrings are."""
    for code in list(doctree.findall(nodes.literal)):
        text = code.astext()
        linked = isinstance(code.parent, nodes.reference | nodes.title | addnodes.pending_xref)
        if linked or not _NAME.fullmatch(text):
            continue
        contents = nodes.literal(text, text, classes=["xref", "py"])
        node = addnodes.pending_xref("", contents, refdomain="", reftype="named")
        node["reftarget"], node["refdoc"] = text.removesuffix("()"), app.env.docname
        code.replace_self(node)


class Package(SphinxDirective):
    """What a package exports, each object where it is documented."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        module = importlib.import_module(name)
        exported = {each: getattr(module, each) for each in _exports(module)}
        top = {} if name == "dmcp" else {each: getattr(dmcp, each) for each in dmcp.__all__}
        lines = [f".. automodule:: {name}", "   :no-members:", "   :no-index:", ""]
        elsewhere = [each for each, thing in exported.items() if top.get(each) is thing]
        if elsewhere:
            links = ", ".join(f":py:obj:`dmcp.{each}`" for each in elsewhere)
            lines += [f"Also here, and described with :doc:`dmcp`: {links}.", ""]
        lines += [f".. py:currentmodule:: {name}", ""]
        for each, thing in exported.items():
            if each not in elsewhere:
                lines += _described(each, thing)
        return self.parse_text_to_nodes("\n".join(lines), offset=0)


def _exports(module: ModuleType) -> list[str]:
    """`__all__`, or what the module defines itself."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__, key=lambda name: _order(getattr(module, name)))
    own = [name for name, thing in vars(module).items() if _is_own(thing, module)]
    return [name for name in own if not name.startswith("_")]


def _is_own(thing: Any, module: ModuleType) -> bool:
    defined = inspect.isclass(thing) or inspect.isfunction(thing)
    return defined and thing.__module__ == module.__name__


def _order(thing: Any) -> int:
    """Classes and functions by name first, exceptions then, data last."""
    if inspect.isclass(thing):
        return 1 if issubclass(thing, Exception) else 0
    return 0 if callable(thing) and hasattr(thing, "__name__") else 2


def _described(name: str, thing: Any) -> list[str]:
    if inspect.isclass(thing):
        kind = "autoexception" if issubclass(thing, Exception) else "autoclass"
        # With what it inherits from classes of the package, but not from those of others.
        others = [
            each.__name__ for each in thing.__mro__ if each.__module__.split(".")[0] != "dmcp"
        ]
        inherited = f"   :inherited-members: {', '.join(others)}"
        return [f".. {kind}:: {name}", "   :members:", inherited, ""]
    if inspect.isfunction(thing):
        return [f".. autofunction:: {name}", ""]
    words = "\n".join(_words(name, thing)).strip().splitlines()
    return [f".. py:data:: {name}", "", *(f"   {line}" for line in words), ""]


def _words(name: str, thing: Any) -> list[str]:
    """What stands below a constant in the module that defines it."""
    for module_name, module in _modules():
        if vars(module).get(name) is thing and module.__spec__ is not None:
            analyzer = ModuleAnalyzer.for_module(module_name)
            found = analyzer.find_attr_docs().get(("", name))
            if found:
                return found
    return []


_COLON = "\ue000"
"""Stands for a colon that is none of Google's, until napoleon has read the docstring."""


def before_napoleon(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Bars are absolute values, and the first line of a property is no type."""
    for number, line in enumerate(lines):
        parts = re.split(r"(``.*?``|`.*?`)", line)
        parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        lines[number] = "".join(parts)
        if what in ("attribute", "data", "property"):
            lines[number] = lines[number].replace(":", _COLON)


def after_napoleon(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Several names before one description are names, not a type and a name."""
    for number, line in enumerate(lines):
        line = line.replace(_COLON, ":")
        if match := re.match(r"( *:(?:ivar|param|type|vartype) )([^:]+)(:.*)", line):
            line = match[1] + re.sub(r",? +", ",\u200b", match[2]) + match[3]
        lines[number] = line


def setup(app: Sphinx) -> dict[str, bool]:
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"  # as the docstrings call them
    # Large, and only a base class is needed of it.
    sys.meta_path.insert(0, MockFinder(["lightning"]))
    app.add_role("named", named)
    app.add_directive("package", Package)
    app.connect("doctree-read", link_code)
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
