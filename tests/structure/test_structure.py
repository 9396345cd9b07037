from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import dmcp
from dmcp.errors import ConfigError, StructureError
from dmcp.graph import ChannelGraph
from dmcp.structure import Provenance, Structure, installed
from dmcp.structure.document import LARGEST_FILE, check_schema, parse_json, schema

FULL = Structure(
    widths={"stem": 4, "side": 2, "head": 3},
    kept={"stem": (0, 1, 4, 5), "side": (1, 5)},
    model="resnet18",
    model_kwargs={"width": 0.125, "small_images": True},
    image=(3, 8, 8),
    classes=3,
    graph_hash="sha256:" + 64 * "0",
    channels={"stem": 8, "side": 6, "head": 3},
    budget={"macs": 12_345, "latency_ms": 0.25},
    metrics={"macs": 12_000, "params": 99},
    provenance=Provenance(
        versions={"dmcp": "0.1.0", "torch": "2.13.0"},
        seed=0,
        commit="0123abc",
        command="dmcp search --output 'a b'",
        device="cpu",
        seconds=0.0,
        images_forward=3,
        images_backward=0,
    ),
    note="[1,\n 2] äöü",
)
"""Every field has a value."""

DOCUMENT = FULL.to_json()


def changed(path: tuple[str | int, ...], value: Any) -> Any:
    """The document with one value replaced."""
    document = copy.deepcopy(DOCUMENT)
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return document


def everywhere(value: Any = DOCUMENT, path: tuple[str | int, ...] = ()) -> list[Any]:
    """Paths to every value in the document."""
    if not isinstance(value, dict | list):
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    deeper = ([(*path, key), *everywhere(item, (*path, key))] for key, item in items)
    return [each for paths in deeper for each in paths]


def written(structure: Structure, folder: Path) -> Path:
    path = folder / "deep" / "widths.json"
    structure.save(path)
    return path


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    tensors = expected.state_dict()
    assert model.state_dict().keys() == tensors.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=0)


def test_a_file_says_everything_that_the_structure_does(tmp_path: Path) -> None:
    path = written(FULL, tmp_path)
    assert Structure.load(path) == FULL
    text = path.read_text()
    assert '"stem": [0, 1, 4, 5]' in text
    document = json.loads(text)
    assert document == DOCUMENT
    jsonschema.Draft202012Validator(schema()).validate(document)
    assert [entry.name for entry in path.parent.iterdir()] == ["widths.json"]


def test_a_structure_of_a_network(graph: ChannelGraph, tmp_path: Path) -> None:
    """It has the network's hash and the costs that are counted there."""
    structure = Structure.of(graph, {"stem": 4}, model="resnet18")
    assert structure.widths == {"stem": 4, "side": 6, "head": 3}
    assert structure.channels == graph.widths()
    assert structure.metrics == {
        metric: dmcp.cost(graph, metric).of({"stem": 4}) for metric in ("macs", "params")
    }
    assert structure.provenance.versions == installed()
    jsonschema.Draft202012Validator(schema()).validate(structure.to_json())
    again = Structure.load(written(structure, tmp_path))
    assert again == structure
    assert_same(again.extract(graph), dmcp.extract(graph, {"stem": 4}))


def test_a_structure_of_chosen_channels(graph: ChannelGraph, tmp_path: Path) -> None:
    kept = {"stem": torch.tensor([7, 6, 0, 1]), "side": [5, 0, 2]}
    structure = Structure.load(written(Structure.of(graph, kept=kept), tmp_path))
    assert structure.widths == {"stem": 4, "side": 3, "head": 3}
    assert structure.kept == {"stem": (0, 1, 6, 7), "side": (0, 2, 5)}
    assert_same(structure.extract(graph), dmcp.extract(graph, kept=kept))
    assert structure.on(graph) == structure


NAMES = st.text(min_size=0, max_size=8)
NUMBERS = st.floats(min_value=0, allow_infinity=False) | st.integers(0, 10**15)


@st.composite
def structures(draw: st.DrawFn) -> Structure:
    channels = draw(st.dictionaries(NAMES, st.integers(1, 12), max_size=5))
    kept = {
        name: tuple(sorted(draw(st.sets(st.integers(0, width - 1), min_size=1))))
        for name, width in channels.items()
    }
    whole = {name: tuple(range(width)) for name, width in channels.items()}
    options = st.dictionaries(NAMES, st.booleans() | NUMBERS | st.text(), max_size=3)
    sides = st.integers(1, 16384), st.integers(1, 999)
    return Structure(
        widths={name: len(indices) for name, indices in kept.items()},
        kept=kept if draw(st.booleans()) or kept == whole else None,
        model=draw(st.none() | st.text(min_size=1)),
        model_kwargs=draw(options),
        image=draw(st.none() | st.tuples(st.integers(1, 16), *sides)),
        classes=draw(st.none() | st.integers(1, 10**6)),
        graph_hash=draw(st.none() | st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True)),
        channels=channels if draw(st.booleans()) else {},
        budget=draw(st.dictionaries(NAMES, NUMBERS, max_size=2)),
        metrics=draw(st.dictionaries(NAMES, NUMBERS, max_size=2)),
        provenance=Provenance(seed=draw(st.none() | st.integers()), device=draw(st.none() | NAMES)),
        note=draw(st.text()),
    )


FAST = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FAST
@given(structures())
def test_what_is_saved_is_loaded(tmp_path: Path, structure: Structure) -> None:
    assert Structure.load(written(structure, tmp_path)) == structure
    jsonschema.Draft202012Validator(schema()).validate(structure.to_json())


@FAST
@given(structures())
def test_what_is_sent_to_a_process_is_the_same_there(structure: Structure) -> None:
    assert pickle.loads(pickle.dumps(structure)) == structure
    assert copy.deepcopy(structure) == copy.copy(structure) == replace(structure) == structure


def test_a_copy_is_read_only() -> None:
    again = pickle.loads(pickle.dumps(FULL))
    assert (again, again.provenance.versions) == (FULL, FULL.provenance.versions)
    for each in (again.widths, again.kept, again.provenance.versions):
        with pytest.raises(TypeError, match="does not support item assignment"):
            each["stem"] = 3


def test_the_images_of_a_network_without_a_name_are_kept(
    graph: ChannelGraph, tmp_path: Path
) -> None:
    structure = Structure.of(graph, {}, image=(3, 96, 128), classes=10)
    again = Structure.load(written(structure, tmp_path))
    assert (again.model, again.image, again.classes) == (None, (3, 96, 128), 10)


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    structure = replace(
        FULL,
        widths={"stem": np.int64(4), "side": torch.tensor(2), "head": np.uint8(3)},
        kept={"stem": np.array([0, 1, 4, 5]), "side": [np.int32(1), np.int64(5)]},
        image=np.array([3, 8, 8]),
        classes=np.int16(3),
        channels={"stem": np.int64(8), "side": 6, "head": 3},
        budget={"macs": np.float32(12_345), "latency_ms": torch.tensor(0.25)},
        metrics={"macs": np.int64(12_000), "params": np.float64(99)},
    )
    assert structure == FULL
    assert Structure.load(written(structure, tmp_path)) == FULL


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"widths": {"stem": np.float64(4)}}, r"widths\['stem'\] must be an integer, got 4.0"),
        ({"widths": {"stem": np.bool_(True)}}, r"widths\['stem'\] must be an integer, got True"),
        ({"widths": {"stem": np.array([4])}}, r"widths\['stem'\] must be an integer, got array"),
        ({"widths": {"stem": None}}, r"widths\['stem'\] must be an integer, got None"),
        ({"widths": {4: 4}}, "widths must have strings as names, got 4"),
        ({"kept": {"stem": [0.0, 1.0]}}, r"kept\['stem'\] must be a list of channel indices"),
        ({"kept": {"stem": "0145"}}, r"kept\['stem'\] must be a list of channel indices"),
        ({"kept": {"stem": [10**30]}}, r"kept\['stem'\] must be a list of channel indices"),
        ({"metrics": {"macs": 1j}}, r"metrics\['macs'\] must be a number, got 1j"),
        ({"metrics": {"macs": math.nan}}, r"metrics\['macs'\] must be at least 0, got nan"),
        ({"channels": {"stem": "8"}}, r"graph\['channels'\]\['stem'\] must be an integer, got '8'"),
        ({"image": ("a", 8, 8)}, r"model\['image'\]\[0\] must be an integer, got 'a'"),
        ({"model": ""}, r"model\['name'\] must have at least 1 characters, got ''"),
        ({"provenance": Provenance(seed=1.5)}, r"provenance\['seed'\] must be an integer, got 1.5"),
    ],
)
def test_an_attribute_that_no_file_could_hold_is_named(
    attributes: dict[str, Any], said: str
) -> None:
    with pytest.raises(StructureError, match=said):
        replace(FULL, **attributes)


def test_the_widths_files_of_before_are_read(graph: ChannelGraph, tmp_path: Path) -> None:
    path = tmp_path / "widths.json"
    path.write_text('{"widths": {"stem": 4, "side": 6, "head": 3}}')
    structure = Structure.load(path)
    assert structure == Structure({"stem": 4, "side": 6, "head": 3})
    assert structure.graph_hash is None
    assert structure.on(graph) == replace(Structure.of(graph, {"stem": 4}), provenance=Provenance())
    path.write_text('{"widths": {"body": 4}}')
    with pytest.raises(ConfigError, match="no unit is called 'body'"):
        Structure.load(path).check(graph)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**33), 2**33)
    | st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: not x.is_integer())
    | st.sampled_from(["", "x", "dmcp-structure", "sha256:" + 64 * "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=4,
)


@FAST
@given(st.sampled_from(everywhere()), VALUES)
def test_a_document_is_refused_if_and_only_if_the_schema_says_so(
    path: tuple[str | int, ...], value: Any
) -> None:
    document = changed(path, value)
    try:
        check_schema(document, schema())
    except StructureError:
        accepted = False
    else:
        accepted = True
    assert accepted == jsonschema.Draft202012Validator(schema()).is_valid(document)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("version",), 2, "version must be 1, got 2"),
        (("version",), True, "version must be 1, got True"),
        (("format",), "onnx", "format must be 'dmcp-structure', got 'onnx'"),
        (("widths",), [], "widths must be an object, got a list of 0"),
        (("widths", "stem"), "4", r"widths\['stem'\] must be an integer, got '4'"),
        (("widths", "stem"), 4.0, r"widths\['stem'\] must be an integer, got 4.0"),
        (("widths", "stem"), True, r"widths\['stem'\] must be an integer, got True"),
        (("widths", "stem"), 0, r"widths\['stem'\] must lie in 1..2147483647, got 0"),
        (("widths", "stem"), 10**30, r"widths\['stem'\] must lie in 1..2147483647"),
        (("widths", "head"), 9, r"widths\['head'\] must lie in 1..3, got 9"),
        (("widths", "body"), 1, r"widths\['body'\]: graph.channels has no such unit"),
        (("kept", "stem"), [0, 1], r"kept\['stem'\] has 2 channels, widths has 4"),
        (("kept", "stem"), [0, 1, 5, 4], r"kept\['stem'\] must ascend"),
        (("kept", "stem"), [0, 1, 1, 4], r"kept\['stem'\] must ascend"),
        (("kept", "stem", 2), -1, r"kept\['stem'\]\[2\] must lie in 0..2147483646, got -1"),
        (("kept", "body"), [0], r"kept\['body'\] has 1 channels, widths has no such unit"),
        (("graph", "hash"), "sha256:00", r"graph\['hash'\] must match .*, got 'sha256:00'"),
        (("model", "options", "width"), [1], r"model\['options'\]\['width'\] must be a boolean or"),
        (("model", "classes"), 2**31 - 1, r"model\['classes'\] must lie in 1..1000000, got 2147"),
        (("model", "image", 0), 1025, r"model\['image'\]\[0\] must lie in 1..1024, got 1025"),
        (("model", "image", 2), 2**31 - 1, r"model\['image'\]\[2\] must lie in 1..16384, got 2147"),
        (("model", "image"), [2, 16384, 16384], r"model\['image'\] must have at most 268,435,456 "),
        (("model", "image"), [3, 8], r"model\['image'\] must have 3 items, got a list of 2"),
        (("model", "nested"), {}, r"model\['nested'\] is unknown"),
        (("provenance", "seconds"), -1, r"provenance\['seconds'\] must be at least 0, got -1"),
        (("wdiths",), {}, "wdiths is unknown"),
        (("two\nlines" + 999 * "x",), {}, r"'two\\nlinesxx.*\.\.\.x+' is unknown"),
        (("widths", 9 * "features.conv"), 0, r"widths\['(features.conv){9}'\] must lie in 1.."),
    ],
)
def test_the_field_that_is_wrong_is_named(
    tmp_path: Path, path: tuple[str | int, ...], value: Any, said: str
) -> None:
    file = tmp_path / "widths.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(StructureError, match=f"widths.json: {said}") as raised:
        Structure.load(file)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "not readable as JSON"),
        (b"\xff\xfe\x00", "not readable as JSON"),
        (b"[1]", "it must be an object, got a list of 1"),
        (b'{"format": "dmcp-structure", "version": 1}', "widths is missing"),
        (b'{"widths": {"stem": NaN}}', "NaN is no number in JSON"),
        (b'{"widths": {"stem": -Infinity}}', "-Infinity is no number in JSON"),
        (b'{"widths": {"stem": 1e999}}', "'1e999' is no finite number"),
        (b'{"widths": {"stem": 1, "stem": 2}}', "'stem' is there twice"),
        (b'{"widths": {}, "widths": {}}', "'widths' is there twice"),
        (b'{"widths": {"stem": ' + b"9" * 5000 + b"}}", "not readable as JSON"),
        (b'{"widths": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_document_is_refused(tmp_path: Path, text: bytes, said: str) -> None:
    file = tmp_path / "widths.json"
    file.write_bytes(text)
    with pytest.raises(StructureError, match=said):
        Structure.load(file)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StructureError, match="there is no structure file"):
        Structure.load(tmp_path / "none.json")
    with pytest.raises(StructureError, match="Is a directory"):
        Structure.load(tmp_path)
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)  # sparse
    with pytest.raises(StructureError, match="over 67,108,864 bytes"):
        Structure.load(tmp_path / "huge.json")


def test_a_part_of_a_file_is_refused(tmp_path: Path) -> None:
    data = written(FULL, tmp_path).read_bytes().rstrip()
    for length in range(0, len(data), 7):
        with pytest.raises(StructureError):
            parse_json(data[:length])


@FAST
@given(st.integers(0, 10**6), st.binary(min_size=0, max_size=3))
def test_an_altered_file_is_a_structure_or_refused(
    tmp_path: Path, place: int, altered: bytes
) -> None:
    path = written(FULL, tmp_path)
    data = path.read_bytes()
    place %= len(data)
    path.write_bytes(data[:place] + altered + data[place + len(altered) :])
    try:
        Structure.load(path).to_json()
    except StructureError as error:
        said = str(error)
    else:
        said = f"{path}: "
    assert said.startswith(f"{path}: ")


@pytest.mark.parametrize(
    "attributes", [{"metrics": {"macs": math.inf}}, {"model": "x", "model_kwargs": {"at": (1, 2)}}]
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, attributes: dict[str, Any]) -> None:
    path = tmp_path / "widths.json"
    with pytest.raises(StructureError):
        Structure({"stem": 1}, **attributes).save(path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"classes": 4}, r"of other width: head \(3, here 4\) \("),
        ({"kernel": 1}, "the same units, but tied or shaped in another way"),
        ({"reverse": True}, "the same units, but tied or shaped in another way"),
    ],
)
def test_another_network_is_refused(
    graph: ChannelGraph, block: type[Any], arguments: dict[str, Any], said: str
) -> None:
    structure = Structure.of(graph, {"stem": 4})
    other = dmcp.trace(block(**arguments), torch.zeros(2, 3, 8, 8))
    theirs = Structure.of(other, {}).graph_hash
    with pytest.raises(StructureError, match=said) as raised:
        structure.extract(other)
    assert f"(its graph is {structure.graph_hash}, this network's {theirs})" in str(raised.value)


def test_units_that_differ_are_named(graph: ChannelGraph) -> None:
    names = {f"layer{n}": 8 for n in range(7)}
    other = replace(FULL, widths=names, kept=None, channels={**names, "side": 7})
    said = (
        r"missing here: layer0, layer1, layer2, layer3, layer4 and 2 more; "
        r"unknown to it: stem, head; of other width: side \(7, here 6\) "
    )
    with pytest.raises(StructureError, match=said):
        other.check(graph)


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({"stem": [0, 2]}, "2 consecutive channels are kept or dropped together"),
        ({"stem": [6, 7, 8, 9]}, r"indices must lie in 0..7"),
        ({"side": [-1, 2]}, r"indices must lie in 0..5"),
        ({"side": []}, r"widths\['side'\] must lie in 1..6, got 0"),
        ({"side": [0.5]}, "must be a list of channel indices"),
        ({"head": [0, 1]}, "the model's outputs"),
        ({"body": [0]}, "no unit is called 'body'"),
    ],
)
def test_channels_that_a_network_cannot_keep_are_refused(
    graph: ChannelGraph, kept: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        Structure.of(graph, kept=kept)


def test_kept_channels_say_all_that_goes(graph: ChannelGraph) -> None:
    structure = Structure({"stem": 4, "side": 3}, kept={"stem": [0, 1, 2, 3]})
    with pytest.raises(StructureError, match=r"kept\['side'\] is missing, for its width is 3"):
        structure.extract(graph)
    with pytest.raises(StructureError, match="either widths or kept"):
        Structure.of(graph)
