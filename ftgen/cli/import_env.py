"""`ftgen import-env`: translates the variables of the recipe's launcher to a spec and a site profile."""

import os
from pathlib import Path

import click

from ftgen.cli.options import FILE


@click.command("import-env")
@click.option("--spec", type=FILE, help="Write the spec to this file instead of stdout.")
@click.option("--site", type=FILE, help="Write the site profile to this file instead of stderr.")
def command(spec: Path | None, site: Path | None) -> None:
    """Translate the recipe launcher's variables to TOML.

    Prints the spec to stdout; the site profile goes to stderr as comments. Reads DTYPE, MODEL_SIZE, SFT_SCHEME (or
    FT_TYPE), JOB_TOTAL_GPUS, RUN_CONF_GPUS_PER_NODE, RUN_CONF_IMAGE, STAGE_PATH, SBATCH_ACCOUNT and SBATCH_PARTITION.
    """
    from ftgen import files
    from ftgen.spec import launcher

    spec_text, site_text = launcher.spec(os.environ), launcher.site(os.environ)
    if spec:
        files.write(spec.parent, {spec.name: spec_text})
        click.echo(spec)
    else:
        click.echo(spec_text, nl=False)
    if site:
        files.write(site.parent, {site.name: site_text})
        click.echo(site, err=not spec)  # stdout has only the spec
    else:
        kept = "The site profile. Save it with --site FILE, and use it with ftgen compile --site FILE.\n"
        click.echo("".join(f"# {line}\n" for line in (kept + site_text).splitlines()), nl=False, err=True)
