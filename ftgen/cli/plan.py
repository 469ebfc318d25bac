"""`ftgen plan`: shows the plan that a spec resolves to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ftgen.cli.options import FILE, set_option, site_option

if TYPE_CHECKING:
    from ftgen.catalogue.measurements import Measured


@click.command("plan")
@click.argument("spec", type=FILE)
@site_option
@set_option
@click.option("--name", help="Name of the experiment, if SPEC has a matrix.")
@click.option("--all", "every", is_flag=True, help="Show every number and where it comes from.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON, as the job gets it.")
@click.option("--history", type=FILE, help="Forecast also from the runs of this history, which `ftgen history add` made.")
def command(
    spec: Path,
    site: Path | None,
    overrides: tuple[str, ...],
    name: str | None,
    every: bool,
    as_json: bool,
    history: Path | None,
) -> None:
    """Show the run that a spec resolves to.

    Shows the work, the GPUs, the memory of one GPU, a forecast of the time, the energy and the cost, and the keys that
    differ from their defaults.
    """
    from ftgen.catalogue.measurements import measurements
    from ftgen.plan import origins, overview
    from ftgen.plan.experiments import load_one
    from ftgen.plan.forecast import explain, forecast

    experiment = load_one(spec, site, overrides, name)
    if as_json:
        click.echo(experiment.plan.to_json())
        return
    found = forecast(experiment.plan, [*(_runs_of(history) if history else []), *measurements()])
    if every:
        rows = [*origins.explain(experiment), *explain(found)]
        wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
        for key, value, origin in rows:
            click.echo(f"{key:{wide[0]}}  {value:{min(wide[1], 44)}}  {origin}".rstrip())
    else:
        click.echo(overview.overview(experiment, found))


def _runs_of(history: Path) -> list[Measured]:
    """The runs of a history that a forecast can use, the earliest first."""
    from ftgen.catalogue.measurements import HISTORY, from_run
    from ftgen.results.history import History

    records = History(history).records()
    return [row for of in records if (row := from_run(of["results"], of["plan"], str(history), HISTORY))]
