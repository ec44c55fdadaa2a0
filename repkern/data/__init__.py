"""Images for training: data sets, reading, augmentation, and batches by counter."""

from repkern.data.batch import Batch, DataSource, Shard
from repkern.data.cifar import open_cifar
from repkern.data.digits import open_digits
from repkern.data.draws import Draws
from repkern.data.errors import (
    DamagedImagesError,
    DamagedImagesWarning,
    DataWorkerError,
    ImageSizeError,
    MissingExtraError,
)
from repkern.data.folders import load_images, open_folder
from repkern.data.framing import Framing
from repkern.data.huggingface import open_huggingface
from repkern.data.idx import open_fashion_mnist
from repkern.data.opening import open_data
from repkern.data.recipe import DataRecipe
from repkern.data.sets import ImageSet, MemoryData
from repkern.data.source import ImageSource

__all__ = [
    "Batch",
    "DamagedImagesError",
    "DamagedImagesWarning",
    "DataRecipe",
    "DataSource",
    "DataWorkerError",
    "Draws",
    "Framing",
    "ImageSet",
    "ImageSizeError",
    "ImageSource",
    "MemoryData",
    "MissingExtraError",
    "Shard",
    "load_images",
    "open_cifar",
    "open_data",
    "open_digits",
    "open_fashion_mnist",
    "open_folder",
    "open_huggingface",
]
