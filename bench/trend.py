"""How often `ftgen history trend` calls noise a change, and how often it finds a real one. By simulation.

In: the number of series of each kind. Out: a table: runs of a series, spread, change, and the fractions found.
"""

from random import Random

import click

from ftgen.results.trend import change_points

NEAR = 1  # runs: a change that is found so near its place is found
QUIET = [(runs, spread) for runs in (10, 20, 50) for spread in (0.005, 0.01, 0.02, 0.04)]
CHANGED = [(20, 10, 0.005, 0.02), (20, 10, 0.01, 0.03), (20, 10, 0.02, 0.05), (20, 16, 0.01, 0.05), (50, 45, 0.01, 0.05)]


@click.command()
@click.option("--series", default=300, show_default=True, help="Series of each kind.")
def main(series: int) -> None:
    """Print the fractions."""
    print("runs  spread  change   found  at its place")
    for runs, spread in QUIET:
        report(runs, spread, 0.0, [change_points(times(runs, spread, seed)) for seed in range(series)])
    for runs, at, spread, change in CHANGED:
        found = [change_points(times(runs, spread, seed, at, change)) for seed in range(series)]
        report(runs, spread, change, found, at)


def times(runs: int, spread: float, seed: int, at: int = 0, change: float = 0.0) -> list[float]:
    """Step times around 1 s; from run `at` on slower by `change`."""
    noise = Random(seed)
    return [noise.gauss(1, spread) * (1 + change * (run >= at)) for run in range(runs)]


def report(runs: int, spread: float, change: float, found: list[list[int]], at: int | None = None) -> None:
    """One line of the table."""
    any_ = sum(map(bool, found)) / len(found)
    right = sum(any(abs(place - at) <= NEAR for place in places) for places in found) / len(found) if at else None
    print(f"{runs:4}  {spread:6.1%}  {change:6.1%}  {any_:6.1%}  {'–' if right is None else f'{right:.1%}':>12}", flush=True)


if __name__ == "__main__":
    main()
