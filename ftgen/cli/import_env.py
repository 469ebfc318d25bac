"""`ftgen import-env`: the variables of the recipe's launcher to a spec and a site profile."""

import os
from pathlib import Path

import click

from ftgen.cli.options import FILE


@click.command("import-env")
@click.option("--spec", type=FILE, help="Write the spec there instead of to stdout.")
@click.option("--site", type=FILE, help="Write the site profile there instead of to stdout.")
def command(spec: Path | None, site: Path | None) -> None:
    """Translate the recipe launcher's variables to TOML.

    Reads DTYPE, MODEL_SIZE, SFT_SCHEME (or FT_TYPE), JOB_TOTAL_GPUS, RUN_CONF_GPUS_PER_NODE, RUN_CONF_IMAGE, STAGE_PATH,
    SBATCH_ACCOUNT and SBATCH_PARTITION.
    """
    from ftgen import files
    from ftgen.spec import launcher

    texts = (("spec", spec, launcher.spec(os.environ)), ("site profile", site, launcher.site(os.environ)))
    for title, path, text in texts:
        if path:
            files.write(path.parent, {path.name: text})
            click.echo(path)
        else:
            click.echo(f"# {title}\n{text}")
