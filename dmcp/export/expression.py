"""Python expressions as trees, laid out as ruff lays them out."""

from __future__ import annotations

import json
import keyword
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_COLUMNS = 88
_INDENT = "    "


@dataclass(frozen=True)
class Call:
    """``function(argument, name=argument)``, or with other brackets."""

    function: str
    arguments: tuple[tuple[str, str | Call], ...] = ()
    brackets: str = "()"

    def __str__(self) -> str:
        return self.function + self.brackets[0] + _body(self.arguments) + self.brackets[1]


Expression = str | Call


def call(function: str, *arguments: Expression, **keywords: Expression) -> Call:
    """A call with positional arguments and keywords."""
    positional = [("", each) for each in arguments]
    named = [(f"{name}=", each) for name, each in keywords.items()]
    return Call(function, (*positional, *named))


def literal(value: object) -> str:
    """The source of a plain value.

    Raises:
        ValueError: it has none.
    """
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # which quotes and escapes as Python does
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, int | float):  # not as a subclass shows itself, NumPy's or an enum
        return (int if isinstance(value, int) else float).__repr__(value)
    if isinstance(value, torch.dtype | torch.memory_format):
        return str(value)
    if isinstance(value, list | tuple):
        return sequence(value, [literal(each) for each in value])
    raise ValueError(f"{type(value).__name__} has no source")


def is_name(text: str) -> bool:
    """Whether Python takes it as the name of an attribute or a class."""
    return text.isidentifier() and not keyword.iskeyword(text)


def sequence(kind: object, parts: Sequence[str]) -> str:
    """The source of a list, or of a tuple if ``kind`` is one."""
    if not isinstance(kind, tuple):
        return f"[{', '.join(parts)}]"
    return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"


def lines(expression: Expression, depth: int, before: str = "", after: str = "") -> list[str]:
    """The lines of ``before expression after``, each argument on its own where one is too long."""
    margin = _INDENT * depth
    whole = f"{margin}{before}{expression}{after}"
    if len(whole) <= _COLUMNS or isinstance(expression, str) or not expression.arguments:
        return [whole]
    opening, closing = expression.brackets[0], expression.brackets[1]
    inner = f"{margin}{_INDENT}{_body(expression.arguments)}"
    if len(inner) <= _COLUMNS:
        middle = [inner]
    else:
        middle = []
        for name, argument in expression.arguments:
            middle += lines(argument, depth + 1, name, ",")
    return [
        f"{margin}{before}{expression.function}{opening}",
        *middle,
        f"{margin}{closing}{after}",
    ]


def _body(arguments: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(f"{name}{argument}" for name, argument in arguments)
