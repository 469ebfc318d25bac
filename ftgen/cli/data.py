"""`ftgen data`: shows the training data of a spec, with what the loss counts."""

from pathlib import Path

import click

from ftgen.cli.options import FILE, set_option, site_option


@click.command("data")
@click.argument("spec", type=FILE)
@site_option
@set_option
@click.option("--name", help="Name of the experiment, if SPEC has a matrix.")
def command(spec: Path, site: Path | None, overrides: tuple[str, ...], name: str | None) -> None:
    """Prepare and show the training data of a spec.

    Shows examples, tokens, trained tokens, packs, and one example with the text that the loss counts. Needs no GPU, but the
    packages of the job: it runs `bash <name>.sh --data` here. The data is kept in STAGE_PATH, where a job finds it.
    """
    import subprocess
    import tempfile

    from ftgen import files
    from ftgen.plan.experiments import load_one
    from ftgen.script.render import render

    plan = load_one(spec, site, overrides, name).plan
    with tempfile.TemporaryDirectory() as folder:
        files.write(Path(folder), render(plan))
        done = subprocess.run(["bash", Path(folder, f"{plan.name}.sh"), "--data"], check=False)
    raise SystemExit(done.returncode)
