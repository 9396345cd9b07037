from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import dmcp
from dmcp import recipes
from dmcp.cli import main
from dmcp.models import build

TINY = shlex.split("--model resnet18 --width 0.125 --batch-size 256 --device cpu --divisor 1")
SEARCH = ["search", *TINY, "--budget", "50%", "--search-epochs", "1", "--retrain-epochs", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished search."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main([*SEARCH, "--quiet", "--log-every", "1", "--output", str(folder)]) == 0
    return folder


def test_search_prints_a_table_and_its_progress(run, tmp_path, capsys):
    output = tmp_path / "run"
    assert main([*SEARCH, "--no-baselines", "--log-every", "1", "--output", str(output)]) == 0
    shown = capsys.readouterr()
    (row,) = (line for line in shown.out.splitlines() if "%" in line)
    top1 = table_of(run)[1]["top1"]
    assert "DMCP (expected sampling)" in row
    assert f"{top1:.2%}" in row
    warned, search, retraining = shown.err.splitlines()
    assert "above the budget at the end of the search" in warned
    assert "5/5" in search
    assert "E[macs]" in search
    assert "dmcp" in retraining


def table_of(run):
    return json.loads((run / "results.json").read_text())["networks"]


def test_quiet_prints_nothing(run, capfd):
    assert main([*SEARCH, "--quiet", "--output", str(run)]) == 0
    assert capfd.readouterr() == ("", "")


def test_json_prints_one_object(run, capfd):
    assert main([*SEARCH, "--json", "--output", str(run)]) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    (line,) = shown.out.splitlines()
    assert (
        json.loads(line)["networks"] == json.loads((run / "results.json").read_text())["networks"]
    )


def test_eval_reproduces_the_table(run, capfd):
    networks = table_of(run)
    assert main(["eval", str(run), "--json", "--device", "cpu"]) == 0
    assert json.loads(capfd.readouterr().out)["networks"] == networks
    assert main(["eval", str(run), "--json", "--network", "uniform"]) == 0
    assert json.loads(capfd.readouterr().out)["networks"] == networks[2:]
    assert main(["eval", str(run)]) == 0
    table = capfd.readouterr().out
    assert all(f"{row['top1']:.2%}" in table for row in networks)


def test_train_whole_and_with_widths(run, tmp_path, capfd):
    networks = table_of(run)
    command = shlex.split("train --model resnet18 --width 0.125 --batch-size 256 --epochs 1 --json")
    whole, pruned = tmp_path / "whole", tmp_path / "pruned"
    assert main([*command, "--output", str(whole)]) == 0
    (row,) = json.loads(capfd.readouterr().out)["networks"]
    assert (row["network"], row["macs"], row["top1"]) == (
        "dense",
        networks[0]["macs"],
        networks[0]["top1"],
    )
    widths = ["--widths", str(run / "widths.json")]
    assert main([*command, *widths, "--output", str(pruned)]) == 0
    (row,) = json.loads(capfd.readouterr().out)["networks"]
    assert (row["network"], row["macs"], row["top1"]) == (
        "pruned",
        networks[1]["macs"],
        networks[1]["top1"],
    )


COMPUTED = shlex.split("--precision bfloat16 --micro-batches 3 --quiet")


def test_precision_and_parts_reach_every_stage(run, tmp_path):
    """The command line decides them, else the recipe."""
    searched, trained = tmp_path / "searched", tmp_path / "trained"
    assert main([*SEARCH, "--no-baselines", *COMPUTED, "--output", str(searched)]) == 0
    assert main(["train", *TINY[:-2], "--epochs", "1", *COMPUTED, "--output", str(trained)]) == 0
    search, train = (json.loads((path / "config.json").read_text()) for path in (searched, trained))
    for options in (search["search"], search["train"], train["options"]):
        assert (options["precision"], options["micro_batches"]) == ("bfloat16", 3)
    default = json.loads((run / "config.json").read_text())
    for options in (default["search"], default["train"]):
        assert (options["precision"], options["micro_batches"]) == ("float32", 1)


def layer_macs(model, image):
    """Name -> MACs of every convolution and linear layer, by their shapes as they run."""
    macs = {}

    def count(name):
        def hook(module, inputs, output):
            positions = output[0].numel() // output.shape[1]
            macs[name] = module.weight.numel() * positions

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count(name))
    model.eval()(image)
    return macs


def test_excluded_units_are_left_alone(capsys):
    command = "inspect --model mobilenet_v2 --width 0.25 --data digits --json --exclude '*_last'"
    assert main(shlex.split(command)) == 0
    units = {unit["name"]: unit for unit in json.loads(capsys.readouterr().out)["units"]}
    assert not units["conv_last"]["searchable"]
    assert "excluded by '*_last'" in units["conv_last"]["reason"]
    assert sum(not unit["searchable"] for unit in units.values()) == 2
    assert main(shlex.split(command.replace("_last", "_first"))) == 2
    assert "no unit matches '*_first'" in capsys.readouterr().err


def test_inspect_json(capsys):
    command = "inspect --model mobilenet_v2 --width 0.25 --data digits --divisor 8 --json"
    assert main(shlex.split(command)) == 0
    found = json.loads(capsys.readouterr().out)
    model = build("mobilenet_v2", num_classes=10, in_channels=1, width=0.25, small_images=True)
    macs = layer_macs(model, torch.zeros(1, 1, 8, 8))
    total = sum(macs.values())
    assert found["costs"]["macs"] == total
    assert found["costs"]["params"] == sum(p.numel() for p in model.parameters())
    for unit in found["units"]:
        touched = {member.rsplit(":", 1)[0] for member in unit["members"]} & macs.keys()
        share = sum(macs[name] for name in touched) / total
        assert unit["share_of_macs"] == pytest.approx(share), unit["name"]
        assert unit["choices"][-1] == unit["channels"]
        assert all(width % 8 == 0 for width in unit["choices"][:-1])
    assert 1 < sum(unit["share_of_macs"] for unit in found["units"]) <= 2
    *others, last = found["units"]
    for unit in others:
        assert unit["searchable"] == (len(unit["choices"]) > 1) == (not unit["reason"])
    assert (last["name"], last["searchable"], last["choices"]) == ("fc", False, [10])
    assert "outputs" in last["reason"]
    members = {m.rsplit(":", 1)[0] for u in found["units"] if u["searchable"] for m in u["members"]}
    searchable = sum(macs[name] for name in members & macs.keys()) / total
    assert 0.5 < searchable < 1
    assert found["searchable_share_of_macs"] == pytest.approx(searchable)
    assert found["proof"]["structures"] > 0
    assert found["proof"]["refuted"] == {}


def test_inspect_table(capsys):
    command = "inspect --model resnet18 --width 0.125 --data digits --divisor 1 --groups 4"
    assert main(shlex.split(command)) == 0
    table = capsys.readouterr().out
    assert "layer4.0.conv1" in table
    assert "16…64 by 16" in table
    assert "macs 545,920" in table
    assert "outputs" in table
    assert "13 units, 12 searchable; 100.0% of the MACs" in table
    assert "proof: " in table


def test_inspect_a_structure(run, capsys):
    """The costs of what a search found."""
    command = shlex.split("inspect --model resnet18 --width 0.125 --data digits --json --widths")
    assert main([*command, str(run / "widths.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    row = table_of(run)[1]
    assert (found["costs"]["macs"], found["costs"]["params"]) == (row["macs"], row["params"])
    widths = json.loads((run / "widths.json").read_text())["widths"]
    assert {unit["name"]: unit["width"] for unit in found["units"]} == widths
    assert found["units"][0]["choices"] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_inspect_a_published_structure(capsys):
    """It says which network it prunes."""
    assert main(shlex.split("inspect --widths mobilenet_v2-59M --size 224 --json")) == 0
    found = json.loads(capsys.readouterr().out)
    published = dmcp.structures["mobilenet_v2-59M"].widths
    assert found["costs"]["macs"] == 58_753_779
    assert {unit["name"]: unit["width"] for unit in found["units"]} == {**published, "fc": 1000}


def test_train_a_published_structure(tmp_path, capfd):
    """With the recipe that was asked for, even if that is another network's."""
    command = "train --widths mobilenet_v2-59M --recipe resnet18-1.04G --epochs 1 --json"
    batch = shlex.split("--batch-size 719 --device cpu --log-every 1 --output")
    assert main([*shlex.split(command), *batch, str(tmp_path / "run")]) == 0
    (row,) = json.loads(capfd.readouterr().out)["networks"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert row["network"] == "pruned"
    assert row["params"] == 1_550_968 - 990 * (896 + 1) - 2 * 6 * 9
    assert config["network"]["model"] == "mobilenet_v2"
    assert config["network"]["model_options"] == {"width": 1.5}
    assert config["options"]["lr"]["peak"] == 0.8
    assert config["widths"] == {**dmcp.structures["mobilenet_v2-59M"].widths, "fc": 10}


@pytest.mark.parametrize("command", ["train --output run", "inspect"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            "--widths resnet50-2.8G --model resnet18",
            "--model is 'resnet18', but structure 'resnet50-2.8G' prunes a network whose model is "
            "'resnet50'",
        ),
        ("--widths mobilenet_v2-59M --width 1.0", "--width is 1.0, but structure"),
        ("--widths resnet50-1G", "must be a widths.json or one of resnet50-2.8G, "),
        ("--widths resnet50-1G", "got 'resnet50-1G': there is no such file"),
        ("--widths .", "cannot be read: Is a directory"),
    ],
)
def test_widths_that_are_no_structure_are_one_line(
    tmp_path, capfd, monkeypatch, command, options, said
):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(shlex.split(f"{command} {options}"), capfd)
    assert not list(tmp_path.iterdir())


TINY_FILE = """
from torch import nn

class Tiny(nn.Sequential):
    def __init__(self, num_classes, channels=3):
        super().__init__(
            nn.Conv2d(channels, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
        )

def grey(num_classes):
    return Tiny(num_classes, 1)

def two():
    return Tiny(2, 1)
"""


@pytest.fixture
def tiny_file(tmp_path, monkeypatch):
    """A file tiny.py in the working directory."""
    (tmp_path / "tiny.py").write_text(TINY_FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "tiny.py"


def test_inspect_a_file_and_draw_it(tiny_file, capsys):
    """Without data: of RGB images and 1000 classes."""
    command = shlex.split("inspect --model tiny.py:Tiny --size 10 --batch 3 --json --graph net.dot")
    assert main(command) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert shown.err == ""
    assert found["costs"]["macs"] == 64 * 27 * 8 + 8 * 1000
    assert [unit["name"] for unit in found["units"]] == ["0", "5"]
    assert found["units"][1]["channels"] == 1000
    assert r'label="0\nConv2d 8"' in tiny_file.with_name("net.dot").read_text()


def test_inspect_torchvision(zoo, capsys):
    assert main(shlex.split("inspect --model torchvision:resnet18 --size 32")) == 0
    table = capsys.readouterr().out
    assert "layer4.0.conv1" in table
    assert "13 units, 12 searchable" in table
    assert "params 11,6" in table


def test_inspect_timm_on_a_grid(zoo, capsys):
    command = "inspect --model timm:mobilenetv3_small_050 --size 32 --groups 3 --json"
    assert main(shlex.split(command)) == 0
    units = {unit["name"]: unit for unit in json.loads(capsys.readouterr().out)["units"]}
    assert units["blocks.0.0.se.conv_reduce"]["channels"] == 8
    assert all(len(unit["choices"]) <= 3 for unit in units.values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--model tiny.py:Tiny --graph net.png", "must be a file .dot or .svg, got 'net.png'"),
        ("--model tiny.py", "/tiny.py:<function>"),
        ("--model tiny.py:Large", "Large must be a function, the file has no such name"),
        ("--model none.py:Tiny", "there is no file"),
        ("--model tiny.py:Tiny --width 0.5", "takes no width"),
        ("--model tiny.py:Tiny --size 0", "0 is not in the range"),
        ("--model tiny.py:Tiny --batch 0", "0 is not in the range"),
        ("--model vgg", "unknown model 'vgg': the models are mobilenet_v2, resnet18, resnet50, "),
    ],
)
def test_what_cannot_be_inspected_is_one_line(tiny_file, capfd, options, said):
    assert said in refusal(["inspect", *shlex.split(options)], capfd)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("tiny.py:Tiny", "refuses images [1, 8, 8]: "),
        ("tiny.py:two", "must give 10 logits, the classes of the data, got [2]"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_one_line(tiny_file, capfd, model, said):
    command = shlex.split(f"train --model {model} --epochs 1 --device cpu --output run")
    assert said in refusal(command, capfd)
    assert not tiny_file.with_name("run").exists()


def test_a_model_in_a_file_from_another_folder(tiny_file, tmp_path, capfd, monkeypatch):
    """A run continues, and is evaluated, wherever one stands; never without naming the file."""
    options = (
        "--batch-size 256 --divisor 1 --groups 4 --budget 60% --search-epochs 1 --retrain-epochs 1"
    )
    search = ["search", *shlex.split(options), "--device", "cpu", "--json", "--no-baselines"]
    output = ["--output", str(tmp_path / "run")]
    assert main([*search, *output, "--model", "tiny.py:grey"]) == 0
    table = json.loads(capfd.readouterr().out)["networks"]
    assert table[0]["macs"] <= 0.6 * (36 * 9 * 8 + 80)
    weights = tmp_path / "run" / "weights" / "dmcp.safetensors"
    trained = weights.read_bytes()

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "run" / "results.json").unlink()
    weights.unlink()
    assert main([*search, *output, "--model", "../tiny.py:grey"]) == 0
    again = json.loads(capfd.readouterr().out)["networks"]
    assert [row["top1"] for row in again] == [row["top1"] for row in table]
    assert weights.read_bytes() == trained

    evaluate = ["eval", "../run", "--json", "--device", "cpu"]
    assert main([*evaluate, "--model", "../tiny.py:grey"]) == 0
    assert json.loads(capfd.readouterr().out)["networks"] == again
    tiny_file.write_text("raise SystemExit('the run folder ran code')")
    error = refusal(evaluate, capfd)
    assert "runs only if you name it" in error
    assert f"{tiny_file}:grey" in error


def png(path, size=(12, 12), color=(200, 20, 20)):
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new("RGB", size, color).save(path)


def image_folder(folder, classes=("cat", "dog"), count=12):
    for part in ("train", "test"):
        for name in classes:
            for index in range(count):
                png(folder / part / name / f"{index:02}.png", color=(9 * index, 20, len(name)))
    return str(folder)


def refusal(arguments, capfd):
    """The one line on stderr that a command ends with."""
    assert main(arguments) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("dmcp: ")
    assert shown.err.count("\n") == 1, shown.err
    return shown.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--budget 200%", "above the full network's 545,920"),
        ("--budget 1e12", "above the full network's"),
        ("--budget 1K", "below the narrowest network's"),
        ("--budget half", "must be a number, or a string such as '210M'"),
        ("--budget 1.2.3M", "got '1.2.3M'"),
        ("--budget -5", "must be positive and finite"),
        ("--budget nan", "must be positive and finite"),
        ("--budget 0", "must be positive and finite"),
        ("--budget-params 101%", "budget params='101%'"),
        ("--model vgg", "unknown model 'vgg': the models are"),
        ("--recipe imagenet", "unknown recipe 'imagenet'; there are digits"),
        ("--data nowhere", "unknown data 'nowhere': neither 'digits' nor a folder"),
        ("--search-epochs 0", "search_epochs must be at least 1, got 0"),
        ("--retrain-epochs 0", "retrain_epochs must be at least 1, got 0"),
        ("--batch-size 5000", "1438 training images are fewer than one batch of 5000"),
        ("--batch-size 1", "batch_size must be at least 2, got 1"),
        ("--batch-size many", "'many' is not a valid integer"),
        ("--retrain magic", "'magic' is not one of 'scratch', 'inherit', 'distil'"),
        ("--arch-data holdout --holdout 0.1", "fewer than one batch of 256"),
        ("--arch-data holdout", "needs a holdout above 0"),
        ("--holdout 1", "holdout must be at least 0 and below 1"),
        ("--image-size 4", "image_size must be 8 to 1024 pixels, got 4"),
        ("--width nan", "width is nan"),
        ("--groups 0", "groups must be an int of at least 1, got 0"),
        ("--divisor 0", "divisor must be an int of at least 1, got 0"),
        ("--precision half", "'half' is not one of 'float32', 'bfloat16', 'float16'"),
        ("--micro-batches 0", "micro_batches must be an int of at least 1, got 0"),
        ("--micro-batches 200", "micro_batches is 200: too many parts for a batch of 256 images"),
        ("--seed -1", "seed must not be negative, got -1"),
        ("--device tpu", "--device must be cpu, cuda or cuda:<number>, got 'tpu'"),
        ("--checkpoint-every 0", "checkpoint_every must be at least 1, got 0"),
        ("--log-every 0", "log_every must be at least 1, got 0"),
        ("--workers -1", "workers must be at least 0, got -1"),
        ("--colour red", "No such option"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capfd, options, said):
    output = tmp_path / "run"
    arguments = [*SEARCH, *shlex.split(options), "--output", str(output)]
    assert said in refusal(arguments, capfd)
    assert not output.exists()


def test_missing_options_are_one_line(tmp_path, capfd):
    output = ["--output", str(tmp_path / "run")]
    assert "search needs --budget" in refusal(["search", *TINY, *output], capfd)
    assert "--model is missing" in refusal(["search", "--budget", "50%", *output], capfd)
    assert "--output" in refusal(SEARCH, capfd)
    assert "No such command 'prune'" in refusal(["prune"], capfd)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line(run, tmp_path, capfd):
    output = ["--device", "cuda", "--output", str(tmp_path / "run")]
    assert "no CUDA GPU" in refusal([*SEARCH, *output], capfd)
    assert "no CUDA GPU" in refusal(["eval", str(run), "--device", "cuda:1"], capfd)


def test_an_output_that_cannot_be_is_one_line(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal([*SEARCH, "--output", str(tmp_path / "file")], capfd)
    assert "file" in refusal([*SEARCH, "--output", str(tmp_path / "file" / "run")], capfd)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"widths": 3}', b'{"units": {}}', b"\xff\xfe\x00", b'{"widths": {'],
)
def test_a_file_of_no_structure_is_one_line(tmp_path, capfd, content):
    path = tmp_path / "widths.json"
    path.write_bytes(content)
    command = ["train", *TINY[:-2], "--widths", str(path), "--output", str(tmp_path / "run")]
    assert refusal(command, capfd).startswith(f"dmcp: {path}: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("width", [0, 9, 1.5, True, "4", None])
def test_impossible_widths_are_one_line(tmp_path, capfd, width):
    path = tmp_path / "widths.json"
    path.write_text(json.dumps({"widths": {"conv1": width}}))
    command = ["train", *TINY[:-2], "--widths", str(path), "--output", str(tmp_path / "run")]
    assert "widths['conv1'] must" in refusal(command, capfd)
    assert not (tmp_path / "run").exists()


def test_eval_of_no_run_is_one_line(run, tmp_path, capfd):
    assert "is not a finished run" in refusal(["eval", str(tmp_path / "none")], capfd)
    error = refusal(["eval", str(run), "--network", "pruned"], capfd)
    assert "trained dense, dmcp, uniform, not 'pruned'" in error


FOLDER = shlex.split("--batch-size 8 --image-size 8 --holdout 0.25")


def test_bad_image_folders_are_one_line(tmp_path, capfd):
    output = tmp_path / "run"
    command = [*SEARCH, *FOLDER, "--output", str(output), "--data"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no folder train/" in refusal([*command, str(empty)], capfd)
    (empty / "train" / "cat").mkdir(parents=True)
    (empty / "train" / "dog").mkdir(parents=True)
    assert "no images" in refusal([*command, str(empty)], capfd)
    one = image_folder(tmp_path / "one", ["cat"])
    assert "has 1 class folders: at least 2 are needed" in refusal([*command, one], capfd)
    untested = tmp_path / "untested"
    for name in ("cat", "dog"):
        for index in range(12):
            png(untested / "train" / name / f"{index}.png")
    assert "no test images" in refusal([*command, str(untested)], capfd)
    assert not output.exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_corrupt_image_is_one_line_and_can_be_repaired(tmp_path, capfd, workers):
    data = image_folder(tmp_path / "data")
    pictures = {path: path.read_bytes() for path in (tmp_path / "data" / "train" / "dog").iterdir()}
    for path, content in pictures.items():
        path.write_bytes(content[:40])
    options = [*FOLDER, "--data", data, "--workers", workers, "--no-baselines", "--quiet"]
    command = [*SEARCH, *options, "--output", str(tmp_path / "run")]
    error = refusal(command, capfd)
    assert "cannot read image" in error
    assert any(str(path) in error for path in pictures)
    assert not (tmp_path / "run" / "results.json").exists()
    for path, content in pictures.items():
        path.write_bytes(content)
    assert main(command) == 0


def test_a_corrupt_first_image_leaves_no_folder(tmp_path, capfd):
    data = image_folder(tmp_path / "data")
    (tmp_path / "data" / "train" / "cat" / "00.png").write_bytes(b"no image")
    command = [*SEARCH, "--batch-size", "8", "--data", data, "--output", str(tmp_path / "run")]
    assert "cannot read image" in refusal(command, capfd)
    assert not (tmp_path / "run").exists()


def test_a_model_takes_the_width_of_its_own_recipe_only(tiny_file, capsys, monkeypatch):
    narrow = replace(recipes.get("resnet18-1.04G"), model_options={"width": 0.125})
    monkeypatch.setitem(recipes._RECIPES, "narrow", narrow)  # the paper's take long to trace
    inspect = shlex.split("inspect --recipe narrow --data digits --json")
    assert main(inspect) == 0
    assert json.loads(capsys.readouterr().out)["units"][0]["channels"] == 8
    assert main([*inspect, "--width", "0.25"]) == 0
    assert json.loads(capsys.readouterr().out)["units"][0]["channels"] == 16
    # This one takes no width at all.
    assert main([*inspect, "--model", "tiny.py:grey", "--groups", "4"]) == 0
    assert [unit["name"] for unit in json.loads(capsys.readouterr().out)["units"]] == ["0", "5"]


@pytest.mark.parametrize("command", ["", "search", "train", "eval", "inspect", "report"])
def test_help(capsys, command):
    assert main([*command.split(), "--help"]) == 0
    assert "Usage: dmcp" in capsys.readouterr().out


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


WITHOUT_EXTRAS = """
import contextlib, io, json, sys

class Missing:
    package = None
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.package:
            raise ImportError(f"no {name}")

missing = Missing()
sys.meta_path.insert(0, missing)
from dmcp.cli import main

said = {}
for package, arguments in json.loads(sys.argv[1]):
    missing.package = package
    error, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(out):
        code = main(arguments)
    said[package] = (code, out.getvalue(), error.getvalue())
print(json.dumps(said))
"""


def test_missing_extras_are_one_line(tmp_path):
    """Before anything is written."""
    data = image_folder(tmp_path / "data")
    search = [*SEARCH, "--output", str(tmp_path / "run")]
    folder = ["inspect", "--model", "resnet18", "--width", "0.125", "--data", data]
    cases = [("click", search), ("rich", search), ("sklearn", search), ("PIL", folder)]
    cases += [("kornia", search), ("safetensors", search)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, json.dumps(cases)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said = json.loads(done.stdout)
    assert len(said) == len(cases)
    for package, (code, out, error) in said.items():
        assert (code, out) == (2, "")
        assert error.count("\n") == 1
        assert f"needs the package {package!r}: pip install 'dmcp[cli]'" in error
    assert not (tmp_path / "run").exists()
