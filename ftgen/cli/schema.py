"""`ftgen schema`: JSON Schemas for editors and programs."""

import json

import click


@click.command("schema")
@click.option("--site", is_flag=True, help="The schema of a site profile.")
@click.option("--results", is_flag=True, help="The schema of what `ftgen tabulate --format json` prints.")
def command(site: bool, results: bool) -> None:
    """Print the JSON Schema of a spec.

    Editors use it to complete and check keys.
    """
    from ftgen.results.keys import json_schema as results_schema
    from ftgen.spec.site import Site
    from ftgen.spec.spec import json_schema as spec_schema

    document = Site.model_json_schema() if site else results_schema() if results else spec_schema()
    click.echo(json.dumps(document, indent=2))
