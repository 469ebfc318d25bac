"""`ftgen rerun`: prints the spec that does a sealed run again."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ftgen.cli.options import FILE

READ = (("data", "path"), ("validation", "file"), ("checkpoint", "path"))  # files that the run read


@click.command("rerun")
@click.argument("file", type=FILE)
@click.option("-o", "--output", type=FILE, help="Write the spec to this file instead of stdout.")
def command(file: Path, output: Path | None) -> None:
    """Print the spec that does a sealed run again here.

    The spec sets every number of the run's plan. The partition, the account and the Python come from the site profile
    that you compile it with. Comments say which software the run had.
    """
    from ftgen import files
    from ftgen.errors import LogError, Problem
    from ftgen.plan.again import chat_template, spec_again
    from ftgen.results.sealed import open_sealed

    with tempfile.TemporaryDirectory(prefix="ftgen-rerun-") as folder:
        sealed = open_sealed(file, Path(folder))
        run, log = sealed.read()
    if log.plan is None:
        hint = "ftgen did not compile its script: write a spec by hand"
        raise LogError(Problem((), "the run has no plan", hint, file=str(file)))
    comments = _comments(f"{run.experiment}, run {run.run_id}", log.plan, log.environment or {})
    template = chat_template(log.plan)
    if template and output is None:
        raise click.UsageError("the run has a chat template, which is a second file: say where the spec goes with -o FILE")
    beside = f"{output.stem if output else ''}.jinja"
    text = "".join(f"# {line}\n" for line in comments) + spec_again(log.plan, str(file), beside)
    if output is None:
        click.echo(text, nl=False)
    else:
        files.write(output.parent, {output.name: text} | ({beside: template} if template else {}))
        click.echo(output)


def _comments(run: str, plan: Mapping[str, Any], environment: Mapping[str, Any]) -> Iterator[str]:
    """What the run was, and what this spec cannot set."""
    from ftgen import catalogue
    from ftgen.documents import get
    from ftgen.units import clean

    yield clean(f"Does again: {run}. ftgen compile THIS_FILE --site SITE")
    packages = environment.get("packages")
    if isinstance(packages, dict):
        yield clean(f"It ran with {', '.join(f'{name} {version}' for name, version in packages.items())}.")
    facts = [f"{key} {environment[key]}" for key in ("gpu", "driver", "cuda", "nccl") if environment.get(key)]
    if facts:
        yield clean(f"Its machine: {', '.join(facts)}.")
    if image := get(plan, ("python", "image")):
        yield clean(f"Its image: {image}.")
    for key, known in (("model", catalogue.models()), ("gpu", catalogue.gpus())):
        name = get(plan, (key, "name"))
        if name not in known:
            yield clean(
                f"The {key} {name} is not in ftgen's catalogue: add the key catalogue, with a user catalogue that has it."
            )
    for path in filter(None, (get(plan, key) for key in READ)):
        yield clean(f"It read {path}, which you must have here too.")
