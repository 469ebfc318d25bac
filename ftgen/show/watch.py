"""Show the progress of runs. In: a `Follower`. Out: a live table on a terminal, else a line for each change."""

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from ftgen.show.follow import SHARE, Follower, Progress
from ftgen.show.formats.terminal import STATUS_STYLE
from ftgen.units import UNKNOWN, clean, format_walltime, significant

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

BAR = 20  # columns
WAITING = "no run yet: waiting for a file with step lines, or with the name log-<account>.<experiment>_<id>_<restart>.out"


def watch(follower: Follower, every_s: float, console: "Console", write: Callable[[str], object]) -> None:
    """Show progress until every run is over. `write` gets the lines if the console is no terminal."""
    if console.is_terminal:
        _live(follower, every_s, console)
    else:
        _lines(follower, every_s, write)


def _live(follower: Follower, every_s: float, console: "Console") -> None:
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        while True:
            runs, took_s = _timed(follower)
            live.update(table(runs), refresh=True)
            if _over(runs):
                return
            time.sleep(max(every_s, took_s / SHARE))


def _lines(follower: Follower, every_s: float, write: Callable[[str], object]) -> None:
    told: dict[tuple[str, str], tuple[object, ...]] = {}
    waiting = False
    while True:
        runs, took_s = _timed(follower)
        if not runs and not waiting:
            write(WAITING)
            waiting = True
        for run in runs:
            key = run.run.log, run.run.run_id
            if told.get(key) != run.sample:
                told[key] = run.sample
                write(f"{datetime.now().astimezone():%H:%M:%S} {line(run)}")
        if _over(runs):
            return
        time.sleep(max(every_s, took_s / SHARE))


def _timed(follower: Follower) -> tuple[list[Progress], float]:
    started = time.monotonic()
    return follower.look(), time.monotonic() - started


def _over(runs: Sequence[Progress]) -> bool:
    return bool(runs) and all(run.over for run in runs)


def line(run: Progress) -> str:
    """A run in one line: name, state, steps, step time, loss, time left."""
    parts = [
        f"{run.name}: {run.state}",
        f"step {steps(run)}",
        f"{significant(run.step_time_s, 4)} s",
        f"loss {significant(run.loss, 4)}",
    ]
    if run.run.validation_loss is not None:
        parts.append(f"validation loss {significant(run.run.validation_loss, 4)}")
    if run.eta_s is not None:
        parts.append(f"{format_walltime(round(run.eta_s))} left")
    if run.over and run.run.reason:
        parts.append(run.run.reason)
    return clean(", ".join(parts))


def steps(run: Progress) -> str:
    """Steps made of steps planned."""
    return f"{run.step}/{run.run.planned_steps or UNKNOWN}"


def table(runs: Sequence[Progress]) -> "RenderableType":
    """A table of all runs, with a bar for each."""
    from rich import box
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    if not runs:
        return Text(WAITING)
    grid = Table(box=box.SIMPLE_HEAD)
    validated = any(run.run.validation_loss is not None for run in runs)
    for title in ("Run", "State", "", "Step", "Step time", "Loss", *(["Validation loss"] if validated else []), "Left"):
        grid.add_column(title, justify="left" if title in {"Run", "State", ""} else "right")
    for run in sorted(runs, key=lambda run: run.over):  # running ones first: a low terminal cuts off the end
        grid.add_row(
            Text(clean(run.name), overflow="fold"),
            Text(clean(run.state), STATUS_STYLE.get(run.state, "")),
            ProgressBar(total=run.run.planned_steps or None, completed=run.step, width=BAR, pulse=False),
            Text(steps(run)),
            Text(UNKNOWN if run.step_time_s is None else f"{significant(run.step_time_s, 4)} s"),
            Text(significant(run.loss, 4)),
            *([Text(significant(run.run.validation_loss, 4))] if validated else []),
            Text(UNKNOWN if run.eta_s is None else format_walltime(round(run.eta_s))),
        )
    return grid
