"""Published pruned structures by name: the paper's Tables 7 and 8, and two released with its code.

    structure = dmcp.structures["mobilenet_v2-300M"]
    model = build(structure.model, **structure.model_kwargs)
    small = structure.extract(dmcp.trace(model, torch.zeros(1, 3, 224, 224)))

The tables need three repairs, each in the note of its structure. Table 8 leaves `conv_last` out,
so each structure takes a value that meets its budget. Its 59M column feeds a 12-channel stream into
a convolution of 16 channels. Its 97M column exceeds 97M whatever `conv_last` is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dmcp.errors import UnknownNameError
from dmcp.structure.structure import Structure


class Structures(Mapping[str, Structure]):
    """Structures by name; read-only."""

    def __init__(self, by_name: Mapping[str, Structure]) -> None:
        self._by_name = dict(by_name)

    def __getitem__(self, name: str) -> Structure:
        """The structure of that name.

        Raises:
            UnknownNameError: there is none.
        """
        if name not in self._by_name:
            raise UnknownNameError(
                f"unknown structure {name!r}: the structures are {', '.join(self)}"
            )
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __repr__(self) -> str:
        return f"Structures({', '.join(self)})"


def _mobilenet_v2(
    width: float, stem: int, stages: Sequence[tuple[int, Sequence[int]]], last: int, note: str
) -> Structure:
    """`stages` holds (channels of the stream, hidden channels of each block that expands)."""
    widths = {"conv1": stem}
    for stage, (stream, hiddens) in enumerate(stages, start=1):
        widths[f"layer{stage}.0.project"] = stream
        for block, hidden in enumerate(hiddens):
            widths[f"layer{stage}.{block}.expand"] = hidden
    widths["conv_last"] = last
    return _structure("mobilenet_v2", width, widths, note)


def _resnet50(
    stem: int, stages: Sequence[tuple[int, Sequence[tuple[int, int]]]], note: str
) -> Structure:
    """`stages` holds (channels of the stream, (conv1, conv2) of each block)."""
    widths = {"conv1": stem}
    for stage, (stream, blocks) in enumerate(stages, start=1):
        widths[f"layer{stage}.0.conv3"] = stream
        for block, (conv1, conv2) in enumerate(blocks):
            widths[f"layer{stage}.{block}.conv1"] = conv1
            widths[f"layer{stage}.{block}.conv2"] = conv2
    return _structure("resnet50", 1.0, widths, note)


def _structure(model: str, width: float, widths: dict[str, int], note: str) -> Structure:
    return Structure(widths, model=model, model_kwargs={"width": width}, note=note)


def _mobilenet_v2_97m(third_of_stage_5: int, last: int, note: str) -> Structure:
    stages: list[tuple[int, list[int]]] = [
        (7, []),
        (10, [33, 32]),
        (17, [60, 59, 59]),
        (46, [154, 156, 194, 156]),
        (60, [270, 177, third_of_stage_5]),
        (144, [462, 576, 672]),
        (192, [864]),
    ]
    return _mobilenet_v2(1.0, 8, stages, last, note)


structures = Structures(
    {
        "resnet50-2.8G": _resnet50(
            51,
            [
                (223, [(38, 42), (47, 47), (47, 47)]),
                (461, [(103, 101), (92, 96), (93, 95), (100, 100)]),
                (
                    945,
                    [(218, 215), (200, 212), (208, 213), (209, 213), (213, 215), (212, 215)],
                ),
                (1735, [(459, 454), (455, 455), (457, 437)]),
            ],
            "Table 7: 2832.778M MACs.",
        ),
        "resnet50-2.2G": _resnet50(
            52,
            [
                (106, [(22, 22), (16, 16), (40, 16)]),
                (155, [(68, 56), (32, 68), (56, 56), (80, 92)]),
                (
                    1024,
                    [(256, 256), (106, 106), (131, 256), (131, 256), (256, 256), (256, 256)],
                ),
                (2048, [(512, 512), (512, 461), (512, 512)]),
            ],
            "Released with the paper's code: 2194M MACs.",
        ),
        "mobilenet_v2-300M": _mobilenet_v2(
            1.5,
            15,
            [
                (11, []),
                (19, [51, 57]),
                (34, [126, 105, 109]),
                (79, [246, 267, 291, 284]),
                (102, [486, 384, 422]),
                (231, [775, 980, 1082]),
                (417, [1411]),
            ],
            1812,
            "Table 8: 300.00M MACs. The table does not give conv_last; 1812 meets 300M.",
        ),
        "mobilenet_v2-210M": _mobilenet_v2(
            1.5,
            13,
            [
                (11, []),
                (19, [45, 63]),
                (30, [110, 118, 113]),
                (64, [223, 241, 256, 272]),
                (80, [415, 337, 361]),
                (191, [694, 858, 933]),
                (262, [1283]),
            ],
            1068,
            "Table 8: 210.0M MACs. The table does not give conv_last; 1068 meets 210M.",
        ),
        "mobilenet_v2-97M": _mobilenet_v2_97m(
            576,
            1280,
            "Table 8 as printed, with the full conv_last, which the table does not give: 113.0M "
            "MACs. No conv_last meets 97M, for the layers before it cost 99.69M: see "
            "mobilenet_v2-97M-repaired.",
        ),
        "mobilenet_v2-97M-repaired": _mobilenet_v2_97m(
            177,
            768,
            "Table 8 with two repairs: 97.60M MACs. The third block of stage 5 has the 177 hidden "
            "channels of the second instead of the printed 576, which is the value of block 6-2. "
            "conv_last, which the table does not give, is 768 (640 would give 96.26M).",
        ),
        "mobilenet_v2-87M": _mobilenet_v2(
            1.5,
            9,
            [
                (10, []),
                (16, [36, 16]),
                (21, [48, 41, 22]),
                (24, [60, 44, 272, 272]),
                (36, [310, 294, 351]),
                (80, [693, 96, 864]),
                (192, [960]),
            ],
            1280,
            "Released with the paper's code as its 87M network: 85.4M MACs.",
        ),
        "mobilenet_v2-59M": _mobilenet_v2(
            1.5,
            6,
            [
                (10, []),
                (12, [18, 16]),
                (15, [32, 41, 41]),
                (36, [98, 120, 120, 120]),
                (45, [158, 123, 123]),
                (96, [351, 480, 576]),
                (128, [768]),
            ],
            896,
            "Table 8: 58.75M MACs. The table does not give conv_last; 896 meets 59M. Block 3-1 "
            "takes the 12 channels that block 2-2 puts out, not the 16 printed.",
        ),
    }
)
