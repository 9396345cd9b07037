from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dmcp import models
from dmcp.errors import ConfigError, MissingDependencyError

NETS = """
from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from beside import WIDTH


@dataclass
class Options:
    classes: int


def plain():
    return nn.Linear(WIDTH, 2)


def with_classes(num_classes):
    return nn.Linear(WIDTH, Options(num_classes).classes)


def with_anything(**options):
    return nn.Linear(WIDTH, options["num_classes"])


def late():
    import beside_too
    return nn.Identity()


class Net(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.fc = nn.Linear(WIDTH, num_classes)


def number():
    return 3


def broken():
    raise RuntimeError("no weights\\nsecond line")


constant = 3
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 4")
    (tmp_path / "beside_too.py").write_text("")
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return path


@pytest.mark.parametrize(
    ("factory", "classes"), [("plain", 2), ("with_classes", 7), ("with_anything", 7)]
)
def test_a_function_of_a_file(nets: Path, factory: str, classes: int) -> None:
    model = models.build(f"{nets}:{factory}", num_classes=7)
    assert isinstance(model, nn.Linear)
    assert model.weight.shape == (classes, 4)


def test_a_class_of_a_file(nets: Path) -> None:
    first, second = (models.build(f"{nets}:Net", num_classes=5) for _ in range(2))
    assert first.fc.out_features == 5
    assert type(first) is type(second)
    assert not torch.equal(first.fc.weight, second.fc.weight)


def test_a_file_imports_from_its_folder_and_leaves_the_path_alone(nets: Path) -> None:
    before = list(sys.path)
    models.build(f"{nets}:late")
    assert sys.path == before


def test_two_files_of_one_name(nets: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "nets.py"
    other.parent.mkdir()
    other.write_text("from torch.nn import Identity as plain")
    assert isinstance(models.build(f"{nets}:plain"), nn.Linear)
    assert isinstance(models.build(f"{other}:plain"), nn.Identity)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (":nothing", "nothing must be a function, the file has no such name"),
        (":constant", "constant must be a function, the file has an object of type int"),
        (":number", "it gives an object of type int, not an nn.Module"),
        (":broken", r"RuntimeError: no weights \(.*nets.py:44\)$"),
        ("", "names no function of the file: .*nets.py:<function>"),
        (":", "names no function of the file"),
    ],
)
def test_bad_functions(nets: Path, factory: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        models.build(f"{nets}{factory}")
    assert str(nets) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_package", r"ModuleNotFoundError: No module .*bad.py:1\)"),
        ("def net(:", r"SyntaxError: .*\(bad.py, line 1\)"),
        ("raise ValueError", r"ValueError: .*bad.py:1\)"),
    ],
)
def test_files_that_do_not_run(tmp_path: Path, code: str, said: str) -> None:
    """And the next attempt runs the file again, repaired."""
    path = tmp_path / "bad.py"
    path.write_text(code)
    with pytest.raises(ConfigError, match=said):
        models.build(f"{path}:net")
    path.write_text("from torch.nn import Identity as net  # longer than all of the above")
    assert isinstance(models.build(f"{path}:net"), nn.Identity)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"there is no file {tmp_path}/none.py"):
        models.build(f"{tmp_path}/none.py:net")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(ConfigError, match="there is no file"):
        models.build(f"{tmp_path}/folder.py:net")


def test_a_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert models.resolve("nets.py:plain") == f"{tmp_path}/nets.py:plain"
    assert models.resolve(f"..{os.sep}nets.py:plain") == f"{tmp_path.parent}/nets.py:plain"
    for name in ("resnet18", "timm:resnet18", "torchvision:resnet18", "vgg", ""):
        assert models.resolve(name) == name
        assert not models.is_file(name)
    assert models.is_file("nets.py")


def test_only_the_package_s_own_take_options(nets: Path) -> None:
    with pytest.raises(ConfigError, match="takes no width: mobilenet_v2, resnet18, resnet50 do"):
        models.build(f"{nets}:plain", width=0.5)


def test_torchvision(zoo: torch.library.Library) -> None:
    with torch.device("meta"):
        model = models.build("torchvision:resnet18", num_classes=7)
    assert type(model).__module__ == "torchvision.models.resnet"
    assert model.fc.out_features == 7


def test_nothing_is_downloaded_for_a_backbone(
    zoo: torch.library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    with torch.device("meta"):
        model = models.build("torchvision:lraspp_mobilenet_v3_large", num_classes=7)
    assert model.classifier.low_classifier.out_channels == 7


def test_timm(zoo: torch.library.Library) -> None:
    with torch.device("meta"):
        model = models.build("timm:mobilenetv3_small_050", num_classes=7)
    assert type(model).__module__.startswith("timm.")
    assert model.classifier.out_features == 7


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torchvision:resnet19", "torchvision has no such one; close to it are .*resnet18"),
        ("torchvision:zzzzzzzz", r"torchvision has no such one; it has \d+ others"),
        ("torchvision:", "torchvision has no such one"),
        ("timm:mobilenetv3_smal", "timm has no such one; close to it are .*mobilenetv3_small"),
        ("timm:hf_hub:someone/net", "timm has no such one"),
        ("timm:resnet18.nobody", "Invalid pretrained tag"),
    ],
)
def test_unknown_names(zoo: torch.library.Library, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}'.*{said}"):
        models.build(name)


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_missing_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (package, f"{package}.models"):
        monkeypatch.setitem(sys.modules, module, None)
    said = rf"'{package}:resnet18' needs the package '{package}': pip install 'dmcp\[zoo\]'"
    with pytest.raises(MissingDependencyError, match=said):
        models.build(f"{package}:resnet18")


def test_a_package_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchvision, when it was built for another PyTorch."""
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(ConfigError, match=r"RuntimeError: operator nms .*timm.py:1\)"):
        models.build("timm:resnet18")
