"""Keeps facts as data: models, GPUs, images, optimizations, published results and kinds of lines in logs, as TOML.

In: the TOML files of this folder. Out: frozen records by name. Start with `models.toml`, then `reader.py`.
"""

from ftgen.catalogue.images import NEMO_IMAGE, Image, image_named, images, why_unfit
from ftgen.catalogue.publications import Publication, Published, TimeToTrain, publications, published, published_for
from ftgen.catalogue.reader import (
    Gpu,
    Model,
    Optimization,
    RunLine,
    Split,
    UserCatalogue,
    gpu_from,
    gpus,
    model_from,
    models,
    optimizations,
    run_lines,
)

__all__ = [
    "NEMO_IMAGE",
    "Gpu",
    "Image",
    "Model",
    "Optimization",
    "Publication",
    "Published",
    "RunLine",
    "Split",
    "TimeToTrain",
    "UserCatalogue",
    "gpu_from",
    "gpus",
    "image_named",
    "images",
    "model_from",
    "models",
    "optimizations",
    "publications",
    "published",
    "published_for",
    "run_lines",
    "why_unfit",
]
