"""`ftgen setup`: compiles a site profile to the job that sets the site up."""

from pathlib import Path

import click

from ftgen.cli.options import FILE, FOLDER, optional_specs_argument


@click.command("setup")
@click.option("--site", type=FILE, required=True, help="Site profile: a TOML file that describes the cluster.")
@optional_specs_argument
@click.option("--out", type=FOLDER, default=Path("generated"), show_default=True, help="Folder for setup/<site>.sh.")
def command(site: Path, specs: tuple[Path, ...], out: Path) -> None:
    """Compile the job that prepares a cluster for ftgen.

    The job creates the folders, the image or the virtual environment, and the source trees of each SPEC.
    """
    from ftgen import files
    from ftgen.plan.experiments import load_all, load_site
    from ftgen.script.setup import render_setup

    profile = load_site(site)
    text = render_setup(profile, site.stem, [each.plan for each in load_all(specs, site, ())])
    for path in files.write(out / "setup", {f"{site.stem}.sh": text}):
        click.echo(path)
