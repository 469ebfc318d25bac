"""`ftgen list`: lists experiments, and whether their scripts are current; or images, and whether ftgen runs in them."""

from collections.abc import Sequence
from pathlib import Path

import click

from ftgen.cli.options import FOLDER, optional_specs_argument, set_option, site_option


@click.command("list")
@optional_specs_argument
@site_option
@set_option
@click.option("--images", is_flag=True, help="List NVIDIA's NeMo images instead, and whether ftgen runs in them.")
@click.option("--out", type=FOLDER, default=Path("generated"), show_default=True, help="Folder of the scripts.")
def command(specs: tuple[Path, ...], site: Path | None, overrides: tuple[str, ...], images: bool, out: Path) -> None:
    """List experiments and whether their scripts are current.

    Lists the experiments of each SPEC or folder; without SPEC, those of specs/.
    """
    from ftgen.script import inventory

    rows = _images() if images else inventory.rows(specs or (Path("specs"),), out, site, overrides)
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(f"{text:{width}}" for text, width in zip(row, wide, strict=True)).rstrip())


def _images() -> Sequence[Sequence[str]]:
    from ftgen import catalogue

    versions = ("NeMo", "Megatron-Bridge", "Megatron-Core", "Transformer Engine")
    rows: list[tuple[str, ...]] = [("image", "fits", *versions, "tested", "without")]
    for image in catalogue.images().values():
        name = image.name if image.name == "ftgen" else f"{catalogue.NEMO_IMAGE}:{image.name}"
        found = (image.nemo, image.megatron_bridge, image.megatron_core, image.transformer_engine)
        fits = ", ".join(image.fits) or "no"
        rows.append((name, fits, *(version or "–" for version in found), image.tested, image.lacks or "–"))
    return rows
