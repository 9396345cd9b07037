"""Images to train on: the bundled digits, image folders, and reproducible streams of batches."""

from dmcp.data.images import DataSource, ImageFormat, ImageSet
from dmcp.data.open import open_data
from dmcp.data.stream import Batch, eval_batches, train_stream

__all__ = [
    "Batch",
    "DataSource",
    "ImageFormat",
    "ImageSet",
    "eval_batches",
    "open_data",
    "train_stream",
]
