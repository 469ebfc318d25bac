"""Keeps facts as data: models, GPUs, optimizations and published results, one TOML file each.

In: the TOML files of this folder. Out: frozen records by name. Start with `models.toml`, then `reader.py`.
"""

from ftgen.catalogue.reader import (
    Gpu,
    Model,
    Optimization,
    Published,
    Split,
    UserCatalogue,
    gpu_from,
    gpus,
    model_from,
    models,
    optimizations,
    published,
    published_for,
)

__all__ = [
    "Gpu",
    "Model",
    "Optimization",
    "Published",
    "Split",
    "UserCatalogue",
    "gpu_from",
    "gpus",
    "model_from",
    "models",
    "optimizations",
    "published",
    "published_for",
]
