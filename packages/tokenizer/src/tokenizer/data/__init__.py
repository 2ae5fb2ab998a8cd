"""Pictures in: data sets, views and the order in which training sees them (docs/data.md)."""

from tokenizer.data.dataset import Dataset, open_dataset
from tokenizer.data.loader import OrderedBatch, TrainBatch, ordered_batches, training_batches
from tokenizer.data.pictures import UnreadablePicture
from tokenizer.data.views import CENTER, View, parse_views

__all__ = [
    "CENTER",
    "Dataset",
    "OrderedBatch",
    "TrainBatch",
    "UnreadablePicture",
    "View",
    "open_dataset",
    "ordered_batches",
    "parse_views",
    "training_batches",
]
