"""What several commands share: arguments, options, and reading them.

In: what the user typed. Out: paths, a `Window`, a `Baseline`, the `Summary`s of the logs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ftgen.errors import UserError

if TYPE_CHECKING:
    from ftgen.results.compare import Baseline
    from ftgen.results.summary import Summary
    from ftgen.results.window import Window

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
ANYWHERE = click.Path(path_type=Path)


def _complete_key(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[str]:
    from ftgen.cli.completion import keys

    return keys(typed)


specs_argument = click.argument("specs", nargs=-1, required=True, type=ANYWHERE, metavar="SPEC...")
optional_specs_argument = click.argument("specs", nargs=-1, type=ANYWHERE, metavar="[SPEC...]")
site_option = click.option("--site", type=FILE, help="The site profile, a TOML file that describes the cluster.")
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY.PATH=VALUE",
    shell_complete=_complete_key,
    help="Override one key of the spec. Can be given several times.",
)

logs_argument = click.argument("logs", nargs=-1, required=True, type=ANYWHERE, metavar="LOGS...")
window_option = click.option(
    "--window", metavar="N|A-B", help="Time the last N steps, or steps A to B. Default: the plan's window, or 20."
)
baseline_option = click.option(
    "--baseline", metavar="published|FILE.json", help="Compare each run with the published figures or with earlier results."
)
tolerance_option = click.option(
    "--tolerance", default="5%", show_default=True, help="How much slower than the baseline a step may be."
)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a `UserError` inside into an error of usage: exit code 2."""
    try:
        yield
    except UserError as error:
        raise click.UsageError(str(error)) from None


def read_baseline_option(name: str | None, tolerance: str) -> Baseline | None:
    """The baseline that --baseline names, with --tolerance; None without --baseline."""
    from ftgen.results.baseline import read_baseline
    from ftgen.results.compare import read_tolerance

    with usage_errors():
        allowed = read_tolerance(tolerance)
    return read_baseline(name, allowed) if name else None


def read_window_option(text: str | None) -> Window | None:
    """The window that --window gives; None without it."""
    from ftgen.results.window import read_window

    with usage_errors():
        return read_window(text) if text else None


def read_summaries(logs: tuple[Path, ...], window: str | None) -> list[Summary]:
    """A summary of every run in LOGS; a progress bar on a terminal, and a line on stderr for what is passed over."""
    from ftgen.logs.find import find_folders
    from ftgen.results.summary import summarize_all
    from ftgen.show.progress import reading

    steps = read_window_option(window)
    folders = find_folders(logs, warn)
    with reading() as (found, read):
        return summarize_all(map(found, folders), window=steps, progress=read)


def warn(text: str) -> None:
    """A line on stderr, with control characters spelled out."""
    from ftgen.units import clean

    click.echo(clean(text), err=True)
