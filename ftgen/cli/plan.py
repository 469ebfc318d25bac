"""`ftgen plan`: what a spec resolves to."""

from pathlib import Path

import click

from ftgen.cli.options import FILE, set_option, site_option


@click.command("plan")
@click.argument("spec", type=FILE)
@site_option
@set_option
@click.option("--name", help="Which experiment, if SPEC has a matrix.")
@click.option("--json", "as_json", is_flag=True, help="The plan as the job gets it.")
def command(spec: Path, site: Path | None, overrides: tuple[str, ...], name: str | None, as_json: bool) -> None:
    """Show what a spec resolves to, and who said so."""
    from ftgen.plan import experiment, origins

    loaded = experiment.load(spec, site, overrides, name)
    if as_json:
        click.echo(loaded.plan.to_json())
        return
    rows = origins.explain(loaded)
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, value, origin in rows:
        click.echo(f"{key:{wide[0]}}  {value:{min(wide[1], 44)}}  {origin}".rstrip())
