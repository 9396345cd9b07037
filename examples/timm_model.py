"""A model of timm, its transforms, its optimizer and its average of the weights.

    pip install "dmcp[cli,zoo]"
    python examples/timm_model.py --model resnet18 --size 32

The weights are fresh, so that nothing is downloaded. With ``pretrained=True`` below, three things
change: images have the size that the weights were trained at (``--size 224``), learning rates are
those of fine-tuning, a tenth, and the search should be long enough, some epochs, for the narrow
networks to learn: of pretrained weights the first channels are not the important ones yet.
"""

import argparse
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_model, save_model
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import dmcp
from dmcp.data import open_data
from dmcp.data.images import ImageSet
from dmcp.train import evaluate


class Pictures(Dataset[tuple[Tensor, int]]):
    """The digits as the RGB pictures that timm's transforms expect; your folder of photos here."""

    def __init__(self, images: ImageSet, transform: nn.Module) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels, label = self.images[index]
        return self.transform(Image.fromarray(pixels[0].numpy()).convert("RGB")), label


def create(name: str) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=10)


def endless(loader: Iterable[list[Tensor]]) -> Iterator[list[Tensor]]:
    while True:
        yield from loader


def loss_of(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(network(images), labels, label_smoothing=0.1)


def main(model: str, size: int, steps: int, output: Path) -> None:
    torch.manual_seed(0)
    network = create(model)
    config = resolve_data_config({"input_size": (3, size, size)}, model=network)
    data = open_data("digits")
    # Digits are not mirrored, and lose their meaning in small crops.
    change = create_transform(**config, is_training=True, hflip=0.0, scale=(0.7, 1.0))
    loader = DataLoader(Pictures(data.train, change), 32, shuffle=True, drop_last=True)
    plain = create_transform(**config)

    example = torch.zeros(2, *config["input_size"])
    net = dmcp.MarkovNet(network, example, divisor=8)
    search = dmcp.LoopSearch(net, dmcp.Budget(macs="50%"), steps // 2)
    optimizer = create_optimizer_v2(network, opt="adamw", lr=1e-3, weight_decay=0.02)
    average = ModelEmaV3(network, decay=0.98)

    trained: nn.Module = net.train()
    for step, (images, labels) in zip(range(steps), endless(loader), strict=False):
        loss = partial(loss_of, trained, images, labels)

        optimizer.zero_grad()
        loss().backward()
        if step < search.steps:
            search.step(loss)
        optimizer.step()
        average.update(network)

        if step == search.steps - 1:  # momentum and average go on with the small network
            structure = dmcp.Structure.of(net.graph, search.expected_widths())
            trained = network = dmcp.hand_over(
                net.graph, structure.widths, optimizers=optimizer, averages=average
            )

    small = average.module
    tests = DataLoader(Pictures(data.test, plain), 128)
    macs = dmcp.cost(net.graph)
    print(f"{macs.of(structure.widths):,} of {macs.of({}):,} MACs")
    print(f"top-1 on the test images, averaged weights: {evaluate(small, tests).top1:.1%}")

    # A structure and weights: the model's code stays timm's.
    output.mkdir(parents=True, exist_ok=True)
    structure.save(output / "widths.json")
    save_model(small, output / "small.safetensors")
    graph = dmcp.trace(create(model), example)
    loaded = dmcp.Structure.load(output / "widths.json").extract(graph).eval()
    load_model(loaded, output / "small.safetensors")
    assert torch.equal(loaded(example), small.eval()(example))
    print(f"{output} holds the small {model}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("runs/timm_model"))
    main(**vars(parser.parse_args()))
