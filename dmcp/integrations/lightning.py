"""The search as a callback of Lightning (``pip install "dmcp[lightning]"``)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dmcp.errors import ConfigError, require
from dmcp.graph import hand_over
from dmcp.integrations.loop import LoopSearch
from dmcp.search import Budget, MarkovNet, SearchOptions

require("lightning.pytorch", "lightning", "dmcp.integrations.lightning")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.utilities.signature_utils import (  # noqa: E402
    is_param_in_hook_signature,
)


class ChannelSearch(Callback):
    """Searches a network while a ``LightningModule`` trains it, and goes on with what it found.

    The module keeps its ``training_step``, its optimizers, schedules, precision, clipping and
    accumulation::

        net = dmcp.MarkovNet(module.model, images)
        search = ChannelSearch(net, dmcp.Budget(macs="50%"), steps=2000)
        Trainer(callbacks=[search]).fit(module, loader)
        search.widths                               # and module.model is the small network

    For every batch ``training_step`` runs again for some sub-networks, see `LoopSearch`; what it
    logs there is dropped, and what `LoopSearch.step` measures is logged as ``search/…``. After
    ``steps`` batches the network is extracted, takes the model's place in the module, and the fit
    goes on with it: `dmcp.hand_over` gives it the optimizers' momentum.

    Limits: automatic optimization and one process; the model is a submodule of the
    ``LightningModule``, not the ``LightningModule`` itself, and not compiled. A metric object that
    ``training_step`` updates counts the sub-networks as well. A checkpoint from after the hand-over
    holds the small network: load it into a module with ``dmcp.extract(net.graph, widths)``. Another
    callback that averages weights has to start after the hand-over. Where the fit ends with it,
    `dmcp.train.recalibrate_batch_norm` is left to do.

    Args:
        net: made of a submodule of the ``LightningModule``.
        budget: what the structure may cost.
        steps: batches to search for.
        options, seed: see `LoopSearch`.

    Attributes:
        search: the `LoopSearch`, once the fit has started.
        widths: what was found, once the search is over.
    """

    def __init__(
        self,
        net: MarkovNet,
        budget: Budget,
        steps: int,
        options: SearchOptions | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.net = net
        self.budget = budget
        self.steps = steps
        self.options = options
        self.seed = seed
        self.search: LoopSearch | None = None
        self.widths: dict[str, int] | None = None
        self._resumed: Mapping[str, Any] = {}
        self._batch: tuple[Any, ...] = ()
        self._has_stepped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the search where the model now is.

        Raises:
            ConfigError: see the limits above.
        """
        if self.widths is not None:
            return
        held_as = {name for _, name in self._places(pl_module)}
        if not held_as:
            raise ConfigError(
                f"net: {type(pl_module).__name__} does not hold the model that it was made of"
            )
        if "_orig_mod" in held_as:
            raise ConfigError(
                "ChannelSearch needs a model that is not compiled: torch.compile would go on with "
                "the whole network"
            )
        if not pl_module.automatic_optimization:
            raise ConfigError(
                "ChannelSearch needs automatic optimization; with manual optimization call "
                "dmcp.LoopSearch in training_step"
            )
        if trainer.world_size > 1:
            raise ConfigError(f"ChannelSearch runs in one process, not in {trainer.world_size}")
        resumed = self._resumed or self.state_dict()  # of a checkpoint, of the fit before
        self._resumed = {}
        _follow_to(self.net, pl_module.device)
        self.search = LoopSearch(self.net, self.budget, self.steps, self.options, seed=self.seed)
        if resumed:
            self.search.load_state_dict(resumed)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch."""
        has_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
        self._batch = (batch, batch_idx) if has_index else (batch,)
        self._has_stepped = False

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The search's part of the iteration."""
        search = self.search
        if search is None or search.step_index == search.steps:
            return

        def loss_of() -> Tensor:
            output = trainer.strategy.training_step(*self._batch)
            loss: Any = output["loss"] if isinstance(output, Mapping) else output
            return loss

        def stand_in(*inputs: Any, **keywords: Any) -> Any:
            return self.net(*inputs, **keywords)

        _copy_modes(self.net)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        model = self.net.graph.model
        with _replaced(model, "forward", stand_in), _replaced(pl_module, "log", _nothing):
            metrics = search.step(loss_of, scaler, share=1 / trainer.accumulate_grad_batches)
        pl_module.log_dict({f"search/{name}": value for name, value in metrics.items()})

    def on_before_optimizer_step(self, *_: Any) -> None:
        """The gradients that were gathered are about to be used."""
        self._has_stepped = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """After the last step of the search, and the optimizers' next, go on with the small
        network."""
        self._batch = ()
        search = self.search
        if search is None or self.widths is not None or search.step_index < search.steps:
            return
        if not self._has_stepped:
            return
        self.widths = search.expected_widths()
        small = hand_over(self.net.graph, self.widths, optimizers=trainer.optimizers)
        for module, name in self._places(pl_module):
            module._modules[name] = small

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the search is not over."""
        if self.search is not None and self.widths is None:
            warnings.warn(
                f"the fit ended after {self.search.step_index} of {self.steps} steps of the "
                "search: the network is whole",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """The search, for a checkpoint in the middle of it."""
        if self.search is None or self.widths is not None:
            return {}
        return self.search.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the search of a checkpoint when the fit starts."""
        self._resumed = state_dict

    def _places(self, pl_module: LightningModule) -> list[tuple[nn.Module, str]]:
        """The modules that hold the model, and the names they hold it by."""
        model = self.net.graph.model
        return [
            (module, name)
            for module in pl_module.modules()
            for name, child in module._modules.items()
            if child is model
        ]


def _follow_to(net: MarkovNet, device: Any) -> None:
    """Move the chains to where the model has been moved, and share its buffers again."""
    model = net.graph.model
    buffers = dict(model.named_buffers(remove_duplicate=False))
    net.to(device)
    for name, buffer in buffers.items():
        owner, _, key = name.rpartition(".")
        for root in (model, net.model):
            root.get_submodule(owner)._buffers[key] = buffer


def _copy_modes(net: MarkovNet) -> None:
    """Train and evaluate what the model trains and evaluates."""
    net.training = net.graph.model.training
    for name, module in net.graph.model.named_modules():
        net.model.get_submodule(name).training = module.training


def _nothing(*_: Any, **__: Any) -> None:
    """What is logged is dropped."""


@contextmanager
def _replaced(module: nn.Module, name: str, function: Any) -> Iterator[None]:
    """A method of one module is another function while the context is open."""
    before = vars(module).get(name)
    vars(module)[name] = function
    try:
        yield
    finally:
        if before is None:
            del vars(module)[name]
        else:
            vars(module)[name] = before
