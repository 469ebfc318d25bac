"""`ftgen verify`: checks a sealed run."""

import sys
import tempfile
from pathlib import Path

import click

from ftgen.cli.options import FILE


@click.command("verify")
@click.argument("file", type=FILE)
@click.option(
    "--signers",
    type=FILE,
    metavar="FILE",
    help="Require a signature by one of these: a file of allowed signers, as ssh-keygen -Y verify reads it.",
)
def command(file: Path, signers: Path | None) -> None:
    """Check a sealed run: its files, its signature, and every figure.

    The figures are computed again from the logs in FILE. The exit code is 1 if a file was changed, a figure differs, or a
    signature that --signers requires is missing or of somebody else.
    """
    from ftgen import __version__
    from ftgen.errors import LogError, Problem
    from ftgen.results import signature
    from ftgen.results.rules import rules
    from ftgen.results.seal import results_of
    from ftgen.results.sealed import MANIFEST, open_sealed
    from ftgen.show.sealed import contents, one_line, unlike
    from ftgen.units import clean

    with tempfile.TemporaryDirectory(prefix="ftgen-verify-") as folder:
        sealed = open_sealed(file, Path(folder))
        if signers and not sealed.is_signed:
            raise LogError(Problem((), "is not signed", "--signers requires a signature", file=str(file)))
        click.echo(f"{file}: {contents(sealed)}")
        click.echo("every file is the one that was sealed")
        manifest = Path(folder, MANIFEST)
        if signers:
            click.echo(clean(f"signed by {signature.signer(manifest, signers)}"))
        elif sealed.is_signed:
            click.echo(clean(f"signed with {signature.fits(manifest)}; --signers FILE says whose key that must be"))
        else:
            click.echo("not signed")
        results = sealed.results()
        again = results_of(*sealed.read(), sealed.manifest.run.log)
    found = unlike(results, again)
    made_by = sealed.manifest.rules
    if made_by.sha256 != rules():
        click.echo(
            clean(f"the results were made by other rules, those of ftgen {made_by.ftgen}; these are of {__version__}")
        )
    if found:
        click.echo("\n".join(["these results do not follow from the logs (sealed -> computed):", *map(one_line, found)]))
        sys.exit(1)
    click.echo(f"all {len(results)} results follow from the logs")
