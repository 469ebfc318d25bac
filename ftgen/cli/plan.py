"""`ftgen plan`: shows the plan that a spec resolves to."""

from pathlib import Path

import click

from ftgen.cli.options import FILE, set_option, site_option


@click.command("plan")
@click.argument("spec", type=FILE)
@site_option
@set_option
@click.option("--name", help="Name of the experiment, if SPEC has a matrix.")
@click.option("--all", "every", is_flag=True, help="Show every number and where it comes from.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON, as the job gets it.")
def command(spec: Path, site: Path | None, overrides: tuple[str, ...], name: str | None, every: bool, as_json: bool) -> None:
    """Show the run that a spec resolves to.

    Shows the work, the GPUs, the memory of one GPU, and the keys that differ from their defaults.
    """
    from ftgen.plan import origins, overview
    from ftgen.plan.experiments import load_one

    experiment = load_one(spec, site, overrides, name)
    if as_json:
        click.echo(experiment.plan.to_json())
    elif every:
        rows = origins.explain(experiment)
        wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
        for key, value, origin in rows:
            click.echo(f"{key:{wide[0]}}  {value:{min(wide[1], 44)}}  {origin}".rstrip())
    else:
        click.echo(overview.overview(experiment))
