"""The Python that calls each operator of a captured program."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from dmcp.export.calls import is_in_place
from dmcp.export.expression import Expression, call

Read = Callable[[Any], Expression]
"""Gives the source of an argument: a tensor, a size, a list or plain data."""

Arguments = dict[str, Any]

_SYMBOLS = {
    "add": "+",
    "bitwise_and": "&",
    "bitwise_or": "|",
    "div": "/",
    "eq": "==",
    "floor_divide": "//",
    "ge": ">=",
    "gt": ">",
    "le": "<=",
    "lt": "<",
    "matmul": "@",
    "mul": "*",
    "ne": "!=",
    "pow": "**",
    "remainder": "%",
    "sub": "-",
}

# The functions of torch.nn.functional that take an operator's arguments under its names, and how
# many of them by their places.
_FUNCTIONS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear", "scaled_dot_product_attention"), 3),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), 2),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), 2),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), 2),
    **dict.fromkeys(("dropout", "glu", "group_norm", "layer_norm", "pad"), 2),
    **dict.fromkeys(("leaky_relu", "pixel_shuffle", "pixel_unshuffle", "prelu"), 2),
    **dict.fromkeys(("batch_norm", "celu", "elu", "gelu", "hardsigmoid", "hardswish"), 1),
    **dict.fromkeys(("hardtanh", "mish", "relu", "relu6", "selu", "silu", "softplus"), 1),
}
_WINDOWED = ("conv", "pool")
_LIGHT = {
    *("contiguous", "flatten", "transpose"),
    *("batch_norm", "group_norm", "layer_norm", "dropout", "feature_dropout", "sigmoid", "tanh"),
    *("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish"),
    *("prelu", "relu", "relu6", "selu", "silu", "softplus"),
}
_UNPACKED = {"expand", "permute", "repeat"}
_LEFT_OUT = {"cudnn_enable", "cudnn_enabled", "layout", "pin_memory"}


class Training:
    """In the place of an argument: the mode of the module, ``self.training``."""


def name_of(node: Node) -> str:
    """``relu`` for ``aten.relu_.default``; empty for what is no operator of PyTorch's own."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    name = target._schema.name.removeprefix("aten::")
    return name.removesuffix("_")


def is_light(node: Node) -> bool:
    """Whether it is written around the operator whose result it takes, as an activation is."""
    return name_of(node) in _LIGHT


def assignment(node: Node) -> str | None:
    """``+=``, if the operator is arithmetic in place that is written so."""
    name = name_of(node)
    if name not in ("add", "sub", "mul", "div") or not is_in_place(node):
        return None
    return f"{_SYMBOLS[name]}=" if set(_arguments(node)) == {"self", "other"} else None


def express(node: Node, read: Read) -> Expression | None:
    """The source of an operator, None if it has none that needs torch only.

    Args:
        node: the operator.
        read: the source of its arguments.
    """
    name = name_of(node)
    if not name:
        return None
    arguments = _arguments(node)
    in_place = is_in_place(node)
    if name in _SPECIAL:
        return _SPECIAL[name](arguments, read)
    if name in _SYMBOLS and not in_place and len(arguments) == 2 and "alpha" not in arguments:
        left, right = (_atom(read(each)) for each in arguments.values())
        return _binary(left, _SYMBOLS[name], right)
    if name in _FUNCTIONS:
        return _function(name, arguments, read, in_place=in_place)
    return _method(node, arguments, read)


def _binary(left: str, symbol: str, right: str) -> str:
    if symbol == "**" and left.startswith("-"):
        left = f"({left})"  # the power comes before the sign
    is_tight = symbol == "**" and all(re.fullmatch(r"[\w.]+", each) for each in (left, right))
    return f"{left}{symbol}{right}" if is_tight else f"{left} {symbol} {right}"


def _arguments(node: Node) -> Arguments:
    """The arguments that differ from the operator's defaults, by name."""
    assert isinstance(node.target, torch._ops.OpOverload)
    given = {}
    for place, each in enumerate(node.target._schema.arguments):
        value = node.args[place] if place < len(node.args) else node.kwargs.get(each.name, node)
        usual = each.has_default_value() and _same(value, each.default_value)
        if value is not node and not usual and each.name not in _LEFT_OUT:
            given[each.name] = value
    return given


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, list) and isinstance(default, int):
        return all(type(each) is int and each == default for each in value)
    return not isinstance(value, Node) and type(value) is type(default) and value == default


def _function(name: str, arguments: Arguments, read: Read, *, in_place: bool) -> Expression:
    """A call of torch.nn.functional."""
    if any(part in name for part in _WINDOWED):
        arguments = {key: _window(value) for key, value in arguments.items()}
    by_place = list(arguments)[: _FUNCTIONS[name]]
    if name in ("conv1d", "conv2d", "conv3d", "linear"):  # the bias may have been left out
        by_place = [key for key in by_place if key in ("input", "weight", "bias")]
    keywords = {key: value for key, value in arguments.items() if key not in by_place}
    mode = keywords.pop("train", keywords.pop("training", None))
    if mode is not None:  # what is off in evaluation mode is the module's to decide
        keywords["training"] = mode or Training()
    if in_place:
        keywords["inplace"] = True
    return call(
        f"F.{name}",
        *(read(arguments[key]) for key in by_place),
        **{key: read(value) for key, value in keywords.items()},
    )


def _window(value: Any) -> Any:
    """``[2, 2]`` as ``2``, and other sizes as tuples."""
    if not isinstance(value, list) or not value:
        return value
    return value[0] if all(each == value[0] for each in value) else tuple(value)


def _method(node: Node, arguments: Arguments, read: Read) -> Expression | None:
    """A method of the first tensor, or a function of torch."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema
    name = schema.name.removeprefix("aten::")
    by_place = [
        each.name
        for each in schema.arguments
        if each.name in arguments
        and (not each.has_default_value() or each.name == "start_dim")
        and not each.kwarg_only
    ]
    keywords = {key: read(each) for key, each in arguments.items() if key not in by_place}
    positional = [read(arguments[key]) for key in by_place]
    if by_place[:1] == ["self"] and isinstance(getattr(Tensor, name, None), MethodDescriptorType):
        if name in _UNPACKED and isinstance(arguments[by_place[-1]], list):
            positional[1:] = [read(each) for each in arguments[by_place[-1]]]
        return call(f"{_atom(positional[0])}.{name}", *positional[1:], **keywords)
    if isinstance(getattr(torch, name, None), BuiltinFunctionType) and name[0] != "_":
        return call(f"torch.{name}", *positional, **keywords)
    return None


def _interpolate(mode: str) -> Callable[[Arguments, Read], Expression]:
    def express(arguments: Arguments, read: Read) -> Expression:
        keywords = {"size": arguments.get("output_size")}
        if keywords["size"] is None:
            keywords = {"scale_factor": arguments.get("scale_factors")}
        keywords = {key: _window(value) for key, value in keywords.items()}
        if mode != "nearest":
            keywords["mode"] = mode
        if arguments.get("align_corners"):
            keywords["align_corners"] = True
        sources = {key: read(value) for key, value in keywords.items()}
        return call("F.interpolate", read(arguments["input"]), **sources)

    return express


def _slice(arguments: Arguments, read: Read) -> Expression:
    start, end = arguments.get("start") or 0, arguments.get("end")
    parts = ["" if start == 0 else read(start), "" if end in (None, _TO_THE_END) else read(end)]
    if arguments.get("step", 1) != 1:
        parts.append(read(arguments["step"]))
    return _index(arguments, ":".join(str(each) for each in parts), read)


def _select(arguments: Arguments, read: Read) -> Expression:
    return _index(arguments, str(read(arguments["index"])), read)


def _index(arguments: Arguments, text: str, read: Read) -> Expression:
    dim = arguments.get("dim", 0)
    before = "..., " if dim < 0 else ":, " * dim
    after = ", :" * (-dim - 1) if dim < 0 else ""
    return f"{_atom(read(arguments['self']))}[{before}{text}{after}]"


def _advanced(arguments: Arguments, read: Read) -> Expression:
    parts = [":" if each is None else str(read(each)) for each in arguments["indices"]]
    return f"{_atom(read(arguments['self']))}[{', '.join(parts)}]"


def _atom(source: Expression) -> str:
    """In parentheses, if it is arithmetic."""
    text = str(source)
    return f"({text})" if " " in text and isinstance(source, str) else text


def _reshape(method: str) -> Callable[[Arguments, Read], Expression]:
    """Sizes as a person writes them: for any batch, and for any image where that can be seen."""

    def express(arguments: Arguments, read: Read) -> Expression:
        tensor, sizes = arguments.values()
        text = _atom(read(tensor))
        before = [*tensor.meta["val"].shape]
        after = [each.meta["val"] if isinstance(each, Node) else each for each in sizes]
        unknown = [each for each in sizes if isinstance(each, Node)]
        if -1 in sizes or len(unknown) != 1:
            return call(f"{text}.{method}", *map(read, sizes))
        same = _common(before[1:], after[1:])
        if after[0] is before[0] or str(after[0]) == str(before[0]):
            middle = after[1 : len(after) - same]
            parts = [f"{text}.shape[0]", *map(str, middle)]
            if middle:
                parts[1 + middle.index(max(middle))] = "-1"
            if same:
                parts.append(f"*{text}.shape[-{same}:]")
            return call(f"{text}.{method}", *parts)
        return call(
            f"{text}.{method}", *("-1" if each in unknown else read(each) for each in sizes)
        )

    return express


def _common(before: list[Any], after: list[Any]) -> int:
    """How many sizes at the end are the same, height and width at least."""
    same = 0
    while same < min(len(before), len(after)) and before[-1 - same] == after[-1 - same]:
        same += 1
    return same if same >= 2 else 0


def _embedding(arguments: Arguments, read: Read) -> Expression:
    return call("F.embedding", read(arguments["indices"]), read(arguments["weight"]))


def _reversed_difference(arguments: Arguments, read: Read) -> Expression:
    return _binary(_atom(read(arguments["other"])), "-", _atom(read(arguments["self"])))


def _copy(arguments: Arguments, read: Read) -> Expression:
    return call(f"{_atom(read(arguments['self']))}.clone")


_TO_THE_END = sys.maxsize
_SPECIAL: dict[str, Callable[[Arguments, Read], Expression]] = {
    "embedding": _embedding,
    "index": _advanced,
    "lift_fresh_copy": _copy,
    "reshape": _reshape("reshape"),
    "rsub": _reversed_difference,
    "select": _select,
    "slice": _slice,
    "upsample_bicubic2d": _interpolate("bicubic"),
    "upsample_bilinear2d": _interpolate("bilinear"),
    "upsample_linear1d": _interpolate("linear"),
    "upsample_nearest1d": _interpolate("nearest"),
    "upsample_nearest2d": _interpolate("nearest"),
    "upsample_nearest3d": _interpolate("nearest"),
    "upsample_trilinear3d": _interpolate("trilinear"),
    "view": _reshape("view"),
}
