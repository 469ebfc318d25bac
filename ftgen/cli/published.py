"""`ftgen published`: lists what others have published."""

import json

import click

from ftgen.cli.options import usage_errors


@click.command("published")
@click.argument("conditions", nargs=-1, metavar="[KEY=VALUE...]")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def command(conditions: tuple[str, ...], as_json: bool) -> None:
    """List published fine-tuning figures with their sources.

    Give conditions to list fewer, such as gpu=h100 scheme=lora. KEY is publication, model, scheme, precision, gpu, gpus,
    global_batch_size or seq_length.
    """
    from ftgen.show import published

    with usage_errors():
        wanted = published.read_conditions(conditions)
    found = published.rows(wanted)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    elif not found:
        click.echo("no published result fulfils all conditions", err=True)
    else:
        click.echo("\n".join(published.table(found)))
