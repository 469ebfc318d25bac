"""`ftgen report`: logs to one HTML file."""

from pathlib import Path

import click

from ftgen.cli.options import (
    FILE,
    baseline_option,
    logs_argument,
    read_baseline_option,
    read_window_option,
    tolerance_option,
    warn,
    window_option,
)


@click.command("report")
@logs_argument
@click.option(
    "-o", "--output", type=FILE, default=Path("report.html"), show_default=True, help="Write the report to this file."
)
@click.option("--title", default="Results of fine-tuning runs", show_default=True, help="Use this title for the page.")
@window_option
@baseline_option
@tolerance_option
def command(
    logs: tuple[Path, ...], output: Path, title: str, window: str | None, baseline: str | None, tolerance: str
) -> None:
    """Write one HTML file with results, curves and verdicts.

    The report covers every run in LOGS, and a browser needs no network to open it.
    """
    from ftgen import files
    from ftgen.logs.find import runs_below
    from ftgen.results.keys import View
    from ftgen.show.progress import reading
    from ftgen.show.report import read, report

    view = View((), read_baseline_option(baseline, tolerance))
    steps = read_window_option(window)
    below = runs_below(logs, warn)
    with reading() as (found, progress):
        runs = read(map(found, below), steps, progress)
    (path,) = files.write(output.parent, {output.name: report(runs, view, title=title)})
    click.echo(path)
