"""Your loss, your optimizer, your loop; and training goes on in the small network.

A network with two outputs: which digit it is, and which pixels are ink. The loop around it has what
training loops have: AdamW, a schedule, clipped gradients, an average of the weights. The search is
one line in it, the hand-over another: momentum and average go on with the small network.

    python examples/own_loop.py
"""

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dmcp
from dmcp.data import eval_batches, open_data, train_stream


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class DigitsAndInk(nn.Module):
    """Logits [N, 10] of the digits, and [N, 1, 8, 8] of the ink under noise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.deep = block(1, 32), block(32, 64, stride=2), block(64, 64)
        self.up = nn.ConvTranspose2d(64, 32, 2, 2)
        self.ink = nn.Conv2d(32, 1, 1)
        self.digit = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.stem(images)
        deep = self.deep(self.down(features))
        return self.digit(deep.mean((2, 3))), self.ink(F.relu(features + self.up(deep)))


def loss_of(network: nn.Module, images: Tensor, labels: Tensor, ink: Tensor) -> Tensor:
    digit_logits, ink_logits = network(images)
    seen = F.binary_cross_entropy_with_logits(ink_logits, ink)
    return F.cross_entropy(digit_logits, labels) + seen


def main(steps: int) -> None:
    torch.manual_seed(0)
    data = open_data("digits")
    model = DigitsAndInk()
    net = dmcp.MarkovNet(model, torch.zeros(2, 1, 8, 8), divisor=4)
    search = dmcp.LoopSearch(net, dmcp.Budget(macs="50%"), steps // 2)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)

    trained: nn.Module = net.train()
    for step, (images, labels) in enumerate(train_stream(data.train, 64, seed=0, steps=steps)):
        ink = (images > 0).float()
        noisy = images + 0.3 * torch.randn_like(images)
        loss = partial(loss_of, trained, noisy, labels, ink)

        optimizer.zero_grad()
        loss().backward()
        if step < search.steps:
            search.step(loss)  # sub-networks add to the gradients; the chains move
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)

        if step == search.steps - 1:
            widths = search.expected_widths()
            model = dmcp.hand_over(net.graph, widths, optimizers=optimizer, averages=average)
            trained = model
            print(f"step {step + 1}: went on with {widths}")

    average.eval()
    hits = [
        (average(images)[0].argmax(1) == labels) for images, labels in eval_batches(data.test, 256)
    ]
    macs = dmcp.cost(net.graph)
    print(f"{macs.of(widths):,} of {macs.of({}):,} MACs")
    print(f"top-1 on the test images, averaged weights: {torch.cat(hits).float().mean():.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    main(**vars(parser.parse_args()))
