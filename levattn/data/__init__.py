"""Images in, batches out. Stands alone: imports no other part of this package, and neither TensorFlow nor torch."""

from levattn.data.batches import Batches
from levattn.data.config import DataConfig
from levattn.data.decode import decode_image
from levattn.data.errors import ImageError
from levattn.data.normalize import normalize
from levattn.data.pipeline import eval_batches, output_shape, train_batches
from levattn.data.sources import Source, open_source

__all__ = [
    "Batches",
    "DataConfig",
    "ImageError",
    "Source",
    "decode_image",
    "eval_batches",
    "normalize",
    "open_source",
    "output_shape",
    "train_batches",
]
