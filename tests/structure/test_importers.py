"""Files in the formats of others; what their own code would make of them is in the numbers: the
MACs that they publish, and the paper's structures."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dmcp
from dmcp.errors import StructureError
from dmcp.graph import ChannelGraph
from dmcp.structure import Structure
from dmcp.structure.document import LARGEST_FILE
from dmcp.structure.importers import read_structure

Traced = Callable[..., ChannelGraph]

FAST = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def same(structure: Structure, widths: Mapping[str, int], outputs: int = 1000) -> bool:
    return structure.widths == {**widths, "fc": outputs}


# DMCP's sample.npy


def sample_of_mobilenet_v2(widths: Mapping[str, int]) -> dict[str, Any]:
    """As ``dump_mbv2_setting`` makes it."""
    stream = hidden = widths["conv1"]
    sample: dict[str, Any] = {"conv1": stream}
    for number, name in enumerate(
        f"layer{stage}.{block}"
        for stage, blocks in enumerate([1, 2, 3, 4, 3, 3, 1], start=1)
        for block in range(blocks)
    ):
        block = {}
        if number:
            hidden = widths[f"{name}.expand"]
            block["conv1"] = (stream, np.int64(hidden))
        out = widths[f"{name.partition('.')[0]}.0.project"]
        block |= {"conv2": (hidden, hidden), "conv3": (np.int32(hidden), out)}
        sample[str(number)] = block
        stream = out
    return {**sample, "conv_last": (stream, widths["conv_last"])}


def sample_of_resnet50(widths: Mapping[str, int]) -> dict[str, Any]:
    """As ``dump_resnet_setting`` makes it."""
    stream = widths["conv1"]
    sample: dict[str, Any] = {"conv1": stream, "fc": widths["layer4.0.conv3"]}
    for stage, blocks in enumerate([3, 4, 6, 3], start=1):
        layer = sample[f"layer{stage}"] = {}
        out = widths[f"layer{stage}.0.conv3"]
        for block in range(blocks):
            first, second = (widths[f"layer{stage}.{block}.conv{n}"] for n in (1, 2))
            ends = (stream, first), (first, second), (second, out)
            layer[str(block)] = dict(zip(("conv1", "conv2", "conv3"), ends, strict=True))
            stream = out
    return sample


@pytest.mark.parametrize(
    ("name", "sample_of"),
    [("mobilenet_v2-87M", sample_of_mobilenet_v2), ("resnet50-2.2G", sample_of_resnet50)],
)
def test_a_sample_of_dmcp(
    tmp_path: Path, traced: Traced, name: str, sample_of: Callable[..., dict[str, Any]]
) -> None:
    published = dmcp.structures[name]
    graph = traced(published.model, **published.model_kwargs)
    np.save(tmp_path / "sample.npy", sample_of(published.widths))  # type: ignore[arg-type]
    structure = read_structure(tmp_path / "sample.npy", graph)
    assert same(structure, published.widths)
    assert structure.metrics["macs"] == dmcp.cost(graph, "macs").of(published.widths)
    assert Structure.from_json(structure.to_json()).on(graph) == structure


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            ["5", "conv1", (24, 41)],
            "the input of block 5, conv1 has 24 channels, but the output of block 3, conv3, which "
            "unit 'layer3.0.project' ties to it, leaves 21",
        ),
        (["5", "conv3", (41, 0)], "block 5, conv3 must lie in 1.."),
        (["conv_last", (192, 1921)], "the output of conv_last has 1921 channels of 1920"),
        (["17", {}], "the network has no layer or block '17'"),
        (["5", "conv4", (1, 1)], "block 5 must be a dict of conv1, conv2, conv3"),
        (["5", "conv1", (1, 1, 1)], "block 5, conv1 must have two numbers"),
        (["conv1", 9.0], "conv1 must be an int, got an object of type float"),
        (["conv1", True], "conv1 must be an int, got an object of type bool"),
        (["fc", 9], "fc has 9 channels, but the output of conv_last"),
        (["layer1", {"0": {"conv1": (1, 1)}}], "the network has no layer 'layer1.0.conv1'"),
        ([3, {}], "names of layers must be strings"),
    ],
)
def test_the_first_layer_of_a_sample_that_does_not_fit_is_named(
    tmp_path: Path, traced: Traced, changed: list[Any], said: str
) -> None:
    sample = sample_of_mobilenet_v2(dmcp.structures["mobilenet_v2-87M"].widths)
    *keys, last, value = changed
    place = sample
    for key in keys:
        place = place[key]
    place[last] = value
    np.save(tmp_path / "sample.npy", sample)  # type: ignore[arg-type]
    with pytest.raises(StructureError, match=r"sample\.npy: ") as raised:
        read_structure(tmp_path / "sample.npy", traced("mobilenet_v2", 1.5))
    assert said in str(raised.value)


class Malicious:
    """Pickled as a call that makes a file."""

    def __init__(self, function: Callable[..., Any], *arguments: str) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", ["system", "eval", "exec", "getattr"])
def test_a_malicious_sample_is_refused(
    tmp_path: Path, graph: ChannelGraph, function: str, protocol: int
) -> None:
    """Before it runs; NumPy runs it."""
    mark, path = tmp_path / "mark", tmp_path / "sample.npy"
    call = {
        "system": Malicious(os.system, f"touch {mark}"),
        "eval": Malicious(eval, f"open({str(mark)!r}, 'w')"),
        "exec": Malicious(exec, f"open({str(mark)!r}, 'w')"),
        "getattr": Malicious(getattr, "", "upper"),
    }[function]
    array = np.array({"conv1": call}, dtype=object)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|O", "fortran_order": False, "shape": ()}
    )  # type: ignore[arg-type]
    path.write_bytes(header.getvalue() + pickle.dumps(array, protocol))
    with pytest.raises(StructureError, match=r"the pickle names \w+\.\w+: nothing of it was run"):
        read_structure(path, graph)
    assert not mark.exists()
    if function != "getattr":
        np.load(path, allow_pickle=True)
        assert mark.exists()


PICKLES = {
    "memo": b"\x80\x03Nr\xff\xff\xff\x7f.",
    "length": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00.",
    "persistent": b"Pother\n.",
    "extension": b"\x80\x02\x82\x01.",
    "class changed": b"cnumpy\ndtype\n}X\x01\x00\x00\x00aK\x01sb.",
    "plain": pickle.dumps({"conv1": 3}),
    "empty": b"",
    "large": b"\x80\x03" + 2**20 * b"0" + b".",
    "deep key": b"\x80\x03}N" + 300_000 * b"\x85" + b"K\x01s.",
    "deep": b"\x80\x03" + 10_000 * b"(" + b"N" + 10_000 * b"t" + b".",
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_is_no_array_is_refused(
    tmp_path: Path, graph: ChannelGraph, name: str
) -> None:
    path = tmp_path / "sample.npy"
    np.save(path, {})  # type: ignore[arg-type]
    head = path.read_bytes().partition(b"\n")[0] + b"\n"
    path.write_bytes(head + PICKLES[name])
    with pytest.raises(StructureError, match=r"sample\.npy: "):
        read_structure(path, graph)


def test_an_array_of_numbers_is_refused(tmp_path: Path, graph: ChannelGraph) -> None:
    np.save(tmp_path / "sample.npy", np.arange(3))
    with pytest.raises(StructureError, match=r"it holds \[3\] items of int64, not one object"):
        read_structure(tmp_path / "sample.npy", graph)


SCALAR, DTYPE = b"cnumpy._core.multiarray\nscalar\n", b"cnumpy\ndtype\n"


@pytest.mark.parametrize("scalar", [SCALAR + b")\x81", SCALAR + DTYPE + b")\x81U\x01a\x86R"])
def test_a_number_that_is_made_without_arguments_is_refused(
    tmp_path: Path, graph: ChannelGraph, scalar: bytes
) -> None:
    path = tmp_path / "sample.npy"
    np.save(path, {})  # type: ignore[arg-type]
    head = path.read_bytes().partition(b"\n")[0] + b"\n"
    array = b"\x80\x02cnumpy._core.multiarray\n_reconstruct\n)R(K\x01)" + DTYPE + b")R\x89]"
    path.write_bytes(head + array + b"}U\x05conv1" + scalar + b"satb.")
    with pytest.raises(StructureError, match="conv1 must be an int, got an object of type Scalar"):
        read_structure(path, graph)


@FAST
@given(st.integers(0, 10**6), st.binary(max_size=3), st.booleans())
def test_an_altered_sample_is_refused_or_read(
    tmp_path: Path, graph: ChannelGraph, place: int, altered: bytes, cut: bool
) -> None:
    path = tmp_path / "sample.npy"
    np.save(path, {"conv1": np.int64(9), "0": {"conv2": (9, 9)}})  # type: ignore[arg-type]
    data = path.read_bytes()
    place %= len(data)
    path.write_bytes(data[:place] + altered + (b"" if cut else data[place + len(altered) :]))
    with pytest.raises(StructureError):  # it never fits this network
        read_structure(path, graph)


# MMRazor's channel configurations


def entry(choice: float, count: int, **more: Any) -> dict[str, Any]:
    arguments = {"num_channels": count, "choice_mode": "number", "divisor": 1, "min_value": 1}
    return {"init_args": {**arguments, "min_ratio": 0.5}, "choice": choice, **more}


def configuration(units: Mapping[str, Any]) -> dict[str, Any]:
    config = {"type": "DMCPChannelUnit", "default_args": {"choice_mode": "number"}, "units": units}
    return {"type": "DMCPChannelMutator", "channel_unit_cfg": config, "parse_cfg": {}}


def named_as_in_mmcls(unit: str) -> str:
    """A layer of MobileNetV2 in MMClassification."""
    if unit in ("conv1", "conv_last"):
        return f"backbone.{'conv2' if unit == 'conv_last' else unit}.conv"
    block, _, layer = unit.rpartition(".")
    place = ["expand", "depthwise", "project"].index(layer) - (block == "layer1.0")
    return f"backbone.{block}.conv.{place}.conv"


def test_a_published_configuration_of_mmrazor(tmp_path: Path, traced: Traced) -> None:
    """DMCP_MBV2_100M.json, which is this structure, names the channels of a narrower network."""
    graph, published = traced("mobilenet_v2", 1.5), dmcp.structures["mobilenet_v2-87M"].widths
    units = {
        f"{named_as_in_mmcls(name)}_(0, {channels})_{channels}": entry(published[name], channels)
        for name, channels in ((name, full * 2 // 3) for name, full in graph.widths().items())
        if name in published
    }
    structure = read_structure(write(tmp_path / "fix.json", configuration(units)), graph)
    assert same(structure, published)
    assert same(read_structure(write(tmp_path / "units.json", units), graph), published)


def place(name: str, **more: int) -> dict[str, Any]:
    return {"name": name, "start": 0, "end": 8, "is_output_channel": True, **more}


def test_units_of_mmrazor_that_list_their_channels(tmp_path: Path, graph: ChannelGraph) -> None:
    stem = {
        "output_related": [place("stem"), place("norm"), place("grouped")],
        "input_related": [place("side"), place("head")],
    }
    side = {"output_related": [{"name": "side"}], "input_related": [place("head", start=8, end=14)]}
    units = {
        "stem_(0, 8)_8": entry(0.5, 8, channels=stem),
        "side_(0, 6)_6": entry(3, 6, channels=side),
    }
    path = write(tmp_path / "fix.json", configuration(units))
    assert read_structure(path, graph).widths == {"stem": 4, "side": 3, "head": 3}


@pytest.mark.parametrize(
    ("units", "said"),
    [
        ({"body_(0, 8)_8": entry(4, 8)}, "body_(0, 8)_8: the network has no layer 'body'"),
        ({"side_(0, 6)_6": entry(7, 6)}, "side_(0, 6)_6: 7 channels of 6"),
        ({"side_(0, 8)_8": entry(0.5, 8)}, "side_(0, 8)_8: 8 channels, 6 here"),
        (
            {"stem_(0, 8)_8": entry(4, 8), "norm_(0, 8)_8": entry(6, 8)},
            "norm_(0, 8)_8: 6 channels, but unit 'stem', which it belongs to, has 4 already",
        ),
        (
            {"stem_(0, 8)_8": entry(4, 8, channels={"input_related": [place("head", end=9)]})},
            "stem_(0, 8)_8, head: these channels of the layer are not those of one unit",
        ),
        (
            {
                "stem_(0, 8)_8": entry(
                    4, 8, channels={"output_related": [place("stem"), {"name": "side", "end": 6}]}
                )
            },
            "stem_(0, 8)_8: its channels belong to several units here: side, stem",
        ),
        (
            {"stem_(0, 8)_8": entry(4, 8, channels={"input_related": [place("stem")]})},
            "stem_(0, 8)_8, stem: the inputs of the network do not shrink",
        ),
        ({"stem_(0, 8)_8": {"init_args": {}}}, "units['stem_(0, 8)_8']['choice'] is missing"),
        ({"stem_(0, 8)_8": entry(-1, 8)}, "['choice'] must lie in 0..2147483647, got -1"),
        ({"stem": entry(4, 8)}, "stem: neither its name nor its channels say which layer it is"),
        ([], "units must be an object, got a list of 0"),
    ],
)
def test_a_unit_of_mmrazor_that_does_not_fit_is_named(
    tmp_path: Path, graph: ChannelGraph, units: Any, said: str
) -> None:
    path = write(tmp_path / "fix.json", configuration(units))
    with pytest.raises(StructureError) as raised:
        read_structure(path, graph)
    assert str(raised.value).startswith(f"{path}: ")
    assert said in str(raised.value)


# AutoSlim's lists


AUTOSLIM = """
model: models.autoslim_mobilenet_v2
width_mult_list: [1, 2]
channel_num_list:
  - [8, 8, 96, 16, 96, 16, 96, 24, 144, 24, 144, 24, 144, 48, 288, 48, 288, 48, 288, 48, 288, 64, 432, 64, 432, 64, 648, 176, 720, 176, 720, 176, 1440, 280, 1920, 1000]  # 207M, dynamic 12
  # another
  - [8, 8, 96, 16, 96, 16, 96, 24, 144, 24, 144, 24, 144, 56, 288, 56, 288, 56, 288, 56, 288, 96, 432, 96, 432, 96, 864, 240, 1440, 240, 960, 240, 1440, 480, 1920, 1000]  # 305M, dynamic 12
data_transforms: imagenet1k_mobile
lists:
  - [1, 2]
"""  # noqa: E501
RESNET_570M = json.loads(
    """[24, 72, 8, 16, 72, 16, 16, 72, 8, 8, 72,
        240, 16, 24, 240, 16, 24, 240, 16, 16, 240, 16, 24, 240,
        704, 72, 72, 704, 48, 72, 704, 48, 72, 704, 72, 72, 704, 48, 48, 704, 48, 48, 704,
        1680, 280, 240, 1680, 120, 200, 1680, 280, 280, 1680, 1000]"""
)


def test_the_lists_of_autoslim_cost_what_it_says(tmp_path: Path, traced: Traced) -> None:
    path = tmp_path / "autoslim.yml"
    path.write_text(AUTOSLIM)
    for row, macs in ((0, 207), (1, 305)):
        structure = read_structure(Path(f"{path}#{row}"), traced("mobilenet_v2", 1.5))
        assert round(structure.metrics["macs"] / 1e6) == macs
    listed = write(tmp_path / "list.json", RESNET_570M)
    structure = read_structure(listed, traced("resnet50"))
    assert round(structure.metrics["macs"] / 1e6) == 570
    assert structure.widths["layer4.0.conv3"] == 1680
    with pytest.raises(StructureError, match="it has 2 lists: name one, <file>#0 … #1"):
        read_structure(path, traced("mobilenet_v2", 1.5))
    with pytest.raises(StructureError, match="it has 2 lists, no number 2"):
        read_structure(Path(f"{path}#2"), traced("mobilenet_v2", 1.5))


@pytest.mark.parametrize(
    ("place", "channels", "said"),
    [
        (1, 80, r"number 4 of the list \(layer1.0.conv3\) has 72 channels, but number 1 of the "
                r"list \(layer1.0.downsample.0\), which unit 'layer1.0.conv3' ties to it, le"),
        (8, 65, r"number 8 of the list \(layer1.2.conv1\) has 65 channels of 64"),
        (8, 0, r"channel_num_list\[0\]\[8\] must be at least 1, got 0"),
        (8, 1.5, r"channel_num_list\[0\]\[8\] must be an integer, got 1.5"),
        (8, None, "the list has 52 convolutions and the classes, the network has 53"),
    ],
)  # fmt: skip
def test_the_first_number_of_autoslim_that_does_not_fit_is_named(
    tmp_path: Path, traced: Traced, place: int, channels: float | None, said: str
) -> None:
    numbers: list[Any] = list(RESNET_570M)
    numbers[place : place + 1] = [] if channels is None else [channels]
    with pytest.raises(StructureError, match=said):
        read_structure(write(tmp_path / "list.json", numbers), traced("resnet50"))


def test_yaml_without_lists_is_refused(tmp_path: Path, graph: ChannelGraph) -> None:
    path = tmp_path / "other.yml"
    path.write_text("channel_num_list:\n  - [1, 2]\n  - [3,\n     4]\n")
    with pytest.raises(StructureError, match=r"'- \[3,' is no list in brackets on one line"):
        read_structure(path, graph)
    path.write_text("num_gpus: 4\nlists:\n  - [1, 2]\n")
    with pytest.raises(StructureError, match="it has no lists under channel_num_list"):
        read_structure(path, graph)


# Torch-Pruning's history


HISTORY: list[Any] = [
    ["side", True, [1, 3]],
    ["side", True, [0]],  # of 0 2 4 5: channel 0
    ["stem", True, [0, 4]],  # what the grouped convolution keeps or drops together
    ["head", False, [7]],  # of 1 2 3 5 6 7, 2 4 5: channel 4 of side
]


def test_a_history_of_torch_pruning(tmp_path: Path, graph: ChannelGraph) -> None:
    structure = read_structure(write(tmp_path / "history.json", HISTORY), graph)
    assert structure.widths == {"stem": 6, "side": 2, "head": 3}
    small, whole = structure.extract(graph), graph.model
    left = torch.tensor([1, 2, 3, 5, 6, 7])
    assert torch.equal(small.stem.weight, whole.stem.weight[left])
    assert torch.equal(small.side.weight, whole.side.weight[[2, 5]][:, left])
    assert torch.equal(small.head.weight, whole.head.weight[:, [*left, 8 + 2, 8 + 5]])
    torch.save({"model": small.state_dict(), "pruning": HISTORY}, tmp_path / "pruned.pth")
    assert read_structure(tmp_path / "pruned.pth", graph) == structure
    torch.save([tuple(row) for row in HISTORY], tmp_path / "history.pt")
    assert read_structure(tmp_path / "history.pt", graph) == structure


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (["body", True, [0]], "history[1], body: the network has no layer 'body'"),
        (["side", True, [4]], "history[1], side drops channel 4 of 4 that are left"),
        (["stem", True, [0]], "history[1], stem drops 1 channels, but with what is tied to them 2"),
        (["stem", False, [0]], "history[1], stem: the inputs of the network do not shrink"),
        (["side", True, [0, 1, 2, 3]], "widths['side'] must lie in 1..6, got 0"),
        (["side", 1, [0]], "history[1][1] must be a boolean, got 1"),
        (["side", True, 0], "history[1][2] must be an array, got 0"),
        (["side", True, [-1]], "history[1][2][0] must lie in 0..2147483647, got -1"),
        (["side", True], "history[1] must have 3 items, got a list of 2"),
        (["head", True, [0]], "the model's outputs"),
    ],
)
def test_a_step_of_torch_pruning_that_does_not_fit_is_named(
    tmp_path: Path, graph: ChannelGraph, row: list[Any], said: str
) -> None:
    path = write(tmp_path / "history.json", [HISTORY[0], row])
    with pytest.raises(dmcp.ConfigError) as raised:
        read_structure(path, graph)
    assert said in str(raised.value)


def test_a_torch_file_of_code_is_refused(tmp_path: Path, graph: ChannelGraph) -> None:
    mark, path = tmp_path / "mark", tmp_path / "history.pth"
    torch.save({"pruning": Malicious(os.system, f"touch {mark}")}, path)
    with pytest.raises(StructureError, match="it is no torch file of plain data"):
        read_structure(path, graph)
    path.write_bytes(b"nothing")
    with pytest.raises(StructureError, match="it is no torch file of plain data"):
        read_structure(path, graph)
    torch.save({"model": {}}, path)
    with pytest.raises(StructureError, match="history must be an array, got None"):
        read_structure(path, graph)
    assert not mark.exists()


def archive(folder: Path, parts: Sequence[tuple[str, bytes]], compression: int = 0) -> Path:
    """Like a file of ``torch.save``."""
    path = folder / "history.pth"
    with zipfile.ZipFile(path, "w", compression) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two parts of one name
        for name, data in [("history/version", b"3"), *parts]:
            file.writestr(name, data)
    return path


def test_an_archive_is_read_as_torch_writes_it(tmp_path: Path, graph: ChannelGraph) -> None:
    """Then what is refused below is refused for what is said there."""
    path = archive(tmp_path, [("history/data.pkl", pickle.dumps(HISTORY, 2))])
    assert read_structure(path, graph).widths == {"stem": 6, "side": 2, "head": 3}


@pytest.mark.parametrize(
    ("pickles", "compression", "said"),
    [
        ([PICKLES["deep key"]], 0, "the pickle has over 16,384 tuples"),
        ([PICKLES["memo"]], 0, "the pickle has a memo of 2147483647 entries"),
        ([PICKLES["large"]], 0, "the pickle has over 1,048,576 bytes"),
        ([pickle.dumps(HISTORY, 2)[:-1]], 0, "pickle exhausted before seeing STOP"),
        (2 * [pickle.dumps(HISTORY, 2)], 0, "it has 2 parts data.pkl, not one"),
        ([], 0, "it has 0 parts data.pkl, not one"),
        ([pickle.dumps(HISTORY, 2)], zipfile.ZIP_DEFLATED, "its parts are compressed"),
    ],
)
def test_a_torch_file_that_would_crash_torch_is_refused(
    tmp_path: Path, graph: ChannelGraph, pickles: list[bytes], compression: int, said: str
) -> None:
    path = archive(tmp_path, [("history/data.pkl", each) for each in pickles], compression)
    with pytest.raises(StructureError, match=f"it is no torch file of plain data: {said}"):
        read_structure(path, graph)


def test_a_tuple_that_is_as_deep_as_is_read_is_a_key(tmp_path: Path, graph: ChannelGraph) -> None:
    """It does not overflow the stack."""
    deepest = b"\x80\x02}N" + 2**14 * b"\x85" + b"K\x01s."
    with pytest.raises(StructureError, match="history must be an array, got None"):
        read_structure(archive(tmp_path, [("history/data.pkl", deepest)]), graph)


def test_a_torch_file_that_is_too_large_is_refused(tmp_path: Path, graph: ChannelGraph) -> None:
    with (tmp_path / "history.pth").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)  # sparse
    with pytest.raises(StructureError, match="over 67,108,864 bytes"):
        read_structure(tmp_path / "history.pth", graph)


def test_a_row_of_a_file_without_lists_is_refused(tmp_path: Path, graph: ChannelGraph) -> None:
    write(tmp_path / "history.json", HISTORY)
    Structure({"stem": 4}).save(tmp_path / "widths.json")
    np.save(tmp_path / "sample.npy", {})  # type: ignore[arg-type]
    torch.save(HISTORY, tmp_path / "history.pth")
    for path in tmp_path.iterdir():
        with pytest.raises(StructureError, match="it is no file of several lists, and has no nu"):
            read_structure(Path(f"{path}#1"), graph)


def test_a_missing_file_is_refused(tmp_path: Path, graph: ChannelGraph) -> None:
    for name in ("none.npy", "none.pth", "none.yml#1", "none.json"):
        with pytest.raises(StructureError, match="there is no structure file"):
            read_structure(tmp_path / name, graph)
