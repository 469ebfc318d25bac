"""`ftgen schema`: prints JSON Schemas for editors and programs."""

import json

import click


@click.command("schema")
@click.option("--site", is_flag=True, help="Print the schema of a site profile instead.")
@click.option(
    "--results",
    is_flag=True,
    help="Print the schema of the JSON results instead, as `ftgen tabulate --format json` prints them.",
)
def command(site: bool, results: bool) -> None:
    """Print the JSON Schema of a spec.

    Editors use it to complete keys and to check them.
    """
    from ftgen.results.keys import json_schema as results_schema
    from ftgen.spec.site import Site
    from ftgen.spec.spec import json_schema as spec_schema

    document = Site.model_json_schema() if site else results_schema() if results else spec_schema()
    click.echo(json.dumps(document, indent=2))
