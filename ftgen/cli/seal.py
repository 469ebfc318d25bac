"""`ftgen seal`: puts a run and all that its figures stand on into one file."""

from pathlib import Path

import click

from ftgen.cli.options import ANYWHERE, FILE, warn


@click.command("seal")
@click.argument("run", type=ANYWHERE)
@click.option("-o", "--output", type=FILE, required=True, help="Write this file, such as run.ftgen.zip.")
@click.option("--run", "run_id", metavar="ID", help="The run's id, if RUN has several runs.")
@click.option("--sign", "key", type=FILE, metavar="KEY", help="Sign with this SSH key, by ssh-keygen -Y sign.")
def command(run: Path, output: Path, run_id: str | None, key: Path | None) -> None:
    """Put a run into one file that others can check.

    RUN is the folder of a run, or its log. The file has the logs, the plan, the spec that does the run again, the
    environment, the check of the nodes, and the results. Secrets and the paths of home directories are removed.
    """
    from ftgen.errors import SpecError
    from ftgen.plan.again import spec_again
    from ftgen.results.seal import find_one, seal
    from ftgen.show.sealed import contents

    found, log = find_one(run, run_id)
    try:
        spec = spec_again(log.plan, str(found.plan or found.log)) if log.plan else None
    except SpecError as error:
        spec = None
        warn(f"the file has no spec: {error}")
    sealed = seal(found, log, output, spec=spec, key=key)
    click.echo(f"{output}: {contents(sealed)}{'; signed' if key else ''}")
