"""`ftgen compile`: compiles specs to job scripts."""

import sys
from pathlib import Path

import click

from ftgen.cli.options import FOLDER, set_option, site_option, specs_argument


@click.command("compile")
@specs_argument
@site_option
@set_option
@click.option("--out", type=FOLDER, default=Path("generated"), show_default=True, help="Folder for the scripts.")
@click.option("--check", is_flag=True, help="Write nothing. Print a diff and exit 1 if a script is stale.")
def command(specs: tuple[Path, ...], site: Path | None, overrides: tuple[str, ...], out: Path, check: bool) -> None:
    """Compile specs, or folders of specs, to job scripts.

    Writes OUT/<name>.sh, which can be submitted by itself, and OUT/<name>.py, its entrypoint.
    """
    from ftgen import files
    from ftgen.plan.experiments import load_all
    from ftgen.script.render import render

    texts = {name: text for each in load_all(specs, site, overrides) for name, text in render(each.plan).items()}
    if check:
        differences = files.differences(out, texts)
        click.echo(differences, nl=False)
        if differences:
            click.echo(f"the scripts in {out} are stale: compile the specs again", err=True)
            sys.exit(1)
        return
    for path in files.write(out, texts):
        if path.suffix == ".sh":
            click.echo(path)
