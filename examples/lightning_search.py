"""A Lightning module as it is; the search is a callback.

pip install "dmcp[cli,lightning]"
python examples/lightning_search.py
"""

import argparse

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import dmcp
from dmcp.data import eval_batches, open_data
from dmcp.integrations.lightning import ChannelSearch
from dmcp.models import build
from dmcp.train import evaluate


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = build("resnet18", num_classes=10, width=0.25, in_channels=1, small_images=True)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)


def main(steps: int) -> None:
    torch.manual_seed(0)
    data = open_data("digits")
    images, labels = next(eval_batches(data.train, len(data.train)))
    loader = DataLoader(TensorDataset(images, labels), 64, shuffle=True, drop_last=True)

    module = Classifier()
    net = dmcp.MarkovNet(module.model, images[:2], divisor=4)
    search = ChannelSearch(net, dmcp.Budget(macs="50%"), steps // 2)
    trainer = Trainer(
        max_steps=steps,
        callbacks=[search],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)

    # The second half of the fit has trained the small network.
    macs = dmcp.cost(net.graph)
    print(f"{macs.of(search.widths):,} of {macs.of({}):,} MACs: {search.widths}")
    accuracy = evaluate(module.model, eval_batches(data.test, 256)).top1
    print(f"top-1 on the test images: {accuracy:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    main(**vars(parser.parse_args()))
