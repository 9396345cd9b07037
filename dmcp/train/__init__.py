"""Training: the loop, its stage for plain networks, evaluation, and several processes."""

from dmcp.train.distributed import (
    World,
    init_from_env,
    restore_batch_norm,
    shutdown,
    synchronise_batch_norm,
    synchronised_batch_norm,
)
from dmcp.train.evaluate import Evaluation, evaluate
from dmcp.train.loop import Stage, run
from dmcp.train.loss import cross_entropy, distillation
from dmcp.train.optim import Schedule, set_lr, sgd
from dmcp.train.recalibrate import recalibrate_batch_norm
from dmcp.train.recorder import Recorder
from dmcp.train.training import Training, TrainOptions

__all__ = [
    "Evaluation",
    "Recorder",
    "Schedule",
    "Stage",
    "TrainOptions",
    "Training",
    "World",
    "cross_entropy",
    "distillation",
    "evaluate",
    "init_from_env",
    "recalibrate_batch_norm",
    "restore_batch_norm",
    "run",
    "set_lr",
    "sgd",
    "shutdown",
    "synchronise_batch_norm",
    "synchronised_batch_norm",
]
