"""`ftgen tabulate`: logs to result tables."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ftgen.cli.options import (
    FILE,
    across_engines_option,
    history_option,
    logs_argument,
    read_baseline_option,
    read_history,
    read_summaries,
    tolerance_option,
    usage_errors,
    window_option,
)

if TYPE_CHECKING:
    from ftgen.results.keys import View

FAIL_ON = "regression, incomplete, failed, invalid, warning"
FORMATS = "terminal, markdown, csv, json, html, latex"


@click.command("tabulate")
@logs_argument
@click.option(
    "--format", "format_", default="terminal", show_default=True, metavar="FORMAT", help=f"Output format: {FORMATS}."
)
@window_option
@click.option("--flat", is_flag=True, help="Print one table with a row for each run.")
@click.option(
    "--columns",
    default="",
    metavar="KEY,...",
    help="Print a flat table with these columns. A column is a key of the JSON results.",
)
@click.option(
    "--sort", default="", metavar="[-]KEY,...", help="Print a flat table in this order. A minus sign sorts from high to low."
)
@click.option("--group", is_flag=True, help="Combine repeats of an experiment: their mean, standard deviation and number.")
@click.option(
    "--baseline",
    metavar="published|history[:best|:last]|FILE.json",
    help="Compare each run with the published figures, with the history, or with a file of earlier results.",
)
@across_engines_option
@history_option
@tolerance_option
@click.option("--fail-on", default="", metavar="WORD,...", help=f"Exit with code 1 if a run is one of these: {FAIL_ON}.")
@click.option("--output", type=FILE, help="Write to this file instead of stdout.")
def command(
    logs: tuple[Path, ...],
    format_: str,
    window: str | None,
    flat: bool,
    columns: str,
    sort: str,
    group: bool,
    baseline: str | None,
    across_engines: bool,
    history: Path | None,
    tolerance: str,
    fail_on: str,
    output: Path | None,
) -> None:
    """Print the result tables of every run in LOGS.

    LOGS are log files, or folders that contain logs.
    """
    from ftgen import files
    from ftgen.results.fail_on import REGRESSION, failures, nothing_compared, read_words
    from ftgen.results.keys import View, read_keys
    from ftgen.results.past import is_history
    from ftgen.show import formats

    if format_ not in formats.FORMATS:
        raise click.BadParameter(f"must be one of {', '.join(formats.FORMATS)}, found {format_}", param_hint="--format")
    with usage_errors():
        words = read_words(fail_on, compared=baseline is not None)
        view = View((), None, flat, read_keys(columns), read_keys(sort), group)
        view.check()
    if baseline and is_history(baseline) and not across_engines:
        view = _beside_history(view, baseline, history, tolerance, logs, window)
    else:
        if baseline and is_history(baseline):
            raise click.UsageError("--across-engines requires --baseline with a file of results, not the history")
        chosen = read_baseline_option(baseline, tolerance, across_engines=across_engines)
        view = view._replace(baseline=chosen, runs=read_summaries(logs, window))
    if output is None:
        click.echo(formats.render(format_, view), nl=False)
    else:
        files.write(output.parent, {output.name: formats.render(format_, view, to_file=True)})
    if REGRESSION not in words:
        click.echo("".join(f"{line}\n" for line in nothing_compared(view)), err=True, nl=False)
    if found := failures(view, words):
        click.echo("\n".join(found), err=True)
        sys.exit(1)


def _beside_history(
    view: View, baseline: str, history: Path | None, tolerance: str, logs: tuple[Path, ...], window: str | None
) -> View:
    """The view with the runs, and with the history's other runs as its baseline."""
    from ftgen.results.compare import read_tolerance
    from ftgen.results.past import past, read_which

    with usage_errors():
        which, allowed = read_which(baseline), read_tolerance(tolerance)
    records = read_history(history).records()
    runs = read_summaries(logs, window)
    without = {(run.experiment, run.run_id) for run in runs}
    return view._replace(baseline=past(records, which, without, allowed), runs=runs)
