"""`ftgen diff`: says what differs between two runs."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ftgen.cli.options import ANYWHERE

if TYPE_CHECKING:
    from ftgen.results.differences import Described


@click.command("diff")
@click.argument("first", type=ANYWHERE)
@click.argument("second", type=ANYWHERE)
@click.option("--json", "as_json", is_flag=True, help="Print the differences as JSON.")
def command(first: Path, second: Path, as_json: bool) -> None:
    """Say what differs between two runs: plan, software, hardware, results.

    FIRST and SECOND are sealed runs, folders of a run, or logs.
    """
    from ftgen.results.differences import differences
    from ftgen.show.sealed import difference_lines

    one, other = _described(first), _described(second)
    found = differences(one, other)
    if as_json:
        click.echo(json.dumps({part: [each._asdict() for each in these] for part, these in found.items()}, indent=2))
    else:
        click.echo("\n".join(difference_lines(found, (one.name, other.name))))


def _described(path: Path) -> "Described":
    """A run, from a sealed file (which is checked) or from where its logs are."""
    from ftgen.results.differences import describe
    from ftgen.results.seal import find_one
    from ftgen.results.sealed import is_sealed, open_sealed

    if not is_sealed(path):
        return describe(str(path), *find_one(path))
    with tempfile.TemporaryDirectory(prefix="ftgen-diff-") as folder:
        return describe(str(path), *open_sealed(path, Path(folder)).read())
