"""The ``sample.npy`` that DMCP's released code writes, read without running pickle code.

From github.com/Zx55/dmcp: ``dump_mbv2_setting`` and ``dump_resnet_setting`` in
models/dmcp/utils.py write it, models/adaptive/{mobilenet,resnet}.py read it. It is a NumPy file of
one object, a dict, which NumPy pickles::

    MobileNetV2  {"conv1": out, "0": {"conv2": (in, out), "conv3": (in, out)},
                  "1": {"conv1": (in, out), "conv2": …, "conv3": …}, …, "conv_last": (in, out)}
    ResNet       {"conv1": out, "layer1": {"0": {"conv1": (in, out), …}, …}, …, "fc": in}

``np.load(allow_pickle=True)`` would run whatever code the file names. Here the pickle may name only
what an array is made of, and gets inert stand-ins for that.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dmcp.errors import StructureError
from dmcp.graph import ChannelGraph
from dmcp.structure.importers.claims import Claim, widths_of
from dmcp.structure.structure import Structure

_LARGEST_PICKLE = 2**20
"""Bytes; a long pruning history beside the names of the weights has a tenth."""

_MOST_TUPLES = 2**14
"""Each holds the one before, at worst; as a key, a hundred thousand would overflow the stack."""


def from_npy(settings: Any, graph: ChannelGraph) -> Structure:
    """The structure that such a dict describes, for `dmcp.models`' network of the same name.

    Raises:
        StructureError: the data are malformed, or a layer does not fit the network.
    """
    if not isinstance(settings, dict):
        raise StructureError(f"it holds {_kind(settings)}, not a dict of layers")
    widths = widths_of(graph, _claims(settings, _blocks(graph)))
    return Structure.of(graph, widths, note="Read from a sample.npy of DMCP's released code.")


def read_npy(data: bytes) -> Any:
    """The one object in a NumPy file, of plain data.

    Raises:
        StructureError: it is no such file, or names anything that is no part of an array.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = header(file)
        if shape != () or dtype != np.dtype(object):
            raise StructureError(f"it holds {list(shape)} items of {dtype}, not one object")
        pickled = file.read()
        check_opcodes(pickled)
        array = _Unpickler(io.BytesIO(pickled)).load()
        return _only_item(array)
    except StructureError:
        raise
    except Exception as error:  # whatever a malformed header or pickle makes NumPy or pickle raise
        raise StructureError(f"it is no NumPy file of one object: {error}") from None


class _Inert:
    """Stands for something of NumPy's in a pickle: remembers what it is made from, does nothing."""

    arguments: tuple[Any, ...] = ()  # of the class too: a pickle may make objects without __init__
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Inert):
    """``_reconstruct(ndarray, (0,), b"b")``, whose state holds the items."""


class _Type(_Inert):
    """``ndarray`` and ``dtype("i8", …)``."""


class _Scalar(_Inert):
    """``scalar(dtype, bytes)``."""


_ALLOWED: Mapping[tuple[str, str], type[_Inert]] = {
    (f"numpy.{core}.multiarray", name): kind
    for core in ("core", "_core")
    for name, kind in {"_reconstruct": _Array, "scalar": _Scalar}.items()
} | {("numpy", "ndarray"): _Type, ("numpy", "dtype"): _Type}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise StructureError(f"the pickle names {module}.{name}: nothing of it was run")
        return _ALLOWED[module, name]


def check_opcodes(pickled: bytes) -> None:
    """Refuse a pickle that would make the unpickler allocate what it says, or overflow the stack.

    Raises:
        StructureError: it would, or is too large.
        ValueError: it is cut off, or no pickle.
    """
    if len(pickled) > _LARGEST_PICKLE:
        raise StructureError(f"the pickle has over {_LARGEST_PICKLE:,} bytes")
    tuples = 0
    for opcode, argument, _ in pickletools.genops(pickled):
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(pickled):
            raise StructureError(f"the pickle has a memo of {argument} entries")
        tuples += opcode.name.startswith("TUPLE")
    if tuples > _MOST_TUPLES:
        raise StructureError(f"the pickle has over {_MOST_TUPLES:,} tuples")


def _only_item(array: Any) -> Any:
    """What an array of no dimensions holds."""
    if not isinstance(array, _Array) or not isinstance(array.state, tuple) or len(array.state) != 5:
        raise StructureError("the pickle is not that of an array")
    items = array.state[4]
    if not isinstance(items, list) or len(items) != 1:
        raise StructureError("the array does not hold one object")
    return items[0]


def _integer(value: Any, says: str) -> int:
    """A number of channels, which may be NumPy's."""
    if isinstance(value, _Scalar) and len(value.arguments) == 2:
        kind, data = value.arguments
        name = kind.arguments[0] if isinstance(kind, _Type) and kind.arguments else None
        if isinstance(name, str) and name[:1] in ("i", "u") and isinstance(data, bytes):
            big = isinstance(kind.state, tuple) and len(kind.state) > 1 and kind.state[1] == ">"
            value = int.from_bytes(data, "big" if big else "little", signed=name[0] == "i")
    if isinstance(value, bool) or not isinstance(value, int):
        raise StructureError(f"{says} must be an int, got {_kind(value)}")
    if not 0 < value < 2**31:
        raise StructureError(f"{says} must lie in 1..{2**31 - 1}")
    return value


def _kind(value: Any) -> str:
    return f"an object of type {type(value).__name__.lstrip('_')}"


def _blocks(graph: ChannelGraph) -> dict[str, str]:
    """The file's names of a MobileNetV2's blocks, and the network's."""
    depthwise = [name for name in graph.modules if name.endswith(".depthwise")]
    return {str(n): name.removesuffix(".depthwise") for n, name in enumerate(depthwise)}


def _claims(settings: Mapping[Any, Any], blocks: Mapping[str, str]) -> Iterator[Claim]:
    """What the file says of each convolution, by our names of the layers."""
    for key, value in settings.items():
        if not isinstance(key, str):
            raise StructureError(f"names of layers must be strings, got {_kind(key)}")
        if key == "conv1":
            yield Claim("conv1", "conv1", "out", _integer(value, "conv1"))
        elif key == "fc":
            yield Claim("fc", "fc", "in", _integer(value, "fc"))
        elif key == "conv_last":
            yield from _ends("conv_last", "conv_last", value)
        elif key in blocks:
            yield from _block(f"block {key}", blocks[key], value, _MOBILENET_V2)
        elif key.startswith("layer") and isinstance(value, dict):
            for number, block in value.items():
                name = f"{key}.{number if isinstance(number, str) else '?'}"
                yield from _block(name, name, block, _RESNET)
        else:
            raise StructureError(f"the network has no layer or block {reprlib.repr(key)}")


_MOBILENET_V2 = {"conv1": "expand", "conv2": "depthwise", "conv3": "project"}
_RESNET = {name: name for name in _MOBILENET_V2}


def _block(says: str, prefix: str, block: Any, names: Mapping[str, str]) -> Iterator[Claim]:
    if not isinstance(block, dict) or not block.keys() <= names.keys():
        raise StructureError(f"{says} must be a dict of {', '.join(names)}")
    for conv, ends in block.items():
        yield from _ends(f"{says}, {conv}", f"{prefix}.{names[conv]}", ends)


def _ends(says: str, module: str, ends: Any) -> Iterator[Claim]:
    if not isinstance(ends, tuple | list) or len(ends) != 2:
        raise StructureError(f"{says} must have two numbers, those of its inputs and outputs")
    yield Claim(f"the input of {says}", module, "in", _integer(ends[0], says))
    yield Claim(f"the output of {says}", module, "out", _integer(ends[1], says))
