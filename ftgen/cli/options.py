"""Arguments and options that several commands share, and functions that read them.

In: the text that the user typed. Out: paths, a `Window`, a `Baseline`, the `Summary`s of the logs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ftgen.errors import UserError

if TYPE_CHECKING:
    from ftgen.results.compare import Baseline
    from ftgen.results.history import History
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
site_option = click.option("--site", type=FILE, help="Site profile: a TOML file that describes the cluster.")
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY.PATH=VALUE",
    shell_complete=_complete_key,
    help="Override one key of the spec. Repeat the option for more keys.",
)

logs_argument = click.argument("logs", nargs=-1, required=True, type=ANYWHERE, metavar="LOGS...")
window_option = click.option(
    "--window",
    metavar="N|A-B",
    help="Average the last N steps, or steps A to B. By default the plan decides, or else the last 20 steps count.",
)
baseline_option = click.option(
    "--baseline",
    metavar="published|FILE.json",
    help="Compare each run with the published figures or with a file of earlier results.",
)
across_engines_option = click.option(
    "--across-engines", is_flag=True, help="Compare each run with the baseline's runs of the other engine."
)
history_option = click.option("--history", type=FILE, help="File of the history. Default: $STAGE_PATH/ftgen.sqlite.")
tolerance_option = click.option(
    "--tolerance",
    default="5%",
    show_default=True,
    metavar="PERCENT%",
    help="Count a run as a regression if its step is slower than the baseline's by more than this.",
)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a `UserError` into a usage error, which has exit code 2."""
    try:
        yield
    except UserError as error:
        raise click.UsageError(str(error)) from None


def read_baseline_option(name: str | None, tolerance: str, *, across_engines: bool = False) -> Baseline | None:
    """The baseline that --baseline names, with --tolerance and --across-engines; None without --baseline."""
    from ftgen.results.baseline import read_baseline
    from ftgen.results.compare import PUBLISHED, read_tolerance

    with usage_errors():
        allowed = read_tolerance(tolerance)
        if across_engines and (not name or name == PUBLISHED):
            raise click.UsageError("--across-engines requires --baseline with a file of results")
    return read_baseline(name, allowed, across_engines=across_engines) if name else None


def read_window_option(text: str | None) -> Window | None:
    """The window that --window gives; None without it."""
    from ftgen.results.window import read_window

    with usage_errors():
        return read_window(text) if text else None


def read_summaries(logs: tuple[Path, ...], window: str | None) -> list[Summary]:
    """A summary of every run in LOGS. Stderr gets a progress bar on a terminal, and a line for each file that is skipped."""
    from ftgen.logs.find import runs_below
    from ftgen.results.summary import summarize_all
    from ftgen.show.progress import reading

    steps = read_window_option(window)
    runs = runs_below(logs, warn)
    with reading() as (found, read):
        return summarize_all(map(found, runs), window=steps, progress=read)


def warn(text: str) -> None:
    """Print a line on stderr, with control characters spelled out."""
    from ftgen.units import clean

    click.echo(clean(text), err=True)


def read_history(history: Path | None) -> History:
    """The history that --history names; by default the one in STAGE_PATH."""
    from ftgen.results.history import NAME, History

    stage = os.environ.get("STAGE_PATH")
    if history is None and not stage:
        raise click.UsageError("STAGE_PATH is not set: give the history with --history FILE")
    return History(history or Path(stage or "", NAME))
