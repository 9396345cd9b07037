"""Reading JSON that others wrote: strictly, within bounds, and checked against a schema."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from dmcp.errors import StructureError

LARGEST_FILE = 64 * 2**20
"""Bytes; the kept indices of a million channels take 8 MB."""

_short_repr = reprlib.Repr()
_short_repr.maxstring = 200  # names of layers are long
_repr = _short_repr.repr

_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
}


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of a structure file."""
    found: dict[str, Any] = json.loads(files("dmcp.structure").joinpath("schema.json").read_text())
    return found


def read_bytes(path: Path) -> bytes:
    """A file of a size that can be meant.

    Raises:
        StructureError: it cannot be read, or is larger.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise StructureError(f"there is no structure file {path}") from None
    except OSError as error:
        raise StructureError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > LARGEST_FILE:
        raise StructureError(f"{path} is no structure file: it has over {LARGEST_FILE:,} bytes")
    return data


def parse_json(data: bytes) -> Any:
    """JSON of finite numbers and objects without duplicate names.

    Raises:
        StructureError: it is anything else.
    """
    try:
        return json.loads(
            data.decode(), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite
        )
    except RecursionError:
        raise StructureError("its JSON is nested too deeply") from None
    except StructureError:
        raise
    except ValueError as error:  # also bytes that are no UTF-8 and integers of too many digits
        raise StructureError(f"it is not readable as JSON: {error}") from None


def check_schema(value: Any, rules: Mapping[str, Any], name: str = "") -> None:
    """Hold a value against the part of JSON Schema that `schema` uses.

    Args:
        value: JSON data, parsed or to be written.
        rules: the schema.
        name: of the value, for the message.

    Raises:
        StructureError: the first field that breaks a rule, what it is and what it must be.
    """
    if "const" in rules:
        const = rules["const"]
        same = type(value) is type(const) and value == const
        _require(same, name, f"be {const!r}", value)
    kinds = rules.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds:
        _require(any(_is(value, kind) for kind in kinds), name, _one_of(kinds), value)
    if isinstance(value, dict):
        _check_object(value, rules, name)
    elif isinstance(value, list):
        least, most = rules.get("minItems", 0), rules.get("maxItems", math.inf)
        _require(least <= len(value) <= most, name, f"have {_count(least, most)} items", value)
        first = rules.get("prefixItems", ())
        for index, item in enumerate(value if "items" in rules else ()):
            rule = first[index] if index < len(first) else rules["items"]
            check_schema(item, rule, f"{name}[{index}]")
    elif isinstance(value, str):
        least = rules.get("minLength", 0)
        _require(len(value) >= least, name, f"have {_count(least, math.inf)} characters", value)
        pattern = rules.get("pattern", "")
        _require(re.search(pattern, value) is not None, name, f"match {pattern}", value)
    elif isinstance(value, int | float):
        least, most = rules.get("minimum", -math.inf), rules.get("maximum", math.inf)
        _require(least <= value <= most, name, _bounds(least, most), value)


def _check_object(value: dict[str, Any], rules: Mapping[str, Any], name: str) -> None:
    properties, others = rules.get("properties", {}), rules.get("additionalProperties", True)
    for key in rules.get("required", ()):
        if key not in value:
            raise StructureError(f"{_field(name, key)} is missing")
    for key, item in value.items():
        if not isinstance(key, str):
            raise StructureError(f"{name or 'it'} must have strings as names, got {_repr(key)}")
        if key not in properties and others is False:
            raise StructureError(f"{_field(name, key)} is unknown")
        rule = properties.get(key, others)
        if rule is not True:
            check_schema(item, rule, _field(name, key))


def _field(name: str, key: str) -> str:
    if name:
        return f"{name}[{_repr(key)}]"
    return key if key.isidentifier() and len(key) < 40 else _repr(key)


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _require(holds: bool, name: str, rule: str, value: Any) -> None:
    if not holds:
        raise StructureError(f"{name or 'it'} must {rule}, got {_short(value)}")


def _short(value: Any) -> str:
    """What it is, in few words, however large or deep."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return _repr(value)


def _one_of(kinds: list[str]) -> str:
    articles = [f"an {kind}" if kind[0] in "aeio" else f"a {kind}" for kind in kinds]
    return "be " + " or ".join(articles)


def _count(least: float, most: float) -> str:
    return str(least) if least == most else f"at least {least}"


def _bounds(least: float, most: float) -> str:
    return f"be at least {least}" if most == math.inf else f"lie in {least}..{most}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise StructureError(f"{_repr(key)} is there twice in one object")
        found[key] = value
    return found


def _refuse(constant: str) -> NoReturn:
    raise StructureError(f"{constant} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise StructureError(f"{_repr(text)} is no finite number")
    return value
