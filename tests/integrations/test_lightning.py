from __future__ import annotations

import copy
import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dmcp
from dmcp.errors import ConfigError, MissingDependencyError
from dmcp.integrations import LoopSearch
from dmcp.search import SearchOptions

OPTIONS = SearchOptions(warmup=0.25, random_subnets=1)
BUDGET = dmcp.Budget(macs="50%")
SEARCHED, IN_ALL = 8, 12


@pytest.fixture(scope="module")
def lightning(zoo):
    """Lightning, whose metrics import torchvision."""
    return importlib.import_module("lightning.pytorch")


@pytest.fixture
def callback(lightning):
    return importlib.import_module("dmcp.integrations.lightning").ChannelSearch


@pytest.fixture
def loader():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.randint(5, (32,), generator=generator)), 8)


@pytest.fixture
def make_module(lightning, example):
    """A module whose model is an example network, always with the same weights."""

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.wrapped = nn.ModuleList([example("Residual").model])
            self.calls = 0

        def training_step(self, batch):
            images, labels = batch
            self.calls += 1
            loss = F.cross_entropy(self.wrapped[0](images), labels)
            self.log("calls", float(self.calls))
            return {"loss": loss}

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    return Module


@pytest.fixture
def fit(lightning, tmp_path):
    def run(module, loader, epochs, *callbacks, resume=None, **options):
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=[*callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            **options,
        )
        trainer.fit(module, loader, ckpt_path=resume)
        return trainer

    return run


def make_net(module):
    return dmcp.MarkovNet(module.wrapped[0], torch.zeros(2, 3, 8, 8), groups=4, divisor=1)


def the_same_by_hand(model, loader, searched, accumulate):
    """The loop that Lightning runs, written out."""
    net = dmcp.MarkovNet(model, torch.zeros(2, 3, 8, 8), groups=4, divisor=1).train()
    search = LoopSearch(net, BUDGET, searched, OPTIONS, seed=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for number in range(IN_ALL):
        images, labels = list(loader)[number % len(loader)]

        def loss_of(images=images, labels=labels):
            return F.cross_entropy(net(images), labels)

        if number % accumulate == 0:
            optimizer.zero_grad()
        F.cross_entropy(model(images), labels).div(accumulate).backward()
        if number < searched:
            search.step(loss_of, share=1 / accumulate)
        if (number + 1) % accumulate == 0:
            optimizer.step()
        if number == SEARCHED - 1:  # after the step that uses the last gradients of the search
            model = dmcp.hand_over(net.graph, search.expected_widths(), optimizers=optimizer)
        if (number + 1) % len(loader) == 0:
            schedule.step()
    return search.expected_widths(), model.state_dict()


@pytest.mark.parametrize(
    ("searched", "accumulate"), [(SEARCHED, 1), (SEARCHED, 2), (SEARCHED - 1, 2)]
)
def test_a_fit_searches_and_goes_on(callback, make_module, fit, loader, searched, accumulate):
    module = make_module()
    model = copy.deepcopy(module.wrapped[0]).train()
    widths, weights = the_same_by_hand(model, loader, searched, accumulate)
    search = callback(make_net(module), BUDGET, searched, OPTIONS, seed=5)
    trainer = fit(module, loader, 3, search, accumulate_grad_batches=accumulate)

    assert search.widths == widths
    small = module.wrapped[0]
    assert type(small).__name__ == "Residual"
    macs = dmcp.cost(search.net.graph)
    assert macs.of(widths) <= macs.of({}) / 2
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-6)
    (optimizer,) = trainer.optimizers
    assert optimizer.param_groups[0]["params"] == list(small.parameters())
    assert optimizer.param_groups[0]["lr"] == 0.01 / 8
    assert float(optimizer.state[small.stem[0].weight]["step"]) == IN_ALL / accumulate
    passes = searched * 2 + (searched - search.search.warmup_steps)
    assert module.calls == IN_ALL + passes
    assert trainer.callback_metrics["search/expected_macs"] > 0
    assert trainer.callback_metrics["search/masked_loss"] > 0
    assert "log" not in vars(module)
    assert "forward" not in vars(search.net.graph.model)


def test_a_checkpoint_in_the_middle_of_a_search(callback, make_module, fit, loader, tmp_path):
    ended = []
    for interrupted in (False, True):
        module = make_module()
        search = callback(make_net(module), BUDGET, SEARCHED, OPTIONS)
        if interrupted:
            with pytest.warns(UserWarning, match="ended after 4 of 8 steps of the search"):
                trainer = fit(module, loader, 1, search)
            trainer.save_checkpoint(tmp_path / "middle.ckpt")
            module = make_module()
            search = callback(make_net(module), BUDGET, SEARCHED, OPTIONS)
            fit(module, loader, 3, search, resume=tmp_path / "middle.ckpt")
        else:
            fit(module, loader, 3, search)
        ended.append((search.widths, module.wrapped[0].state_dict()))
    assert ended[0][0] == ended[1][0]
    for first, second in zip(ended[0][1].values(), ended[1][1].values(), strict=True):
        assert torch.equal(first, second)


def test_a_fit_after_a_resumed_one_goes_on_from_there(callback, make_module, fit, loader, tmp_path):
    saved = None
    for epochs in (1, 2):
        module = make_module()
        search = callback(make_net(module), BUDGET, 20, OPTIONS)
        with pytest.warns(UserWarning, match="of 20 steps"):
            trainer = fit(module, loader, epochs, search, resume=saved)
        saved = tmp_path / "middle.ckpt"
        trainer.save_checkpoint(saved)
    with pytest.warns(UserWarning, match="ended after 12 of 20 steps"):
        fit(module, loader, 1, search)


def test_sub_networks_train_what_the_module_trains_and_log_nothing(
    callback, make_module, fit, loader
):
    module = make_module()
    search = callback(make_net(module), BUDGET, SEARCHED, OPTIONS)
    norm = module.wrapped[0].stem[1]
    statistics = norm.running_mean.clone()
    module.on_train_batch_start = lambda *_: norm.eval()
    with pytest.warns(UserWarning, match="ended after 2 of 8 steps"):
        trainer = fit(module, loader, 1, search, limit_train_batches=2)
    assert torch.equal(norm.running_mean, statistics)
    of_net = search.net.model
    assert not of_net.stem[1].training
    assert of_net.down[1].training
    assert module.calls == 2 * 3
    assert trainer.logged_metrics["calls"] == 4, "that of the second batch's own pass"


def test_what_cannot_be_searched_is_refused(callback, make_module, fit, loader):
    module, other = make_module(), make_module()
    with pytest.raises(ConfigError, match="Module does not hold the model"):
        fit(module, loader, 1, callback(make_net(other), BUDGET, 4))
    compiled = make_module()
    net = make_net(compiled)
    compiled.wrapped[0] = torch.compile(compiled.wrapped[0], backend="eager")
    with pytest.raises(ConfigError, match="a model that is not compiled"):
        fit(compiled, loader, 1, callback(net, BUDGET, 4))
    module.automatic_optimization = False
    with pytest.raises(ConfigError, match="automatic optimization"):
        fit(module, loader, 1, callback(make_net(module), BUDGET, 4))


def test_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "dmcp.integrations.lightning", raising=False)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'dmcp\[lightning\]'"):
        importlib.import_module("dmcp.integrations.lightning")
