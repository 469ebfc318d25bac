"""`ftgen report`: logs to one HTML file, or a history to a site."""

import shutil
import tempfile
from pathlib import Path

import click

from ftgen.cli.options import (
    ANYWHERE,
    FILE,
    baseline_option,
    read_baseline_option,
    read_window_option,
    tolerance_option,
    warn,
    window_option,
)


@click.command("report")
@click.argument("logs", nargs=-1, type=ANYWHERE, metavar="[LOGS...]")
@click.option(
    "-o",
    "--output",
    type=ANYWHERE,
    help="Write the report to this file, or the site to this folder. Default: report.html, or site.",
)
@click.option("--history", type=FILE, help="Write a site of this history instead of a report of LOGS.")
@click.option(
    "--sealed",
    type=ANYWHERE,
    multiple=True,
    help="Sealed runs, or folders of them, which the site has beside their figures. Repeat the option for more.",
)
@click.option("--title", default="Results of fine-tuning runs", show_default=True, help="Use this title for the page.")
@window_option
@baseline_option
@tolerance_option
def command(
    logs: tuple[Path, ...],
    output: Path | None,
    history: Path | None,
    sealed: tuple[Path, ...],
    title: str,
    window: str | None,
    baseline: str | None,
    tolerance: str,
) -> None:
    """Write one HTML file with results, curves and verdicts.

    The report covers every run in LOGS, and a browser needs no network to open it. With --history, it is a folder of
    pages: an index with the fastest runs beside published figures, and a page for each experiment with its trend.
    """
    if history:
        if logs:
            raise click.UsageError("give LOGS or --history, not both: ftgen history add LOGS adds them to the history")
        _write_site(history, sealed, output or Path("site"), title)
        return
    if not logs:
        raise click.UsageError("give LOGS, or a history with --history")
    output = output or Path("report.html")
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


def _write_site(history: Path, sealed: tuple[Path, ...], output: Path, title: str) -> None:
    """Write the pages of a history, and copies of the sealed runs that belong to it."""
    from ftgen import files
    from ftgen.results.history import History
    from ftgen.show.site import site

    records = History(history).records()
    found = _sealed_by_log(sealed)
    names = {}
    for record in records:
        if path := found.pop(record["log_sha256"], None):
            names[record["log_sha256"]] = f"sealed/{record['results']['experiment'].replace('/', '_')}_{path.name}"
            (output / "sealed").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, output / names[record["log_sha256"]])
    for path in found.values():
        warn(f"{path}: left out: the history has no run with this log")
    pages = site(records, names, title=title)
    files.write(output, pages)
    click.echo(f"{output / 'index.html'}: {len(pages) - 1} experiments, {len(names)} sealed runs")


def _sealed_by_log(paths: tuple[Path, ...]) -> dict[str, Path]:
    """The sealed runs by the hash of their logs. Each is checked, as `ftgen verify` does it with the files."""
    from ftgen.results.sealed import open_sealed

    found = {}
    for path in (file for each in paths for file in (sorted(each.glob("*.zip")) if each.is_dir() else [each])):
        with tempfile.TemporaryDirectory(prefix="ftgen-site-") as folder:
            found[open_sealed(path, Path(folder)).manifest.run.log_sha256] = path
    return found
