"""`ftgen history`: keeps the results of runs, and finds when they changed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ftgen.cli.options import FILE, history_option, logs_argument, read_history, usage_errors, warn

if TYPE_CHECKING:
    from ftgen.results.record import Record

conditions_argument = click.argument("conditions", nargs=-1, metavar="[KEY=VALUE...]")


@click.group("history", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Keep the results of runs, and find when they changed.

    A history is one SQLite file. KEY is a key of the JSON results, such as gpu, or a path such as plan.data.packed or
    environment.driver.
    """


@command.command("add")
@logs_argument
@history_option
def add(logs: tuple[Path, ...], history: Path | None) -> None:
    """Add the results of every run in LOGS.

    A run that is there already is replaced if its log has changed.
    """
    from ftgen.logs.find import runs_below
    from ftgen.results.record import records
    from ftgen.show.progress import reading

    file = read_history(history)
    runs = runs_below(logs, warn)
    with reading() as (found, read):
        made = records(map(found, runs), progress=read)
    added = file.add(made)
    click.echo(f"{file.path}: {added.new} new, {added.changed} changed, {added.same} unchanged")


@command.command("list")
@conditions_argument
@history_option
def list_(conditions: tuple[str, ...], history: Path | None) -> None:
    """List runs by experiment, software and partition.

    Conditions select runs, for example gpu=h100 status=complete.
    """
    from ftgen.show.history import table

    click.echo("\n".join(table(_selected(conditions, history))))


@command.command("show")
@click.argument("run_id")
@history_option
def show(run_id: str, history: Path | None) -> None:
    """Print all that is known of a run, as JSON.

    RUN_ID is the run's id, as `ftgen history list` prints it.
    """
    from ftgen.errors import LogError, Problem
    from ftgen.show.history import details

    file = read_history(history)
    found = [of for of in file.records() if of["results"]["run_id"] == run_id]
    if not found:
        raise LogError(Problem((), f"has no run {run_id}", "`ftgen history list` lists its runs", file=str(file.path)))
    click.echo("\n".join(map(details, found)))


@command.command("trend")
@conditions_argument
@history_option
@click.option("--fail-on-change", is_flag=True, help="Exit with code 1 if a work became slower.")
def trend(conditions: tuple[str, ...], history: Path | None, fail_on_change: bool) -> None:
    """Find when a step time changed, and what changed there.

    Conditions select runs, for example model=llama3_8b.
    """
    from ftgen.results.trend import series
    from ftgen.show.history import trends

    found = series(_selected(conditions, history))
    click.echo("\n".join(trends(found)) or "no complete run of known work")
    if fail_on_change and any(change.ratio > 1 for each in found for change in each.changes):
        sys.exit(1)


@command.command("export")
@conditions_argument
@history_option
@click.option("--output", type=FILE, help="Write to this file instead of stdout.")
def export(conditions: tuple[str, ...], history: Path | None, output: Path | None) -> None:
    """Write runs as lines of JSON, one run a line."""
    from ftgen import files
    from ftgen.results.record import to_lines

    lines = to_lines(_selected(conditions, history))
    if output is None:
        click.echo("".join(lines), nl=False)
    else:
        files.write(output.parent, {output.name: lines})


@command.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@history_option
def import_(files: tuple[Path, ...], history: Path | None) -> None:
    """Add the runs of FILES, which `ftgen history export` wrote.

    Nothing is added if a line cannot be read.
    """
    from ftgen.results.record import from_lines

    file = read_history(history)
    found = [of for path in files for of in from_lines(path.read_text(encoding="utf-8", errors="replace"), str(path))]
    added = file.add(found)
    click.echo(f"{file.path}: {added.new} new, {added.changed} changed, {added.same} unchanged")


def _selected(conditions: tuple[str, ...], history: Path | None) -> list[Record]:
    from ftgen.results.record import read_conditions, select

    with usage_errors():
        wanted = read_conditions(conditions)
    return select(read_history(history).records(), wanted)
