"""`ftgen watch`: the progress of runs."""

from pathlib import Path

import click

from ftgen.cli.options import logs_argument


@click.command("watch")
@logs_argument
@click.option(
    "--every",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Read the logs again after so many seconds.",
)
def command(logs: tuple[Path, ...], every: float) -> None:
    """Show the progress of every run in LOGS until all have ended.

    On a terminal a live table shows the progress; in a pipe or a file each change is a line.
    """
    from rich.console import Console

    from ftgen.cluster import squeue
    from ftgen.show.follow import Follower
    from ftgen.show.watch import watch

    follower = Follower(logs, squeue.states)
    watch(follower, every, Console(highlight=False, emoji=False, markup=False), click.echo)
