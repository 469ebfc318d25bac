"""`ftgen doctor`: checks whether jobs will run on this cluster."""

import sys
from pathlib import Path

import click

from ftgen.cli.options import optional_specs_argument, site_option


@click.command("doctor")
@optional_specs_argument
@site_option
@click.option(
    "--download",
    is_flag=True,
    help="Check nothing, but download the weights and the data of each SPEC, so that jobs need no network.",
)
def command(specs: tuple[Path, ...], site: Path | None, download: bool) -> None:
    """Check on a login node whether jobs will run here.

    Checks the jobs of each SPEC; without SPEC, a job of one node. Submits no batch job; where pyxis runs the image, srun
    starts one task in it.
    """
    from ftgen.cluster import hub
    from ftgen.cluster.doctor import examine
    from ftgen.plan.experiments import load_all, load_site
    from ftgen.spec.site import Site

    if download and not specs:
        raise click.UsageError("--download needs a SPEC: its weights and data are downloaded")
    plans = [each.plan for each in load_all(specs, site, ())]
    if download:
        sys.exit(hub.download(plans))
    failed = False
    profile = load_site(site) if site else Site()
    for finding in examine(profile, plans):
        failed |= finding.verdict == "FAIL"
        click.echo(finding)
    if failed:
        sys.exit(1)
