"""Reads the images of the catalogue, and recognizes them by the names of files and in registries.

In: images.toml of this folder; the name of an image (`str`). Out: an `Image`.
"""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import tomli

NEMO_IMAGE = "nvcr.io/nvidia/nemo"
# The tag in nvcr.io#nvidia/nemo:24.12, nvidia+nemo+24.12.sqsh, nemo-24.12.01.sif; not in nemo-rl-24.12 or pytorch:24.12.
NEMO_TAG = re.compile(r"(?:^|[^a-z])nemo[:+_.@-]{1,2}v?(\d\d\.\d\d)(?!\d)(?:\.\d\d)?(?=\W|_|$)", re.IGNORECASE)


class Image(NamedTuple):
    """One of NVIDIA's NeMo images, or ftgen's own set of packages: the versions inside, and whether ftgen runs with them."""

    name: str  # tag of nvcr.io/nvidia/nemo
    title: str
    engines: tuple[str, ...]  # inside: nemo, megatron_bridge
    fits: tuple[str, ...]  # the engines with which ftgen runs in it
    source: str
    nemo: str | None = None  # versions; None: not known, or not inside
    megatron_bridge: str | None = None
    megatron_core: str | None = None
    transformer_engine: str | None = None
    tested: str = "not run"  # where ftgen ran with these versions
    lacks: str = ""  # what does not work with NeMo
    bridge_lacks: str = ""  # why Megatron-Bridge does not fit


@cache
def images() -> dict[str, Image]:
    """Every image, by tag; ftgen's own set of packages is "ftgen"."""
    tables = tomli.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    return {
        name: Image(name=name, **{**table, "engines": tuple(table["engines"]), "fits": tuple(table["fits"])})
        for name, table in tables.items()
    }


def image_named(text: str) -> Image | None:
    """The image that a file or a name in a registry is called after; None if it is called after none of them."""
    tags = NEMO_TAG.findall(text.rpartition("/")[2])
    return images().get(tags[-1]) if tags else None


def why_unfit(text: str, engine: str = "nemo") -> tuple[str, str] | None:
    """Why the engine does not run in an image of this name, and the nearest image that fits; None if it may run."""
    image = image_named(text)
    if not image or engine in image.fits:
        return None
    fitting = [name for name, each in images().items() if engine in each.fits and name[0].isdigit()]
    nearest = min(fitting, key=lambda name: abs(_months(name) - _months(image.name)))
    lacks = image.lacks if engine == "nemo" else image.bridge_lacks or "Megatron-Bridge 0.6"
    why = f"must have the packages that a job needs: {NEMO_IMAGE}:{image.name} lacks {lacks}"
    return why, f"{NEMO_IMAGE}:{nearest}"


def _months(tag: str) -> int:
    year, month = tag.split(".")
    return 12 * int(year) + int(month)
