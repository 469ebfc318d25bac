"""`ftgen list`: lists experiments, and whether their scripts are current."""

from pathlib import Path

import click

from ftgen.cli.options import FOLDER, optional_specs_argument, set_option, site_option


@click.command("list")
@optional_specs_argument
@site_option
@set_option
@click.option("--out", type=FOLDER, default=Path("generated"), show_default=True, help="Folder of the scripts.")
def command(specs: tuple[Path, ...], site: Path | None, overrides: tuple[str, ...], out: Path) -> None:
    """List experiments and whether their scripts are current.

    Lists the experiments of each SPEC or folder; without SPEC, those of specs/.
    """
    from ftgen.script import inventory

    rows = inventory.rows(specs or (Path("specs"),), out, site, overrides)
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(f"{text:{width}}" for text, width in zip(row, wide, strict=True)).rstrip())
