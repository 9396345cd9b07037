"""Find the widths of a network of your own under two budgets, extract it, train it on, export it.

Real handwritten digits (scikit-learn's), a minute on a laptop:

    python examples/first_search.py
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import dmcp
from dmcp.data import eval_batches, open_data, train_stream
from dmcp.export import OnnxNetwork, to_onnx
from dmcp.train import Schedule, Training, TrainOptions, evaluate, recalibrate_batch_norm


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def main(steps: int, output: Path) -> None:
    torch.manual_seed(0)
    data = open_data("digits")  # or a folder with train/<class>/*.jpg and test/<class>/*.jpg
    model = nn.Sequential(
        block(1, 32),
        block(32, 64, stride=2),
        block(64, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )

    # Any network that torch.export captures: what is searchable, and why something is not.
    example = torch.zeros(2, 1, 8, 8)
    graph = dmcp.trace(model, example, exclude=("0.0",))  # leave the first layer alone
    for unit in graph.units:
        print(f"{unit.name}: {unit.channels} channels, {unit.reason or 'searchable'}")

    net = dmcp.MarkovNet(model, graph=graph, divisor=8)
    search = dmcp.Search(net, dmcp.Budget(macs="50%", params="40%"), steps)
    for images, labels in train_stream(data.train, 64, seed=0, steps=steps):
        search.step(images, labels)

    # An ordinary, smaller network of the same classes. It needs its own batch-norm statistics.
    widths = search.expected_widths()
    small = dmcp.extract(net.graph, widths)
    recalibrate_batch_norm(small, eval_batches(data.train, 256))
    print("widths:", widths)
    for metric in ("macs", "params"):
        cost = dmcp.cost(net.graph, metric)
        print(f"{metric}: {cost.of(widths):,} of {cost.of({}):,}")

    training = Training(small, TrainOptions(lr=Schedule(peak=0.02)), steps)
    for images, labels in train_stream(data.train, 64, seed=1, steps=steps):
        training.step(images, labels)
    print(f"top-1 on the test images: {evaluate(small, eval_batches(data.test, 256)).top1:.1%}")

    # The file has been run and compared with the network when this returns.
    output.mkdir(parents=True, exist_ok=True)
    difference = to_onnx(small, example, output / "small.onnx")
    logits = OnnxNetwork(output / "small.onnx")(torch.zeros(5, 1, 8, 8))
    print(f"ONNX agrees to {difference:.0e}; logits of five images: {[*logits.shape]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/first_search"))
    main(**vars(parser.parse_args()))
